"""Residual-state peaks and massive activations: a few enormous entries of the residual stream, with their place.

* residual peak: ||h_first|| far above the other tokens' norm (Active-Dormant Attention Heads, arXiv 2410.13835);
* massive activation: |x[t, d]| >= 1000 x median |x| and > 100, on the stream after a block; the feature set of a layer is the
  set of dimensions that are massive at the first token (arXiv 2510.22603; the rule is that of Sun et al., arXiv 2402.17762).

Sites count 0 = embedding, l + 1 = after block l.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from regard._errors import InputError
from regard.coordinates import Dimension
from regard.engine import State
from regard.instruments._tokens import wide
from regard.instruments.base import Instrument

if TYPE_CHECKING:
    import polars
    from matplotlib.axes import Axes

KEPT = 64
"""Most massive entries that are kept for one sequence and site."""


@dataclass(frozen=True, slots=True)
class Massive:
    """One massive activation: sequence, site, token (from the first real one), dimension, signed value."""

    sequence: int
    site: int
    token: int
    dimension: int
    value: float


@dataclass(slots=True)
class Skyline:
    """Extreme activations of one stack, site by site; S = layers + 1 sites, averages over sequences.

    Attributes:
        peak: the largest |activation| over sequences, tokens and dimensions.
        peak_token, peak_dimension: where it is; tokens count from the first real one.
        median: median |activation|.
        first_norm, median_norm: norm of the first token; median norm of the others.
        massive: every massive activation, by the rule of the instrument.
        records: `[sequences, sites, 6]`: peak (signed), token, dimension, median, first norm, median norm.
    """

    peak: Float[Tensor, " sites"]
    peak_token: Int[Tensor, " sites"]
    peak_dimension: Int[Tensor, " sites"]
    median: Float[Tensor, " sites"]
    first_norm: Float[Tensor, " sites"]
    median_norm: Float[Tensor, " sites"]
    massive: list[Massive]
    records: Float[Tensor, "sequences sites 6"]
    stack: str = ""

    @property
    def ratio(self) -> Float[Tensor, " sites"]:
        """The residual peak: norm of the first token over the median norm of the others, averaged over sequences."""
        return (self.records[..., 4] / self.records[..., 5]).nanmean(0).float()

    def features(self, site: int | None = None) -> set[int]:
        """The dimensions that are massive at the first token, at one site or at any."""
        return {m.dimension for m in self.massive if m.token == 0 and site in (None, m.site)}

    def tokens(self) -> dict[int, set[int]]:
        """For each token position with a massive activation, its massive dimensions."""
        found: dict[int, set[int]] = {}
        for m in self.massive:
            found.setdefault(m.token, set()).add(m.dimension)
        return found

    @property
    def summit(self) -> tuple[int, int, int]:
        """Site, token and dimension of the largest activation of all."""
        site = int(self.peak.argmax())
        return site, int(self.peak_token[site]), int(self.peak_dimension[site])

    def to_frame(self) -> polars.DataFrame:
        """One row for each site (needs the `frames` extra)."""
        import polars

        names = (
            "peak",
            "peak_token",
            "peak_dimension",
            "median",
            "first_norm",
            "median_norm",
            "ratio",
        )
        columns = {"site": range(len(self.peak))} | {n: getattr(self, n).tolist() for n in names}
        return polars.DataFrame(columns)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Largest and median |activation| by site on a logarithmic axis (needs the `plot` extra)."""
        import matplotlib.pyplot as plt

        if ax is None:
            _, ax = plt.subplots(figsize=(7, 3.2), layout="constrained")
        sites = range(len(self.peak))
        ax.fill_between(sites, self.median.tolist(), self.peak.tolist(), alpha=0.25, step="mid")
        ax.step(sites, self.peak.tolist(), where="mid", label="largest |activation|")
        ax.step(sites, self.median.tolist(), where="mid", label="median |activation|")
        _, token, dimension = self.summit
        title = f"peak at token {token}, {str(Dimension(0, dimension)).rsplit('.')[-1]}"
        ax.set(yscale="log", xlabel="site (0 = embedding, l + 1 = after block l)", title=title)
        ax.legend()
        return ax


def site_of(state: State) -> int | None:
    """The residual site of a state: 0 for the embedding, layer + 1 after a block, None inside a block."""
    return {"embed": 0, "block": state.layer + 1}.get(state.part)


def _median(values: Tensor) -> float:
    """The lower median of all entries (`Tensor.median` takes many times as long)."""
    flat = values.flatten().cpu().numpy()
    middle = (len(flat) - 1) // 2
    return float(np.partition(flat, middle)[middle])


