"""The delta rule as a mixer: a matrix for each head that overwrites what it holds for a key.

    q, k = normalised silu(conv(W h));  v = silu(conv(W_v h));  beta = sigmoid(w h)
    S_t = S_{t-1} (I - beta k k^T) + beta v k^T;   output = W_o RMSNorm(S_t q_t)            (`regard.ops.delta_rule`)

It is the neural memory of one layer with chunks of one token, without momentum and decay (2 theta = beta).
Source: Yang et al. 2024, "Parallelizing Linear Transformers with the Delta Rule" (arXiv 2406.06484).
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import normalize, silu

from regard.nn.mixer import Mixer, State
from regard.nn.neural_memory import ShortConvolution
from regard.nn.projections import check_heads, merge_heads, split_heads
from regard.ops.delta_rule import delta_rule


class DeltaRule(Mixer):
    """DeltaNet's layer.

    Args:
        width: of the tokens.
        heads: matrices side by side, each of `width / heads` dimensions.
        chunk: tokens at a time; it changes the speed only.
        kernel: tokens of the convolution of queries, keys and values.

    Cost: 4 width^2 multiplications a token and those of `regard.ops.delta_rule`. The state is one matrix a head.

    Raises:
        InputError: heads that do not divide.

    >>> mixer = DeltaRule(width=32, heads=2)
    >>> mixer(torch.randn(2, 10, 32)).shape
    torch.Size([2, 10, 32])
    """

    positional = True

    def __init__(self, width: int, heads: int, *, chunk: int = 32, kernel: int = 4) -> None:
        super().__init__()
        check_heads(width, heads)
        self.heads, self.chunk = heads, chunk
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.convolution = ShortConvolution(3 * width, kernel)
        self.beta_proj = nn.Linear(width, heads, bias=False)
        self.norm = nn.RMSNorm(width // heads, eps=1e-6)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(
        self,
        hidden: Float[Tensor, "batch tokens width"],
        *,
        valid: Bool[Tensor, "batch tokens"] | None = None,
        state: State | None = None,
    ) -> Float[Tensor, "batch tokens width"]:
        projected = torch.cat([self.q_proj(hidden), self.k_proj(hidden), self.v_proj(hidden)], -1)
        convolved, tail = self.convolution(projected, state.get("tail") if state else None, valid)
        precise = torch.promote_types(hidden.dtype, torch.float32)
        query, key, value = (
            split_heads(part, self.heads) for part in silu(convolved).to(precise).chunk(3, -1)
        )
        beta = torch.sigmoid(self.beta_proj(hidden).to(precise)).transpose(1, 2)
        if valid is not None:
            beta = beta * valid[:, None]
        read, matrix = delta_rule(
            normalize(query, dim=-1, eps=1e-6),
            normalize(key, dim=-1, eps=1e-6),
            value,
            beta,
            state.get("matrix") if state else None,
            chunk=self.chunk,
        )
        if state is not None:
            state.update(tail=tail, matrix=matrix)
        return self.o_proj(merge_heads(self.norm(read.to(hidden.dtype))))
