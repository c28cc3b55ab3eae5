"""How far back heads look: mean attention distance and its clipped-window form WAAD.

distance_t = sum_s A[t,s] |t - s|;  WAAD_t = sum_s A[t,s] min(t - s, W)
(Attention Illuminates LLM Reasoning, arXiv 2510.13554: the head span d and WAAD with W = 10).

Row t belongs to the query *at* token t. WAAD only needs the W weights next to the diagonal:
WAAD_t = W sum_s A[t,s] - sum_{j<W} A[t,t-j] (W - j).
"""

from __future__ import annotations

import torch

from regard._errors import InputError
from regard.engine import Block
from regard.instruments.base import RowInstrument, SeriesInstrument, TokenMeasure, slots_before


class Distance(RowInstrument):
    """Mean attention distance in tokens for each head (absolute distance where attention is not causal).

    `from_query`: the first query that counts (the first token of a response, for the head span of arXiv 2510.13554).

    Cost: one matrix-vector pass for causal attention, two passes otherwise; memory O(heads). Cross-attention has no distance.

    >>> import torch
    >>> from regard.engine import AttentionCall, Pipeline, attend
    >>> distance, zeros = Distance(), torch.zeros(1, 1, 3, 8)
    >>> _ = attend(AttentionCall.make(zeros, zeros, zeros), Pipeline([distance]))  # uniform: 0, 1/2, 1
    >>> distance.compute()["distance"]["L0H0"]
    0.5
    """

    quantities = {"distance": ("tokens", "mean over query rows of sum_s A[t,s] |t - s|")}

    def __init__(self, from_query: int = 0) -> None:
        if from_query < 0:
            raise InputError.of("from_query", given=from_query, expected="0 or more")
        super().__init__()
        self.from_query = from_query

    def weights(self, block: Block) -> None:
        if block.site.kind == "cross":
            return
        dtype, start = block.weights.dtype, int(block.positions[0])
        position = (block.positions - start).to(
            dtype
        )  # counted from the block: no large numbers cancel
        slots = torch.arange(-start, block.call.keys - start, device=position.device, dtype=dtype)
        if block.site.causal:
            distance = position * block.mass - block.expect(slots)
        else:
            apart = (position[:, None] - slots[None, block.keys]).abs()
            distance = torch.einsum("bhqk,qk->bhq", block.weights, apart)
        late = (block.positions >= self.from_query)[None] if self.from_query else None
        self.add_rows(block, late, distance=distance)


class WAAD(SeriesInstrument):
    """Windowed average attention distance of every head at every token, `[heads, tokens]` for each sequence.

    Cost: reads `window` numbers for each row; memory O(heads x tokens). Defined for causal self-attention; other sites are left
    out, and padding and rows that were not sampled are NaN.

    >>> import torch
    >>> from regard.engine import AttentionCall, Pipeline, attend
    >>> waad, zeros = WAAD(window=2), torch.zeros(1, 1, 4, 8)
    >>> _ = attend(AttentionCall.make(zeros, zeros, zeros), Pipeline([waad]))  # uniform rows
    >>> waad.compute().tensor()[0, 0]  # 0, 1/2, (1 + 2)/3, (1 + 2 + 2)/4
    tensor([0.0000, 0.5000, 1.0000, 1.2500])
    """

    states = {"waad": "list"}

    def __init__(self, window: int = 10) -> None:
        if window < 1:
            raise InputError.of("window", given=window, expected="at least 1 token")
        super().__init__()
        self.window = window

    def weights(self, block: Block) -> None:
        if block.site.kind == "cross" or not block.site.causal:
            return
        near = torch.arange(self.window, 0, -1, device=block.rows.device, dtype=block.weights.dtype)
        waad = self.window * block.mass - block.diagonals(self.window) @ near
        before = slots_before(block.call)
        total = block.call.queries + block.call.query_offset + before
        held = self.series("waad", block, total, fill=float("nan"))
        if block.valid is not None:
            waad = waad.masked_fill(~block.valid[:, None], float("nan"))
        held[..., block.positions + before] = waad

    def compute(self) -> TokenMeasure:
        return TokenMeasure(
            "WAAD",
            "tokens",
            dict(self.state["waad"]),
            f"sum_s A[t,s] min(t - s, {self.window}) of the query at token t",
        )