class ResidualPeaks(Instrument):
    """Peaks, medians, norms and massive activations of the residual stream at every site.

    Args:
        ratio, floor: a massive activation is >= `ratio` x median |x| and > `floor`.
        tokens: medians are taken over at most this many evenly spaced tokens of each sequence (None: over all).

    Steps of a single token after the first sequence are decode steps and are left out.

    Cost: three passes over the residual stream, O(tokens x dim) time; memory O(sites) for each sequence.

    >>> import torch
    >>> peaks, hidden = ResidualPeaks(), torch.ones(1, 4, 8)
    >>> hidden[0, 0, 3] = -2000.0
    >>> peaks.residual(State("embed", 0, "", hidden))
    >>> peaks.compute()[""].massive
    [Massive(sequence=0, site=0, token=0, dimension=3, value=-2000.0)]
    """

    states = {"records": "list", "massive": "list"}

    def __init__(
        self, ratio: float | int = 1000, floor: float | int = 100, tokens: int | None = 256
    ) -> None:
        super().__init__()
        if ratio <= 0 or floor < 0:
            raise InputError(f"ratio must be > 0 and floor >= 0, got {ratio} and {floor}")
        if tokens is not None and tokens < 1:
            raise InputError.of("tokens", given=tokens, expected="a number of tokens >= 1, or None")
        self.ratio, self.floor, self.tokens = ratio, floor, tokens

    def residual(self, state: State) -> None:
        site = site_of(state)
        if site is None or state.hidden.dim() != 3:
            return
        key = (state.stack, site)
        if state.hidden.shape[1] == 1 and key in self.state["records"]:
            return
        hidden = wide(state.hidden)
        records, massive = [], []
        for row, sequence in enumerate(hidden):
            if state.valid is not None:
                sequence = sequence[state.valid[row]]
            if not len(sequence):
                continue
            record, found = self._look(sequence)
            massive.append(torch.cat([found.new_full((len(found), 1), len(records)), found], 1))
            records.append(record)
        if not records:
            return
        self.accumulate("records", key, [torch.stack(records).cpu()])
        self.accumulate("massive", key, [torch.cat(massive).cpu()])

    def _look(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Of one sequence `[tokens, dim]`: its record, and its massive entries as rows of token, dimension, value."""
        tokens = len(hidden)
        # first the row: a search of the whole is 30 times slower; no copy of the stream is made
        token = int(torch.maximum(hidden.amax(-1), -hidden.amin(-1)).argmax())
        dimension = int(hidden[token].abs().argmax())
        norms = hidden.norm(dim=-1)
        step = 1 if self.tokens is None else max(1, -(-tokens // self.tokens))
        median = _median(hidden[::step].abs())
        others = norms[1:].median() if tokens > 1 else norms.new_full((), float("nan"))
        numbers = [float(hidden[token, dimension]), token, dimension, median, norms[0], others]
        record = torch.tensor([float(n) for n in numbers], dtype=torch.float64)
        least, largest = max(self.ratio * median, self.floor), abs(numbers[0])
        if not (largest >= least and largest > self.floor):
            return record, torch.zeros(0, 3, dtype=torch.float64)
        size = hidden.abs()
        at = ((size >= least) & (size > self.floor)).nonzero()
        values = hidden[at[:, 0], at[:, 1]].double()
        order = values.abs().argsort(descending=True)[:KEPT]
        return record, torch.cat([at[order].double(), values[order, None]], 1)

    def compute(self) -> dict[str, Skyline]:
        """The skyline of each stack.

        Raises:
            InputError: when nothing was observed.
        """
        if not self.state["records"]:
            raise InputError(
                "nothing was observed; run the model inside regard.attach(model, ResidualPeaks())"
            )
        stacks = dict.fromkeys(stack for stack, _ in self.state["records"])
        return {stack: self._skyline(stack) for stack in stacks}

    def _skyline(self, stack: str) -> Skyline:
        sites = sorted(site for name, site in self.state["records"] if name == stack)
        table = {site: self.state["records"][stack, site] for site in sites}
        records = torch.stack([torch.cat(table[site]) for site in sites], 1)
        best = records[..., 0].abs().argmax(0)
        top = records[best, torch.arange(len(sites))]
        massive = []
        for index, site in enumerate(sites):
            offset = 0
            for rows, record in zip(self.state["massive"][stack, site], table[site], strict=True):
                for row, token, dimension, value in rows.tolist():
                    massive.append(
                        Massive(offset + int(row), index, int(token), int(dimension), value)
                    )
                offset += len(record)
        mean = records.nanmean(0).float()
        return Skyline(
            top[:, 0].abs().float(),
            top[:, 1].long(),
            top[:, 2].long(),
            mean[:, 3],
            mean[:, 4],
            mean[:, 5],
            massive,
            records,
            stack,
        )

    def to_frame(self) -> Any:
        """The skylines of all stacks, one row for each site (needs the `frames` extra)."""
        import polars

        frames = [
            skyline.to_frame().insert_column(0, polars.lit(stack).alias("stack"))
            for stack, skyline in self.compute().items()
        ]
        return polars.concat(frames)

    def measures(self) -> dict[str, Any]:
        """None: these are numbers of layers, not of heads."""
        return {}

    def plot(self) -> Any:
        """The skyline of each stack (needs the `plot` extra)."""
        import matplotlib.pyplot as plt

        skylines = list(self.compute().values())
        figure, axes = plt.subplots(
            len(skylines), 1, figsize=(7, 3.2 * len(skylines)), squeeze=False, layout="constrained"
        )
        for ax, skyline in zip(axes[:, 0], skylines, strict=True):
            skyline.plot(ax)
        return figure
