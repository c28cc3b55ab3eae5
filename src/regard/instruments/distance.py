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
from regard.instruments.base import RowInstrument, SeriesInstrument, TokenMeasure


class Distance(RowInstrument):
    """Mean attention distance in tokens for each head (absolute distance where attention is not causal).

    Cost: one matrix-vector pass for causal attention, two passes otherwise; memory O(heads).

    >>> import torch
    >>> from regard.engine import AttentionCall, Pipeline, attend
    >>> distance, zeros = Distance(), torch.zeros(1, 1, 3, 8)
    >>> _ = attend(AttentionCall.make(zeros, zeros, zeros), Pipeline([distance]))  # uniform: 0, 1/2, 1
    >>> distance.compute()["distance"]["L0H0"]
    0.5
    """

    quantities = {"distance": ("tokens", "mean over query rows of sum_s A[t,s] |t - s|")}

    def weights(self, block: Block) -> None:
        if block.site.kind == "cross":
            return
        position = block.positions.to(block.weights.dtype)
        if block.site.causal or block.call.phase == "decode":
            distance = position * block.mass - block.mean_key
        else:
            keys = torch.arange(block.window.lo, block.window.hi, device=position.device)
            apart = (position[:, None] - keys[None, :]).abs()
            distance = torch.einsum("bhqk,qk->bhq", block.weights, apart)
        self.add_rows(block, distance=distance)


class WAAD(SeriesInstrument):
    """Windowed average attention distance of every head at every token, `[heads, tokens]` for each sequence.

    Cost: reads `window` numbers for each row; memory O(heads x tokens). Defined for causal self-attention.
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
        last = int(block.positions[-1]) + 1
        total = block.call.queries + block.call.query_offset
        held = self.series("waad", block, max(last, total), fill=float("nan"))
        if block.valid is not None:
            waad = waad.masked_fill(~block.valid[:, None], float("nan"))
        held[..., block.positions] = waad

    def compute(self) -> TokenMeasure:
        return TokenMeasure(
            "WAAD",
            "tokens",
            dict(self.state["waad"]),
            f"sum_s A[t,s] min(t - s, {self.window}) of the query at token t",
        )
