"""What an experiment is given: its scale, its seeds, its model, and a place to record results."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from regard._errors import EvidenceError
from regard.papers._evidence import plain
from regard.papers._paper import Paper
from regard.papers._partial import Partial

if TYPE_CHECKING:
    import torch
    from matplotlib.figure import Figure

T = TypeVar("T")
Scale = Literal["quick", "full"]
_UNSET: Any = object()


class Run:
    """One run of one paper's experiment.

    An experiment calls `seed`, `pick`, `model`, `progress` and `partial` while it measures, then
    `record` once for each claim and `figure` for each picture. `regard.papers.reproduce` makes the
    run and writes the evidence; a test may make one by hand: `Run(PAPER, scale="quick", work=tmp)`.
    """

    def __init__(
        self,
        paper: Paper,
        *,
        scale: Scale,
        work: Path,
        partial: Partial | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.paper = paper
        self.scale: Scale = scale
        self.work = work
        self.seeds: list[int] = []
        self.records: dict[str, dict[str, Any]] = {}
        self.figures: list[str] = []
        self._partial = partial or Partial(None)
        self._bars = progress

    @property
    def quick(self) -> bool:
        """Whether this is the small run that the tests make (seconds, no claim to precision)."""
        return self.scale == "quick"

    def pick(self, *, quick: T, full: T) -> T:
        """The value for this run's scale: `steps = run.pick(quick=50, full=3000)`."""
        return quick if self.quick else full

    def seed(self, seed: int) -> torch.Generator:
        """Seed Python, NumPy and torch, note it in the evidence, and return a CPU generator."""
        import numpy as np
        import torch

        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        if seed not in self.seeds:
            self.seeds.append(seed)
        return torch.Generator().manual_seed(seed)

    def model(self, name: str = "smollm2") -> Any:
        """`regard.load(name)`, loaded at the first call and shared by later ones."""
        return _load_model(name)

    def progress(
        self, items: Iterable[T], label: str, *, total: float | None = None
    ) -> Iterator[T]:
        """Iterate over `items` with a progress bar; bars may be nested."""
        if total is None and hasattr(items, "__len__"):
            total = len(items)  # pyright: ignore[reportArgumentType]
        if self._bars is None:
            yield from items
            return
        task = self._bars.add_task(label, total=total)
        try:
            for item in items:
                yield item
                self._bars.advance(task)
        finally:
            self._bars.remove_task(task)

    def partial(self, name: str, compute: Callable[[], T]) -> T:
        """`compute()`, kept under `name` so that an interrupted run can go on from there.

        The value must be plain (numbers, texts, lists, mappings; tensors and arrays become lists)
        and is returned in that plain form, so a fresh and a resumed run see the same thing. Give
        every training run or model pass that takes more than a minute its own name::

            curves = [run.partial(f"softmax/{s}", lambda s=s: train(s)) for s in seeds]
        """
        return self._partial.get(name, compute, self.seeds)

    def record(
        self,
        claim_id: str,
        *,
        here: Any,
        interval: tuple[Any, Any] | None = None,
        holds: object = _UNSET,
        setting: str = "",
        note: str = "",
    ) -> bool | None:
        """Write down what was measured for a claim, and return the verdict.

        Args:
            claim_id: a claim of the paper.
            here: the measured number, a text, or a mapping of a few names to numbers.
            interval: low and high end of its uncertainty (say in `note` of which kind).
            holds: the verdict, computed from the measurement; None when it cannot be decided
                (then `note` says why). Left out, the claim's own `holds` predicate decides.
            setting: the setting here, when it differs from the paper's.
            note: one sentence a reader needs to judge the number.

        Raises:
            EvidenceError: unknown claim, second record of one claim, no verdict or two, a number
                that is not finite.
        """
        claim = self.paper.claim(claim_id)
        where = f"{self.paper.slug}.{claim_id}"
        if claim_id in self.records:
            raise EvidenceError(f"{where} is recorded twice; record each claim once")
        here = plain(here, where=f"{where}.here")
        if holds is _UNSET:
            if claim.holds is None:
                raise EvidenceError(f"{where} has no predicate; pass holds= to record()")
            holds = None if here is None else claim.holds(here)
        elif claim.holds is not None and holds is not None:
            raise EvidenceError(f"{where} has a predicate; leave holds= out of record()")
        verdict = None if holds is None else bool(plain(holds, where=f"{where}.holds"))
        if verdict is None and not note:
            raise EvidenceError(f"{where} is undecided; say why in note=")
        if interval is not None:
            low, high = (plain(end, where=f"{where}.interval") for end in interval)
            if low > high:
                raise EvidenceError.of(f"{where}.interval", given=interval, expected="low <= high")
            interval = (low, high)
        self.records[claim_id] = {
            "here": here,
            "interval": list(interval) if interval is not None else None,
            "holds": verdict,
            "note": note,
            "setting": setting,
        }
        return verdict

    def figure(
        self, name: str, figure: Figure, *, format: Literal["svg", "png"] = "svg", dpi: int = 120
    ) -> None:
        """Save a matplotlib figure as `figures/<slug>/<name>` of the evidence directory, close it.

        Take SVG for lines and bars, PNG for dense images. Files are free of dates and random ids,
        so that the same measurement writes the same bytes.
        """
        import matplotlib as mpl
        from matplotlib import pyplot as plt

        file = f"{name}.{format}"
        if file in self.figures:
            raise EvidenceError(f"figure {name!r} of {self.paper.slug} is drawn twice")
        self.work.mkdir(parents=True, exist_ok=True)
        metadata: Mapping[str, Any] = {"Date": None} if format == "svg" else {"Software": None}
        with mpl.rc_context({"svg.hashsalt": "regard", "svg.fonttype": "none"}):
            figure.savefig(
                self.work / file, format=format, dpi=dpi, bbox_inches="tight", metadata=metadata
            )
        plt.close(figure)
        self.figures.append(file)

    def rows(self) -> list[dict[str, Any]]:
        """The claims of the paper in order, each with what was recorded for it.

        Raises:
            EvidenceError: a full run left out a claim that our scale can check.
        """
        rows = []
        for claim in self.paper.claims:
            got = self.records.get(claim.id)
            if got is None:
                if not claim.beyond and not self.quick:
                    raise EvidenceError(
                        f"{self.paper.slug}.{claim.id} was not recorded; record it, or say in "
                        "Claim(beyond=...) why our scale cannot check it"
                    )
                note = claim.beyond or "not measured at the quick scale"
                got = {"here": None, "interval": None, "holds": None, "note": note, "setting": ""}
            setting = claim.setting
            if got["setting"]:
                setting = f"{setting}; here: {got['setting']}" if setting else got["setting"]
            row = {"claim": claim.claim, "setting": setting, "paper": claim.paper}
            rows.append(row | {key: got[key] for key in ("here", "interval", "holds", "note")})
        return rows


def bars(console: Any) -> Progress:
    """The progress display of a run: label, bar, count, elapsed and remaining time."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        TextColumn("{task.completed:.0f}/{task.total}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )


@functools.cache
def _load_model(name: str) -> Any:
    import regard

    return regard.load(name)
