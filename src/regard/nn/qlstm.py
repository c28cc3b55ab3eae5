"""A gated recurrence of one number a channel whose gates see the token, not the state: the quasi-LSTM.

    g, x = W_in h;   x = conv(x);   f, i, r = W_gates x
    c_t = forget(f_t) c_{t-1} + sigmoid(i_t) x_t;   output = W_out (gelu(g) * sigmoid(r_t) c_t)

`QLSTM` forgets by sigmoid(f), as an LSTM does; `ReversedQLSTM` by sigmoid(-f)^relu(alpha), alpha one learnt number from 1: the
form that the decay of a selective state-space model takes: e^{-alpha softplus(f)} = sigmoid(-f)^alpha. With alpha = 1 the two are
the same functions with f in place of -f; what the second adds is alpha, which lengthens or shortens every channel's memory at
once. An alpha at or below 0 forgets nothing and is no longer trained.

The inner width is twice that of the tokens, the convolution spans 4 tokens, weights start from N(0, 1 / fan_in).
Source: Sieber et al. 2024 (arXiv 2405.15731), section on qLSTM; Stanic et al. 2023 (arXiv 2309.11197).
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import gelu, logsigmoid

from regard.nn.mixer import Mixer, State
from regard.nn.neural_memory import ShortConvolution
from regard.nn.projections import check_heads
from regard.ops.linear_attention import wide
from regard.ops.linear_recurrence import linear_recurrence

EXPANSION = 2


class QLSTM(Mixer):
    """The quasi-LSTM.

    Args:
        width: of the tokens.
        heads: must divide `width`, as everywhere; the recurrence has no heads.
        kernel: tokens of the convolution.

    Cost: 18 width^2 multiplications a token, and 4 log2(tokens) + 12 width for the recurrence. The state is 2 width numbers and
    the tail of the convolution.

    Raises:
        InputError: heads that do not divide.

    >>> QLSTM(width=32, heads=4)(torch.randn(2, 10, 32)).shape
    torch.Size([2, 10, 32])
    """

    positional = True

    def __init__(self, width: int, heads: int, *, kernel: int = 4) -> None:
        super().__init__()
        check_heads(width, heads)
        inner = EXPANSION * width
        self.in_proj = nn.Linear(width, 2 * inner, bias=False)
        self.convolution = ShortConvolution(inner, kernel)
        self.gates_proj = nn.Linear(inner, 3 * inner)
        self.out_proj = nn.Linear(inner, width, bias=False)
        nn.init.zeros_(self.gates_proj.bias)
        for layer in (self.in_proj, self.gates_proj, self.out_proj):
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)

    def forget(self, gate: Tensor) -> Tensor:
        """The logarithm of what a channel keeps."""
        return logsigmoid(gate)

    def gates(self, seen: Float[Tensor, "batch tokens inner"]) -> tuple[Tensor, Tensor, Tensor]:
        """What each channel keeps, writes and shows, in float32 at least."""
        forget, write, read = wide(self.gates_proj(seen)).chunk(3, -1)
        return self.forget(forget).exp(), torch.sigmoid(write), torch.sigmoid(read)

    def recur(
        self,
        seen: Float[Tensor, "batch tokens inner"],
        valid: Bool[Tensor, "batch tokens"] | None = None,
        cell: Float[Tensor, "batch inner"] | None = None,
    ) -> tuple[Float[Tensor, "batch tokens inner"], Float[Tensor, "batch inner"]]:
        """The recurrence alone: what it shows for convolved inputs, and its cell after the last."""
        keep, write, read = self.gates(seen)
        written = write * wide(seen)
        if valid is not None:
            keep = keep.masked_fill(~valid[..., None], 1)
            written = written.masked_fill(~valid[..., None], 0)
        cells = linear_recurrence(keep, written, cell)
        return read * cells, cells[:, -1]

    def forward(
        self,
        hidden: Float[Tensor, "batch tokens width"],
        *,
        valid: Bool[Tensor, "batch tokens"] | None = None,
        state: State | None = None,
    ) -> Float[Tensor, "batch tokens width"]:
        gate, inputs = self.in_proj(hidden).chunk(2, -1)
        seen, tail = self.convolution(inputs, state.get("tail") if state else None, valid)
        shown, cell = self.recur(seen, valid, state.get("cell") if state else None)
        if state is not None:
            state.update(tail=tail, cell=cell)
        return self.out_proj(gelu(gate) * shown.to(hidden.dtype))


class ReversedQLSTM(QLSTM):
    """The quasi-LSTM that forgets as a selective state-space model does; arguments and cost as for `QLSTM`."""

    def __init__(self, width: int, heads: int, *, kernel: int = 4) -> None:
        super().__init__(width, heads, kernel=kernel)
        self.alpha = nn.Parameter(torch.ones(1, 1))  # for all tokens and channels

    def forget(self, gate: Tensor) -> Tensor:
        return wide(self.alpha).relu() * logsigmoid(-gate)
