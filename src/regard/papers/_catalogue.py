"""The 75 papers: who they are (`catalogue.toml`) and how far each one is.

The file holds identity only. Whether a paper can be run and whether it has been measured is read
off the package and the evidence directory each time, so it cannot go stale.
"""

from __future__ import annotations

import datetime
import functools
import importlib
import importlib.util
import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Literal

from regard._errors import InputError, nearest

Status = Literal["measured", "runnable", "planned"]


@dataclass(frozen=True)
class Entry:
    """One paper of the catalogue.

    Attributes:
        slug: short name, as in `regard reproduce SLUG`.
        title: as printed on arXiv (first version where it was renamed later).
        arxiv: arXiv number; `url` links to it.
        date: day of the first version.
        topic: what one would look it up under ("KV cache", "attention sinks").
        room: the room of the package that its mechanism lives in ("instruments").
        what: what it is, in one sentence.
        venue: where it was published, "" when only on arXiv.
        also: a later title, "" when it kept its name.
    """

    slug: str
    title: str
    arxiv: str
    date: datetime.date
    topic: str
    room: str
    what: str
    venue: str = ""
    also: str = ""

    @property
    def url(self) -> str:
        return f"https://arxiv.org/abs/{self.arxiv}"

    @property
    def module(self) -> str:
        """Import path of its experiment, whether or not it exists yet."""
        return f"regard.papers.{self.slug.replace('-', '_')}"

    @property
    def status(self) -> Status:
        """`measured` (experiment and evidence), `runnable` (experiment only) or `planned`."""
        if importlib.util.find_spec(self.module) is None:
            return "planned"
        return "measured" if evidence_file(self.slug).is_file() else "runnable"


@functools.cache
def catalogue() -> tuple[Entry, ...]:
    """All papers, sorted by slug."""
    raw = tomllib.loads(Path(__file__).with_name("catalogue.toml").read_text(encoding="utf-8"))
    return tuple(sorted((Entry(**row) for row in raw["paper"]), key=lambda row: row.slug))


def entry(slug: str) -> Entry:
    """The paper of that slug (case and `_` for `-` forgiven).

    Raises:
        InputError: no such paper; names the nearest ones.
    """
    wanted = slug.strip().lower().replace("_", "-")
    for row in catalogue():
        if row.slug == wanted:
            return row
    hint = nearest(wanted, [row.slug for row in catalogue()])
    raise InputError(f"no paper is called {slug!r}; {hint or 'list them with: regard papers'}")


def search(query: str = "") -> list[Entry]:
    """Papers in which every word of the query occurs, those with a hit in the slug or title first.

    >>> [paper.slug for paper in search("kv cache eviction")]
    ['cake']
    """
    words = query.lower().split()
    heads = [f"{row.slug} {row.title} {row.also}".lower() for row in catalogue()]
    rest = [
        f"{row.what} {row.topic} {row.room} {row.arxiv} {row.date} {row.venue} {row.status}".lower()
        for row in catalogue()
    ]
    found = [
        (-sum(word in head for word in words), row)
        for row, head, more in zip(catalogue(), heads, rest, strict=True)
        if all(word in f"{head} {more}" for word in words)
    ]
    return [row for _, row in sorted(found, key=lambda pair: (pair[0], pair[1].slug))]


def load(slug: str) -> ModuleType:
    """The module with the paper's `PAPER` and `experiment`.

    Raises:
        InputError: the paper is unknown, or its experiment is not written yet.
    """
    row = entry(slug)
    if importlib.util.find_spec(row.module) is None:
        raise InputError(
            f"{row.slug} is in the catalogue but has no experiment yet; "
            f"these have one: {', '.join(runnable()) or 'none'}"
        )
    return importlib.import_module(row.module)


def runnable() -> Sequence[str]:
    """Slugs of the papers whose experiment exists, sorted."""
    return [row.slug for row in catalogue() if row.status != "planned"]


def evidence_dir() -> Path:
    """Where full evidence lives: `evidence/` of a source checkout, else of the working directory.

    An installed wheel carries a copy that is read when the working directory has none.
    """
    checkout = _checkout()
    return checkout / "evidence" if checkout else Path.cwd() / "evidence"


def evidence_file(slug: str) -> Path:
    """The newest full evidence of a paper; the path may not exist."""
    path = evidence_dir() / f"{slug}.json"
    packaged = Path(__file__).parents[1] / "evidence" / f"{slug}.json"
    return path if path.is_file() or not packaged.is_file() else packaged


@functools.cache
def _checkout() -> Path | None:
    root = Path(__file__).parents[3]
    project = root / "pyproject.toml"
    ours = project.is_file() and re.search(r'^name = "regard"$', project.read_text(), re.MULTILINE)
    return root if ours else None
