"""Selective state-space models as mixers: a memory whose decay and input share one step that the token chooses.

    q, k, v = W_q h, W_k h, W_v h            (C, B and the input of the state-space literature)
    Delta_i = softplus(W_d h_i + b)
    H_i = e^{a Delta_i} H_{i-1} + (Delta_i v_i) k_i^T,      o_i = H_i q_i + D v_i,      a < 0;      output = W_o o

`S6` has a Delta for each channel and an a for each channel and entry of the state (Mamba); `SSD` has one Delta and one a for each
head (Mamba-2), which makes it linear attention that fades (`regard.ops.decayed_linear_attention`). These are the cores alone,
between the maps that attention has too, so that both are compared under equal conditions: the convolution and the gate of a
Mamba block are left out.

Source: Gu and Dao 2023 (arXiv 2312.00752), Dao and Gu 2024 (arXiv 2405.21060); side by side with attention in arXiv 2405.15731.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from regard._errors import at_least_one
from regard.nn.mixer import Mixer, State
from regard.nn.projections import Projections, split_heads
from regard.ops.decayed_attention import decayed_linear_attention
from regard.ops.linear_attention import wide
from regard.ops.selective_scan import selective_scan

SHORTEST, LONGEST = 1e-3, 0.1
"""Steps start between these, evenly on a logarithmic scale."""


def first_steps(
    count: int, shortest: float | int = SHORTEST, longest: float | int = LONGEST
) -> Float[Tensor, " count"]:
    """Biases at which softplus gives steps that are drawn evenly on a logarithmic scale."""
    start = torch.empty(count).uniform_(math.log(shortest), math.log(longest)).exp()
    return start + torch.log(-torch.expm1(-start))  # softplus inverted


class _Selective(Projections, Mixer):
    """The step and the skip that both share; subclasses say how fast the memory fades at first, and how it runs."""

    positional = True

    log_rate: nn.Parameter

    def __init__(self, width: int, heads: int, *, state_size: int | None, steps: int) -> None:
        super().__init__(width, heads, state_size=state_size)
        self.step_proj = nn.Linear(width, steps)
        with torch.no_grad():
            self.step_proj.bias.copy_(first_steps(steps))
        self.skip = nn.Parameter(torch.ones(heads, width // heads))

    @property
    def rate(self) -> Float[Tensor, "heads #channels #state"]:
        """a."""
        return -wide(self.log_rate).exp()

    def step(
        self, hidden: Float[Tensor, "batch tokens width"]
    ) -> Float[Tensor, "batch heads tokens #channels"]:
        """Delta."""
        return split_heads(nn.functional.softplus(wide(self.step_proj(hidden))), self.heads)

    def query_key_value(
        self, hidden: Float[Tensor, "batch tokens width"]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q, k `[batch, heads, tokens, state_size]` and v `[batch, heads, tokens, value_dim]`, in float32 at least."""
        query, key = self.query_key_of(hidden)
        return wide(query), wide(key), wide(self.value_of(hidden))

    def run(
        self, query: Tensor, key: Tensor, value: Tensor, step: Tensor, memory: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Outputs without the skip, and the memory after the last token."""
        raise NotImplementedError

    def forward(
        self,
        hidden: Float[Tensor, "batch tokens width"],
        *,
        valid: Bool[Tensor, "batch tokens"] | None = None,
        state: State | None = None,
    ) -> Float[Tensor, "batch tokens width"]:
        query, key, value = self.query_key_value(hidden)
        step = self.step(hidden)
        if valid is not None:  # a step of no length neither fades nor writes
            step = step.masked_fill(~valid[:, None, :, None], 0)
        mixed, memory = self.run(query, key, value, step, state["memory"] if state else None)
        if state is not None:
            state["memory"] = memory
        return self.output_of(mixed + wide(self.skip)[:, None] * value, hidden)


class S6(_Selective):
    """The selective core of Mamba: every channel has its own step, every entry of its state its own rate.

    Args:
        width: of the tokens.
        heads: must divide `width`; each has its own q and k.
        state_size: n, entries of the state of a channel; `width / heads` by default.

    Cost: 3 width^2 + 2 width heads state_size multiplications a token for the maps, and those of `selective_scan` for the
    width x state_size numbers of its state.

    Raises:
        InputError: heads that do not divide, or a size below 1.

    >>> S6(width=32, heads=4)(torch.randn(2, 10, 32)).shape
    torch.Size([2, 10, 32])
    """

    def __init__(self, width: int, heads: int, *, state_size: int | None = None) -> None:
        super().__init__(width, heads, state_size=state_size, steps=width)
        rates = torch.arange(1, self.state_size + 1, dtype=torch.get_default_dtype()).log()
        self.log_rate = nn.Parameter(rates.repeat(heads, width // heads, 1))

    def run(
        self, query: Tensor, key: Tensor, value: Tensor, step: Tensor, memory: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        shape = value.shape[:2]
        query, key, value, step = (part.flatten(0, 1) for part in (query, key, value, step))
        rate = self.rate.repeat(shape[0], 1, 1)
        before = None if memory is None else memory.flatten(0, 1)
        read, last = selective_scan(value, step, rate, key, query, before)
        return read.unflatten(0, shape), last.unflatten(0, shape)


class SSD(_Selective):
    """The core of Mamba-2: one step and one rate for each head, so that its memory is a fading matrix.

    Args:
        width: of the tokens.
        heads: must divide `width`.
        state_size: n, numbers of q and k of a head; `width / heads` by default.
        chunk: tokens that are mixed by a masked product; any size gives the same numbers.

    Cost: 2 width (width + heads state_size) + width (chunk + 2 state_size) multiplications a token. The state is one
    `state_size x value_dim` matrix for each head.

    Raises:
        InputError: heads that do not divide, or a size below 1.

    >>> SSD(width=32, heads=4)(torch.randn(2, 10, 32)).shape
    torch.Size([2, 10, 32])
    """

    def __init__(
        self, width: int, heads: int, *, state_size: int | None = None, chunk: int = 64
    ) -> None:
        super().__init__(width, heads, state_size=state_size, steps=heads)
        at_least_one(chunk=chunk)
        self.log_rate = nn.Parameter(torch.empty(heads, 1, 1).uniform_(1, 16).log())
        self.chunk = chunk

    def run(
        self, query: Tensor, key: Tensor, value: Tensor, step: Tensor, memory: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        fade = (step * self.rate)[..., 0]
        return decayed_linear_attention(
            query, key, step * value, fade, memory=memory, chunk=self.chunk
        )
