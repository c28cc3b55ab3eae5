"""Aaren as a mixer: softmax attention whose query is learned, not read from the token, so that it is a recurrence.

    q = W_q x (x learned, one for the layer);   s_j = q . W_k h_j / sqrt(d);   o_k = sum_{j <= k} softmax_j(s) W_v h_j
    output_k = W_o o_k

All prefixes come from one scan, and a new token changes a state of d + 2 numbers a head (`regard.ops.attention_scan`). What
a layer looks for cannot depend on the token, so that Aaren cannot look things up: a model of Aarens fails at recall.

Source: Feng et al. 2024, "Attention as an RNN" (arXiv 2405.13956). The model around it adds h_k to the output of token k. Since
q is one vector, q . W_k h_j = (W_k^T q) . h_j, and keys are never made.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from regard._errors import at_least_one
from regard.nn.mixer import Mixer, State
from regard.nn.projections import Projections
from regard.ops.attention_scan import Attended, attention_scan
from regard.ops.linear_attention import wide


class Aaren(Projections, Mixer):
    """Multi-head attention of one learned query over all tokens so far; positions come from the model.

    Args:
        width: of the tokens.
        heads: must divide `width`.
        block: tokens in a block of the scan; any size gives the same numbers.

    Cost: 2 width^2 + width (heads + block) multiplications a token, and 2 width^2 a call. The state is width / heads + 2
    numbers for each head.

    Raises:
        InputError: heads that do not divide, or a block below 1.

    >>> Aaren(width=32, heads=4)(torch.randn(2, 10, 32)).shape
    torch.Size([2, 10, 32])
    """

    def __init__(self, width: int, heads: int, *, block: int = 64) -> None:
        super().__init__(width, heads)
        at_least_one(block=block)
        self.block = block
        self.query = nn.Parameter(torch.randn(width))

    def forward(
        self,
        hidden: Float[Tensor, "batch tokens width"],
        *,
        valid: Bool[Tensor, "batch tokens"] | None = None,
        state: State | None = None,
    ) -> Float[Tensor, "batch tokens width"]:
        scores = wide(hidden @ self.key_of_query().T).transpose(1, 2)
        if valid is not None:
            scores = scores.masked_fill(~valid[:, None], -torch.inf)
        value = wide(self.value_of(hidden))
        mixed, after = attention_scan(
            scores, value, Attended(**state) if state else None, block=self.block
        )
        if state is not None:
            state.update(after._asdict())
        return self.output_of(mixed, hidden)

    def key_of_query(self) -> Float[Tensor, "heads width"]:
        """`W_k^T q / sqrt(d)`: a token's score with each head is its product with this."""
        query = self.q_proj(self.query).unflatten(0, (self.heads, -1))
        weight = self.k_proj.weight.unflatten(0, (self.heads, -1))
        return torch.einsum("hd,hdw->hw", query, weight) * query.shape[1] ** -0.5
