"""What a bench found: tidy rows, and everything about the run that a reader must know.

One `Row` is one number: document, method, budget, measure. `Results` averages them over documents with
bootstrap intervals, compares them with the full cache on the same documents, and turns into a data frame.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any

from regard._errors import InputError
from regard.metrics import Estimate, bootstrap, paired

if TYPE_CHECKING:
    import polars

SCHEMA_VERSION = 1
FULL, LIBRARY = "full", "library"
"""Names of the two baselines: `regard.cache.Full`, and the cache that transformers makes."""


@dataclass(frozen=True)
class Measure:
    """How to read a measure: its unit, which way is better, and what it is."""

    key: str
    label: str
    unit: str
    higher: bool
    short: str


MEASURES: dict[str, Measure] = {
    measure.key: measure
    for measure in (
        Measure("kl", "KL", "nats", False, "KL divergence of predictions from the full cache's, a token of the text after"),
        Measure("nll", "NLL", "nats", False, "negative log-likelihood of the text that really follows, a token"),
        Measure("top1", "Top-1", "share", True, "share of those tokens whose most likely prediction is the full cache's"),
        Measure("needle", "Needle", "nats", True, "log-probability, an answer token, of ten codes hidden in the context"),
        Measure("multikey", "Multi-key", "nats", True, "the same for four magic numbers stated once, in RULER's form"),
        Measure("variables", "Variables", "nats", True, "the same for the names in a chain of assignments, in RULER's form"),
        Measure("copy", "Copy", "nats", True, "the same for passages of the context after their own beginning"),
        Measure("bytes", "Memory", "MB", False, "bytes that the cache holds after the context has been read"),
        Measure("kept", "Kept", "share", False, "those bytes as a share of what the keys and values of all tokens take"),
        Measure("prefill", "Prefill", "s", False, "time to read the context, eviction included"),
        Measure("evict", "Evict", "s", False, "the part of it that the method adds: watching, scoring, evicting"),
        Measure("peak", "Peak", "MB", False, "largest memory during the prefill above what was in use before"),
        Measure("decode", "Decode", "ms", False, "time of one generated token, median"),
        Measure("floor", "Floor", "ms", False, "the least a step can take: bytes of weights and cache over read bandwidth"),
    )
}  # fmt: skip
QUALITY = ("kl", "nll", "top1", "needle", "multikey", "variables", "copy")


@dataclass(frozen=True)
class Row:
    """One number. `budget` is the size as it was asked for, "1" for the baselines; `depth` in [0, 1] where one applies."""

    document: str
    kind: str
    length: int
    method: str
    budget: str
    measure: str
    value: float
    depth: float | None = None


@dataclass(frozen=True)
class Setting:
    """A point in the tables: one method at one budget and one context length."""

    length: int
    method: str
    budget: str


@dataclass
class Results:
    """Every number of a bench, and what was run.

    Attributes:
        rows: tidy, in the order in which they were measured.
        texts: for each setting, what the model went on to write after the first document.
        about: model, versions, hardware, threads, bandwidth, seeds, the command; shown on the page.
        complete: whether everything that was asked for has been measured.
    """

    rows: list[Row] = field(default_factory=list)
    texts: list[dict[str, Any]] = field(default_factory=list)
    about: dict[str, Any] = field(default_factory=dict)
    complete: bool = True

    def settings(self) -> list[Setting]:
        """All settings, in the order in which they were measured, the baselines first."""
        found = dict.fromkeys(Setting(r.length, r.method, r.budget) for r in self.rows)
        return sorted(found, key=lambda s: (s.length, s.method not in (LIBRARY, FULL)))

    def lengths(self) -> list[int]:
        return sorted({row.length for row in self.rows})

    def by_document(self, setting: Setting, measure: str) -> dict[str, float]:
        """A measure's value for each document, averaged over its questions."""
        values: dict[str, list[float]] = {}
        for row in self._of(setting, measure):
            values.setdefault(row.document, []).append(row.value)
        return {name: math.fsum(found) / len(found) for name, found in values.items()}

    def estimate(self, setting: Setting, measure: str) -> Estimate | None:
        """Mean over documents with its bootstrap interval; None when it was not measured."""
        values = list(self.by_document(setting, measure).values())
        return bootstrap(values) if values else None

    def lost(self, setting: Setting, measure: str) -> Estimate | None:
        """What is lost against the full cache on the same documents, above 0 when the setting is worse."""
        ours = self.by_document(setting, measure)
        theirs = self.by_document(Setting(setting.length, FULL, "1"), measure)
        both = [name for name in ours if name in theirs]
        if not both:
            return None
        sign = 1 if MEASURES[measure].higher else -1
        return paired([sign * theirs[n] for n in both], [sign * ours[n] for n in both])

    def by_depth(self, setting: Setting, measure: str, parts: int = 5) -> list[float | None]:
        """The mean of a measure over answers that stand in each of `parts` equal parts of the context."""
        found: list[list[float]] = [[] for _ in range(parts)]
        for row in self._of(setting, measure):
            if row.depth is not None:
                found[min(int(row.depth * parts), parts - 1)].append(row.value)
        return [math.fsum(part) / len(part) if part else None for part in found]

    def _of(self, setting: Setting, measure: str) -> Iterator[Row]:
        wanted = (setting.length, setting.method, setting.budget, measure)
        return (r for r in self.rows if (r.length, r.method, r.budget, r.measure) == wanted)

    def pareto(self, length: int, measure: str, against: str = "bytes") -> list[Setting]:
        """The settings that no other beats in both `measure` and `against`, cheapest first."""
        better = -1 if MEASURES[measure].higher else 1
        points = []
        for setting in self.settings():
            worth, cost = self.estimate(setting, measure), self.estimate(setting, against)
            if setting.length == length and worth and cost:
                points.append((cost.mean, better * worth.mean, setting))
        front, best = [], math.inf
        for _, worth, setting in sorted(points, key=lambda point: point[:2]):
            if worth < best:
                front.append(setting)
                best = worth
        return front

    def to_frame(self) -> polars.DataFrame:
        """One row a number: document, kind, length, method, budget, measure, value, depth (needs the `frames` extra)."""
        try:
            import polars as pl
        except ImportError as error:
            raise ImportError("bench frames need polars: pip install 'regard[frames]'") from error
        types = {
            "document": pl.String, "kind": pl.String, "length": pl.Int32, "method": pl.String,
            "budget": pl.String, "measure": pl.String, "value": pl.Float64, "depth": pl.Float64,
        }  # fmt: skip
        return pl.DataFrame([asdict(row) for row in self.rows], schema=types)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types; `from_json` reads them back."""
        return {
            "schema": SCHEMA_VERSION,
            "complete": self.complete,
            "about": self.about,
            "texts": self.texts,
            "columns": [f.name for f in fields(Row)],
            "rows": [list(asdict(row).values()) for row in self.rows],
        }

    @classmethod
    def from_json(cls, data: Any) -> Results:
        """Results from `to_json`; InputError for anything else."""
        if not isinstance(data, dict) or data.get("schema") != SCHEMA_VERSION:
            raise InputError(f"expected the results of a bench, schema {SCHEMA_VERSION}")
        rows = [Row(**dict(zip(data["columns"], row, strict=True))) for row in data["rows"]]
        return cls(rows, data["texts"], data["about"], data["complete"])
