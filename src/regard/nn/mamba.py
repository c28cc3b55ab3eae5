"""The Mamba block: a selective state-space memory behind a short convolution, and a gate beside it.

    x, z = W_in h;   x = silu(conv(x) + b);   Delta', B, C = W_x x;   Delta = softplus(W_d Delta' + b_d)
    y = selective_scan(x, Delta, a, B, C) + D x;      output = W_out (y * silu(z))

The inner width is twice that of the tokens, the convolution spans 4 of them, a channel's state is 16 numbers whose rates start
at -1 .. -16, and Delta' has a sixteenth of the width. `regard.nn.S6` is the memory alone, between the maps of attention.

Source: Gu and Dao 2023, "Mamba", arXiv 2312.00752.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import silu, softplus

from regard._errors import InputError, at_least_one
from regard.nn.mixer import Mixer, State
from regard.nn.neural_memory import ShortConvolution
from regard.nn.projections import check_heads
from regard.nn.selective_state_space import LONGEST, SHORTEST, first_steps
from regard.ops.linear_attention import wide
from regard.ops.selective_scan import selective_scan


class Mamba(Mixer):
    """A selective state-space block.

    Args:
        width: of the tokens.
        heads: must divide `width`, as everywhere; the block has no heads.
        state_size: numbers of a channel's state.
        kernel: tokens of the convolution.
        expansion: inner width, in widths.
        step_rank: width of Delta', width / 16 rounded up by default.
        steps: between which Delta starts, evenly on a logarithmic scale. Longer ones write more and forget sooner.

    Cost: with the defaults 6 width^2 + 2 width (2 step_rank + 32) multiplications a token for the maps, and those of
    `selective_scan` for its 32 width numbers. The state keeps one size: these, and the convolution's last 3 inputs.

    Raises:
        InputError: heads that do not divide, or a number below 1.

    >>> Mamba(width=32, heads=4)(torch.randn(2, 10, 32)).shape
    torch.Size([2, 10, 32])
    """

    positional = True

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        state_size: int = 16,
        kernel: int = 4,
        expansion: int = 2,
        step_rank: int | None = None,
        steps: tuple[float | int, float | int] | list[float | int] = (SHORTEST, LONGEST),
    ) -> None:
        super().__init__()
        check_heads(width, heads)
        rank = -(-width // 16) if step_rank is None else step_rank
        at_least_one(state_size=state_size, kernel=kernel, expansion=expansion, step_rank=rank)
        if not 0 < steps[0] <= steps[1]:
            raise InputError.of("steps", given=steps, expected="0 < shortest <= longest")
        inner = expansion * width
        self.sizes = [rank, state_size, state_size]
        self.in_proj = nn.Linear(width, 2 * inner, bias=False)
        self.convolution = ShortConvolution(inner, kernel)
        self.convolution_bias = nn.Parameter(torch.zeros(inner))
        self.x_proj = nn.Linear(inner, sum(self.sizes), bias=False)
        self.step_proj = nn.Linear(rank, inner)
        rates = torch.arange(1, state_size + 1, dtype=torch.get_default_dtype()).log()
        self.log_rate = nn.Parameter(rates.repeat(inner, 1))
        self.skip = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, width, bias=False)
        start = first_steps(inner, *steps)
        with torch.no_grad():
            self.step_proj.weight.uniform_(-(rank**-0.5), rank**-0.5)
            self.step_proj.bias.copy_(start)

    @property
    def rate(self) -> Float[Tensor, "inner state"]:
        """a."""
        return -wide(self.log_rate).exp()

    def forward(
        self,
        hidden: Float[Tensor, "batch tokens width"],
        *,
        valid: Bool[Tensor, "batch tokens"] | None = None,
        state: State | None = None,
    ) -> Float[Tensor, "batch tokens width"]:
        inputs, gate = self.in_proj(hidden).chunk(2, -1)
        inputs, tail = self.convolution(inputs, state["tail"] if state else None, valid)
        inputs = silu(inputs + self.convolution_bias)
        low, write, read = self.x_proj(inputs).split(self.sizes, -1)
        step = softplus(wide(self.step_proj(low)))
        if valid is not None:  # a step of no length neither fades nor writes
            step = step.masked_fill(~valid[..., None], 0)
        seen = wide(inputs)
        before = state["memory"] if state else None
        mixed, memory = selective_scan(seen, step, self.rate, wide(write), wide(read), before)
        if state is not None:
            state.update(tail=tail, memory=memory)
        mixed = (mixed + wide(self.skip) * seen).to(hidden.dtype)
        return self.out_proj(mixed * silu(gate))
