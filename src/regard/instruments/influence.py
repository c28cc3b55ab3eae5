"""Future attention influence (FAI): how much later tokens look at a token.

FAI_s = mean over t in T(s) of A[t,s],  T(s) = {t : s + lo <= t <= s + hi}
(Attention Illuminates LLM Reasoning, arXiv 2510.13554: lo = 10; hi = 100 for training, the end of the text for analysis).
Where T(s) is empty (the last `lo` tokens) FAI is 0. Queries that cannot see the key (another packed document, beyond a sliding
window, padding) are not in T(s).
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from regard._errors import InputError
from regard.engine import Block, CausalMask
from regard.instruments.base import SeriesInstrument, TokenMeasure, slots_before


@lru_cache(maxsize=16)
def _triangle(
    rows: int, keys: int, diagonal: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """`[rows, keys]`: 1 where `row - key >= diagonal`."""
    with torch.inference_mode(False):
        return torch.ones(rows, keys, dtype=dtype, device=device).tril_(-diagonal)


class FutureInfluence(SeriesInstrument):
    """FAI of every head at every token, `[heads, tokens]` for each sequence.

    Args:
        lo: nearest later query that counts, in tokens after the key.
        hi: farthest one; None for the end of the sequence.
        from_query: first query slot that counts (where a response starts).

    Cost: one column sum of each block (shared with the sink instruments) and a band of `lo` columns; with `hi`, a band of
    `hi` columns instead. Memory O(heads x tokens).

    >>> import torch
    >>> from regard.engine import AttentionCall, Pipeline, attend
    >>> fai, zeros = FutureInfluence(lo=2), torch.zeros(1, 1, 4, 8)
    >>> _ = attend(AttentionCall.make(zeros, zeros, zeros), Pipeline([fai]))  # uniform rows
    >>> fai.compute().tensor()[0, 0]  # (1/3 + 1/4) / 2, 1/4, none, none
    tensor([0.2917, 0.2500, 0.0000, 0.0000])
    """

    states = {"sum": "list", "queries": "list"}

    def __init__(self, lo: int = 10, hi: int | None = None, from_query: int = 0) -> None:
        if lo < 0 or (hi is not None and hi < lo) or from_query < 0:
            raise InputError(
                f"FAI needs 0 <= lo <= hi and from_query >= 0, got lo={lo}, hi={hi}, from_query={from_query}"
            )
        super().__init__()
        self.lo, self.hi, self.from_query = lo, hi, from_query

    def weights(self, block: Block) -> None:
        if block.site.kind == "cross" or not block.site.causal:
            return
        before = slots_before(block.call)
        tokens = max(block.call.queries + block.call.query_offset, block.window.hi) + before
        sums = self.series("sum", block, tokens)
        counts = self.series("queries", block, tokens, heads=1)
        first, last = int(block.positions[0]), int(block.positions[-1])
        start, low = self.from_query - before, block.window.lo
        high = min(block.window.hi, last - self.lo + 1)
        if high <= low or last < start:
            return
        band = low  # keys low..band count for every row of the block, band..high for some
        if self.hi is None and first >= start:
            band = max(low, min(high, first - self.lo + 1))
            into = slice(low + before, band + before)
            sums[..., into] += block.received()[..., : band - low] * block.share
            counts[..., into] += self._rows(block, band)[:, None] * block.share
        elif self.hi is not None:
            band = max(low, first - self.hi)
        if band >= high:
            return
        pairs = self._pairs(block, band, high, start)
        into = slice(band + before, high + before)
        weights = block.weights[..., band - low : high - low]
        sums[..., into] += (weights * pairs[:, None]).sum(-2) * block.share
        counts[..., into] += pairs.sum(1, keepdim=True) * block.share

    def _pairs(self, block: Block, band: int, high: int, start: int) -> Tensor:
        """`[batch|1, rows, high - band]`: 1 where the query is in T(s) of the key."""
        simple = block.valid is None and isinstance(block.call.mask, CausalMask)
        first = int(block.positions[0])
        if simple and block.contiguous and self.hi is None and first >= start:
            shape = (len(block.rows), high - band, band - first + self.lo)
            return _triangle(*shape, block.weights.dtype, block.rows.device)[None]
        keys = torch.arange(band, high, device=block.rows.device)
        apart = block.positions[:, None] - keys[None, :]
        pairs = ((apart >= self.lo) & (block.positions >= start)[:, None])[None]
        if self.hi is not None:
            pairs = pairs & (apart <= self.hi)
        if block.visible is not None and not isinstance(block.call.mask, CausalMask):
            low = block.window.lo
            pairs = pairs & block.visible[..., band - low : high - low].any(1)
        if block.valid is not None:
            pairs = pairs & block.valid[:, :, None]
        return pairs.to(block.weights.dtype)

    @staticmethod
    def _rows(block: Block, band: int) -> Tensor:
        """How many rows of the block see each of the keys up to `band`, `[batch|1, 1|keys]`."""
        if band <= block.window.edge and block.valid is None:
            return torch.full((1, 1), float(len(block.rows)), device=block.rows.device)
        return block.seen[:, : band - block.window.lo]

    def compute(self) -> TokenMeasure:
        values = {}
        for key, sums in self.state["sum"].items():
            counts = self.state["queries"][key]
            values[key] = [s / n.clamp_min(1) for s, n in zip(sums, counts, strict=True)]
        reach = "the end" if self.hi is None else f"{self.hi} tokens later"
        return TokenMeasure(
            "FAI",
            "share",
            values,
            f"mean attention on the token from queries {self.lo} tokens later to {reach}",
        )
