"""Normalised attention: linear attention that is divided by a number learnt from the token alone.

    q, k, v = W_q h, W_k h, W_v h
    o_i = (1 / eta_i) sum_{j <= i} (q_i . k_j) v_j,      eta_i = e^{w . h_i + b}      (w, b for each head);   output = W_o o

There is no feature map and no scale, so products may be negative; eta depends on one token, not on its keys. As a linear system
it is `regard.ops.separable_system`. softplus and sigmoid of the same number are the alternatives that the source tries. The
exponent is held within +-10; w starts from N(0, 0.02^2), b from 0.

Source: Sieber et al. 2024, "Understanding the differences in Foundation Models" (arXiv 2405.15731). Its dropout on weights is
left out.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from regard._errors import InputError, at_least_one
from regard.nn.mixer import Mixer, State
from regard.nn.projections import Projections
from regard.ops.linear_attention import causal_product, wide

NORMALISERS: dict[str, Callable[[Tensor], Tensor]] = {
    "exp": torch.exp,
    "softplus": nn.functional.softplus,
    "sigmoid": torch.sigmoid,
}
BOUND = 10.0


class NormalisedAttention(Projections, Mixer):
    """Multi-head normalised attention; positions come from the model.

    Args:
        width: of the tokens.
        heads: must divide `width`.
        state_size: n, numbers of a query and key of a head; `width / heads` by default.
        normaliser: what makes eta: "exp", "softplus" or "sigmoid".
        chunk: tokens that are mixed by a masked product; any size gives the same numbers.

    Cost: 2 width (width + heads state_size) + width (chunk + 2 state_size) multiplications a token. The state is one
    `state_size x value_dim` matrix for each head.

    Raises:
        InputError: heads that do not divide, an unknown normaliser, a size below 1.

    >>> NormalisedAttention(width=32, heads=4)(torch.randn(2, 10, 32)).shape
    torch.Size([2, 10, 32])
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        state_size: int | None = None,
        normaliser: str = "exp",
        chunk: int = 64,
    ) -> None:
        super().__init__(width, heads, state_size=state_size)
        at_least_one(chunk=chunk)
        if normaliser not in NORMALISERS:
            raise InputError.unknown("normaliser", given=normaliser, known=NORMALISERS)
        self.normaliser, self.chunk = normaliser, chunk
        self.eta_proj = nn.Linear(width, heads)
        nn.init.normal_(self.eta_proj.weight, std=0.02)
        nn.init.zeros_(self.eta_proj.bias)

    def eta(
        self, hidden: Float[Tensor, "batch tokens width"]
    ) -> Float[Tensor, "batch heads tokens"]:
        """What the output of each token and head is divided by."""
        exponent = wide(self.eta_proj(hidden)).clamp(-BOUND, BOUND).transpose(1, 2)
        return NORMALISERS[self.normaliser](exponent)

    def forward(
        self,
        hidden: Float[Tensor, "batch tokens width"],
        *,
        valid: Bool[Tensor, "batch tokens"] | None = None,
        state: State | None = None,
    ) -> Float[Tensor, "batch tokens width"]:
        query, key = (wide(part) for part in self.query_key_of(hidden))
        if valid is not None:
            key = key.masked_fill(~valid[:, None, :, None], 0)
        before = state["memory"] if state else None
        value = wide(self.value_of(hidden))
        mixed, memory = causal_product(query, key, value, before=before, chunk=self.chunk)
        if state is not None:
            state["memory"] = memory
        return self.output_of(mixed / self.eta(hidden)[..., None], hidden)
