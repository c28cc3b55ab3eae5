"""Run a paper's experiment and write its evidence."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from rich.console import Console

from regard._errors import EvidenceError
from regard.papers import _evidence
from regard.papers._catalogue import evidence_dir, load
from regard.papers._paper import Paper
from regard.papers._partial import Partial, fingerprint
from regard.papers._run import Run, Scale, bars


def reproduce(
    slug: str | ModuleType,
    *,
    scale: Scale = "full",
    out: str | Path | None = None,
    resume: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Run a paper's experiment and write `<out>/<slug>.json` and `<out>/figures/<slug>/`.

    Args:
        slug: a paper of the catalogue, or a module with `PAPER` and `experiment`.
        scale: "full" is the measurement; "quick" checks in seconds that the experiment runs.
        out: evidence directory. By default a full run replaces the project's own evidence, and a
            quick run goes to the user cache, so that it never replaces a full one.
        resume: go on from the values that an interrupted run of the same code left behind.
        console: where progress is drawn; None draws nothing.

    Returns:
        The evidence, as written.

    Raises:
        InputError: unknown paper, no experiment yet, or a module it needs is not installed.
        OutputError: `out` cannot be written; found out before the experiment starts.
        EvidenceError: the experiment recorded something that is not evidence.
    """
    module = slug if isinstance(slug, ModuleType) else load(slug)
    paper: Paper = module.PAPER
    paper.check_needs()
    place = Path(out) if out is not None else default_out(scale)
    _evidence.check_writable(place)
    kept = place / ".partial"
    mark = fingerprint(module, scale)
    partial = Partial(kept / f"{paper.slug}.{scale}.json", fingerprint=mark, resume=resume)
    if console is not None:
        _say_what_was_kept(console, partial, resume)
    staged = kept / f"{paper.slug}.{scale}.figures"
    shutil.rmtree(staged, ignore_errors=True)
    if console is None:
        run = Run(paper, scale=scale, work=staged, partial=partial)
        module.experiment(run)
    else:
        with bars(console) as progress:
            run = Run(paper, scale=scale, work=staged, partial=partial, progress=progress)
            module.experiment(run)
    evidence = {
        "slug": paper.slug,
        "title": paper.entry.title,
        "arxiv": paper.entry.arxiv,
        "scale": scale,
        "command": f"regard reproduce {paper.slug}" + (" --quick" if scale == "quick" else ""),
        "seconds": round(partial.seconds, 1),
        "seeds": sorted(run.seeds),
        "versions": versions(),
        "claims": run.rows(),
        "figures": [f"figures/{paper.slug}/{name}" for name in run.figures],
    }
    _evidence.check(evidence)
    _publish(staged, place / "figures" / paper.slug, run.figures)
    _evidence.write(evidence, place / f"{paper.slug}.json")
    partial.clear()
    _remove_if_empty(kept)
    return evidence


def default_out(scale: Scale) -> Path:
    """Where a run is written when nobody says: full evidence to the project, quick to the cache."""
    if scale == "full":
        return evidence_dir()
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "regard" / "quick"


def versions() -> dict[str, str]:
    """Versions of everything loaded that can change a number."""
    found = {"python": platform.python_version()}
    for name, module in (
        ("regard", "regard"),
        ("torch", "torch"),
        ("transformers", "transformers"),
        ("numpy", "numpy"),
        ("scipy", "scipy"),
        ("scikit-learn", "sklearn"),
    ):
        if module in sys.modules:
            try:
                found[name] = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                found[name] = str(getattr(sys.modules[module], "__version__", "unknown"))
    return found


def _publish(staged: Path, target: Path, names: list[str]) -> None:
    """Move finished figures into place and drop those that the experiment no longer draws."""
    lost = [name for name in names if not (staged / name).is_file()]
    if lost:
        raise EvidenceError(f"figures that were recorded are gone: {', '.join(lost)}")
    if names:
        target.mkdir(parents=True, exist_ok=True)
    for name in names:
        os.replace(staged / name, target / name)
    if target.is_dir():
        for old in target.iterdir():
            if old.name not in names:
                old.unlink()
        _remove_if_empty(target)
    shutil.rmtree(staged, ignore_errors=True)


def _remove_if_empty(directory: Path) -> None:
    if directory.is_dir() and not any(directory.iterdir()):
        directory.rmdir()


def _say_what_was_kept(console: Console, partial: Partial, resume: bool) -> None:
    if partial.stale:
        console.print("The kept values were measured by other code; starting afresh.")
    elif resume and partial.values:
        console.print(f"Going on from {len(partial.values)} kept value(s).")
    elif resume:
        console.print("Nothing was kept by an interrupted run; starting afresh.")
    elif partial.path is not None and partial.path.is_file():
        console.print(
            "An interrupted run left measured values; they are dropped at the first new one. "
            "Ctrl-C and add --resume to go on from them."
        )
