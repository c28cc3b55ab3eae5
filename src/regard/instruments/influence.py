"""Future attention influence (FAI): how much later tokens look at a token.

FAI_s = mean over t in T(s) of A[t,s],  T(s) = {t : s + lo <= t <= s + hi}
(Attention Illuminates LLM Reasoning, arXiv 2510.13554: lo = 10; hi = 100 for training, the end of the text for analysis).
Where T(s) is empty (the last `lo` tokens) FAI is 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from regard._errors import InputError
from regard.engine import Block
from regard.instruments.base import SeriesInstrument, TokenMeasure


class FutureInfluence(SeriesInstrument):
    """FAI of every head at every token, `[heads, tokens]` for each sequence.

    Args:
        lo: nearest later query that counts, in tokens after the key.
        hi: farthest one; None for the end of the sequence.
        from_query: first query that counts (the first token of a response).

    Cost: one column sum of each block (shared with the sink instruments) and a band of `lo` columns; memory O(heads x tokens).
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
        tokens = block.call.queries + block.call.query_offset
        sums = self.series("sum", block, max(tokens, block.window.hi))
        counts = self.series("queries", block, max(tokens, block.window.hi), heads=1)
        first, last = int(block.positions[0]), int(block.positions[-1])
        low, high = block.window.lo, min(block.window.hi, last - self.lo + 1)
        if high <= low or last < self.from_query:
            return
        whole = low
        if self.hi is None and first >= self.from_query:
            whole = max(low, min(high, first - self.lo + 1))
            sums[..., low:whole] += block.received()[..., : whole - low] * block.share
            counts[..., low:whole] += self._rows(block)[:, None, None] * block.share
        if self.hi is not None:
            whole = max(low, first - self.hi)
        keys = torch.arange(whole, high, device=block.rows.device)
        apart = block.positions[:, None] - keys[None, :]
        band = (apart >= self.lo) & (block.positions >= self.from_query)[:, None]
        if self.hi is not None:
            band &= apart <= self.hi
        weights = block.weights[..., whole - low : high - low] * band
        if block.valid is not None:
            weights = weights * block.valid[:, None, :, None]
        sums[..., whole:high] += weights.sum(-2) * block.share
        rows = band.to(weights.dtype)[None]
        if block.valid is not None:
            rows = rows * block.valid[..., None]
        counts[..., whole:high] += rows.sum(1, keepdim=True) * block.share

    @staticmethod
    def _rows(block: Block) -> Tensor:
        if block.valid is None:
            return torch.full((1,), float(len(block.rows)), device=block.rows.device)
        return block.valid.sum(-1).to(block.weights.dtype)

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
