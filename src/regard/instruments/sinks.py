"""Attention sinks: keys that many queries park their attention on.

Token importance  a_k = 1/(T-k+1) sum_{i>=k} A[i,k]  (column mean over the rows that see key k), and the sink rate
Sink_k^eps = share of heads with a_k > eps  (When Attention Sink Emerges, arXiv 2410.10781; eps = 0.3, first key).
The indicator is averaged over sequences; averaging the maps first would give another number.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from regard._errors import InputError
from regard.engine import Block
from regard.instruments.base import (
    HeadMeasure,
    RowInstrument,
    SeriesInstrument,
    SiteKey,
    TokenMeasure,
    slots_before,
)


class SinkMass(RowInstrument):
    """Mean attention of each head on the first key that the query sees.

    `from_query`: queries nearer to the start than this are left out (they see few other keys).

    Cost: one column of each block; memory O(heads).

    >>> import torch
    >>> from regard.engine import AttentionCall, Pipeline, attend
    >>> mass, zeros = SinkMass(from_query=1), torch.zeros(1, 1, 3, 8)
    >>> _ = attend(AttentionCall.make(zeros, zeros, zeros), Pipeline([mass]))  # 1/2 and 1/3
    >>> round(mass.compute()["sink mass"]["L0H0"], 4)
    0.4167
    """

    quantities = {
        "sink mass": ("share", "mean over query rows of the attention on the first visible key")
    }

    def __init__(self, from_query: int = 8) -> None:
        super().__init__()
        self.from_query = from_query

    def weights(self, block: Block) -> None:
        first = block.first_key
        late = block.positions[None, :] - first >= self.from_query
        if block.site.kind == "cross":
            late = torch.ones_like(late)
        self.add_rows(block, late, **{"sink mass": block.first_weight})


@dataclass(frozen=True, slots=True)
class Sink:
    """A key that heads park on: `rate` of the heads give it more than eps, `importance` is its mean a_k over heads."""

    position: int
    rate: float
    importance: float


@dataclass(slots=True)
class SinkResult:
    """Token importance a_k for each head and token, and what follows from it."""

    importance: TokenMeasure
    eps: float
    starts: dict[SiteKey, list[Tensor]]

    def _at(self, key: SiteKey, k: int) -> list[Tensor]:
        """a_k of one site, `[batch, heads]` for each batch of sequences; k counts from the first real token."""
        found = []
        for start, values in zip(self.starts[key], self.importance.values[key], strict=True):
            if k < 0 or int(start.max()) + k >= values.shape[-1]:
                raise InputError.of("k", given=k, expected=f"a position below {values.shape[-1]}")
            index = (start + k).view(-1, 1, 1).expand(*values.shape[:2], 1)
            found.append(values.gather(-1, index)[..., 0])
        return found

    def rate(self, k: int = 0, stack: str = "", eps: float | None = None) -> float:
        """Sink_k^eps in percent: share of (head, sequence) pairs with a_k > eps; k counts from the first real token."""
        eps = self.eps if eps is None else eps
        hits, total = 0.0, 0
        for key in self.importance.values:
            if key[0] == stack:
                for values in self._at(key, k):
                    known = ~values.isnan()
                    hits += float((values[known] > eps).sum())
                    total += int(known.sum())
        if not total:
            raise InputError(f"nothing was observed in stack {stack!r}")
        return 100 * hits / total

    def heads(self, k: int = 0) -> HeadMeasure:
        """a_k of every head, averaged over sequences."""
        table = {key: torch.cat(self._at(key, k)).nanmean(0) for key in self.importance.values}
        return HeadMeasure(
            "token importance", "share", table, {}, f"column mean a_{k + 1} of key {k}"
        )

    def sinks(
        self, stack: str = "", eps: float | None = None, least: float = 0.01, tail: int = 8
    ) -> list[Sink]:
        """Every position that is a sink for at least a share `least` of the heads, strongest first.

        Read from the first sequence of the last batch; padding counts as positions. All but the first are secondary sinks. The
        last `tail` positions are left out: few queries see them.
        """
        eps = self.eps if eps is None else eps
        table = self.importance.tensor(stack)
        flat = table.flatten(0, 1)
        flat = flat[~flat.isnan().all(-1)].nan_to_num()
        rate, mean = (flat > eps).float().mean(0), flat.mean(0)
        last = flat.shape[-1] - tail
        found = [
            Sink(k, float(rate[k]), float(mean[k])) for k in range(max(last, 1)) if rate[k] >= least
        ]
        return sorted(found, key=lambda sink: -sink.rate)


class Sinks(SeriesInstrument):
    """Token importance of every key for every head: the basis of sink rates and of the text colouring.

    Cost: one column sum of each block (shared with FAI); memory O(heads x tokens).

    >>> import torch
    >>> from regard.engine import AttentionCall, Pipeline, attend
    >>> sinks, zeros = Sinks(), torch.zeros(1, 1, 4, 8)
    >>> _ = attend(AttentionCall.make(zeros, zeros, zeros), Pipeline([sinks]))
    >>> sinks.compute().rate()  # (1 + 1/2 + 1/3 + 1/4) / 4 = 0.52 > 0.3
    100.0
    """

    states = {"received": "list", "seen": "list", "start": "list"}

    def __init__(self, eps: float = 0.3) -> None:
        if not 0 < eps < 1:
            raise InputError.of("eps", given=eps, expected="a share between 0 and 1")
        super().__init__()
        self.eps = eps

    def weights(self, block: Block) -> None:
        before = slots_before(block.call)
        keys = slice(block.keys.start + before, block.keys.stop + before)
        received = self.series("received", block, block.call.keys + before)
        seen = self.series("seen", block, block.call.keys + before, heads=1)
        received[..., keys] += block.received() * block.share
        seen[..., keys] += block.seen[:, None] * block.share

    def compute(self) -> SinkResult:
        values, starts = {}, {}
        for key, sums in self.state["received"].items():
            seen = self.state["seen"][key]
            values[key] = [
                torch.where(n > 0, s / n.clamp_min(1e-9), float("nan"))
                for s, n in zip(sums, seen, strict=True)
            ]
            starts[key] = [(n[:, 0] > 0).to(torch.uint8).argmax(-1) for n in seen]
        measure = TokenMeasure(
            "importance", "share", values, "mean attention on the key over the queries that see it"
        )
        return SinkResult(measure, self.eps, starts)

    def tokens(self) -> TokenMeasure:
        """Token importance, the number that `to_frame` and `plot` show."""
        return self.compute().importance

    def mass(self) -> TokenMeasure:
        """Total attention each token received (in queries: a token that every query fully attends to has T)."""
        return TokenMeasure(
            "received",
            "queries",
            dict(self.state["received"]),
            "sum over queries of the attention on the key",
        )
