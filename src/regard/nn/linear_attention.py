"""Causal linear attention as a mixer: the plain baseline of everything recurrent.

    q, k, v = W_q h, W_k h, W_v h;   o = linear_attention(q, k, v);   output = W_o o       (`regard.ops.causal_linear_attention`)

Source: Katharopoulos et al. 2020 (arXiv 2006.16236).
"""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor

from regard._errors import at_least_one
from regard.nn.mixer import Mixer, State
from regard.nn.projections import Projections
from regard.ops.linear_attention import LinearState, causal_linear_attention


class LinearAttention(Projections, Mixer):
    """Multi-head causal linear attention with features elu + 1; positions come from the model.

    Args:
        width: of the tokens.
        heads: must divide `width`.
        chunk: tokens that are mixed by a masked product; any size gives the same numbers.

    Cost: 4 width^2 + width (chunk + 2 width / heads) multiplications a token. The state is one `dim x dim` matrix and one
    vector for each head.

    Raises:
        InputError: heads that do not divide, or a chunk below 1.

    >>> import torch
    >>> LinearAttention(width=32, heads=4)(torch.randn(2, 10, 32)).shape
    torch.Size([2, 10, 32])
    """

    def __init__(self, width: int, heads: int, *, chunk: int = 64) -> None:
        super().__init__(width, heads)
        at_least_one(chunk=chunk)
        self.chunk = chunk

    def forward(
        self,
        hidden: Float[Tensor, "batch tokens width"],
        *,
        valid: Bool[Tensor, "batch tokens"] | None = None,
        state: State | None = None,
    ) -> Float[Tensor, "batch tokens width"]:
        mixed, after = causal_linear_attention(
            *self.query_key_of(hidden),
            self.value_of(hidden),
            valid=valid,
            state=LinearState(**state) if state else None,
            chunk=self.chunk,
        )
        if state is not None:
            state.update(after._asdict())
        return self.output_of(mixed, hidden)
