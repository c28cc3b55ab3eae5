"""Neural long-term memory: a small network whose weights are written by gradient descent while a sequence is read.

    q, k = normalised silu(conv(W h));   v = silu(conv(W_v h))                      for each head
    theta = largest_step sigmoid(w h + b),   eta = sigmoid(..),   alpha = sigmoid(..)    step, momentum, decay of a token
    W_t, S_t: `regard.ops.fast_weight_scan` on |M(k_t) - v_t|^2, from learned weights W_0;   y_t = M_t(q_t)
    output = W_o (RMSNorm(y) * silu(W_g h))

`NeuralMemory` is the paper's LMM. Training differentiates through the memory's own gradient steps. `persistent` learned
tokens are read before the first. The paper leaves sizes open: convolutions of 4 tokens, an inner width of 4 dim, SiLU, gates
that start at theta = largest_step / 2, eta = 1/2 and little forgetting (alpha = 0.01), several heads. Against keys that repeat
within a chunk, which make its gradient steps too long, a token's gradient is bounded softly (`regard.ops.soft_clamp`).

Decay pulls the learned weights to zero too, and a memory of two layers that are both zero has no gradient: one that always
forgets is dead after some hundreds of tokens. Training has to keep alpha small where there is nothing to forget.

Source: Behrouz, Zhong and Mirrokni 2025, "Titans: Learning to Memorize at Test Time" (arXiv 2501.00663), section 3.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import normalize, silu

from regard._errors import InputError, at_least_one
from regard.nn.mixer import Mixer, State
from regard.nn.projections import check_heads, merge_heads, split_heads
from regard.ops._slots import lay_out
from regard.ops.fast_weights import FastWeights, fast_weight_scan, read_memory


class FastWeightMemory(nn.Module):
    """The memory and what writes it, without an output projection: the part that all of the paper's layers share.

    Args:
        width: of the tokens.
        heads: memories side by side, each of `width / heads` dimensions.
        depth: layers of the memory; 1 for a matrix.
        expansion: its inner width, in its outer.
        chunk: tokens whose gradients are taken at the same weights: more is faster, fewer is nearer to gradient descent token by
            token.
        momentum: whether surprise lasts.
        decay: whether the memory forgets.
        kernel: tokens of the convolution of queries, keys and values; 1 for none.
        largest_step: the bound of theta. At 0.5 the step of a matrix never overshoots a key of norm 1.
        clip: soft bound of a token's gradient; None for none.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        depth: int = 2,
        expansion: int = 4,
        chunk: int = 16,
        momentum: bool = True,
        decay: bool = True,
        kernel: int = 4,
        largest_step: float = 0.5,
        clip: float | None = 4.0,
    ) -> None:
        super().__init__()
        check_heads(width, heads)
        at_least_one(depth=depth, expansion=expansion, chunk=chunk, kernel=kernel)
        if largest_step <= 0:
            raise InputError.of("largest_step", given=largest_step, expected="above 0")
        self.heads, self.chunk, self.largest_step, self.clip = heads, chunk, largest_step, clip
        dim = width // heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.convolution = ShortConvolution(3 * width, kernel)
        self.step_gate = Gate(width, heads, start=0.5)
        self.momentum_gate = Gate(width, heads, start=0.5) if momentum else None
        self.decay_gate = Gate(width, heads, start=0.01) if decay else None
        sizes = [dim, *[expansion * dim] * (depth - 1), dim]
        layers = [
            torch.randn(heads, after, before) / before**0.5 for before, after in pairwise(sizes)
        ]
        layers[-1].zero_()  # so that an empty memory says nothing
        self.initial = nn.ParameterList(layers)

    def weights(self, state: State) -> list[Tensor]:
        """The memory's weights after the tokens of a state."""
        return [state[f"weights.{layer}"] for layer in range(len(self.initial))]

    def empty(self, batch: int) -> list[Tensor]:
        """The memory's weights before the first token."""
        return [_precise(weight).expand(batch, *weight.shape) for weight in self.initial]

    def read(
        self, hidden: Float[Tensor, "batch tokens width"], weights: list[Tensor]
    ) -> Float[Tensor, "batch tokens width"]:
        """What the memory says to tokens that it is not told: M(q), their queries without convolution."""
        query = normalize(
            _precise(silu(self.q_proj(hidden))).unflatten(-1, (self.heads, -1)), dim=-1
        )
        return merge_heads(read_memory(weights, query.transpose(1, 2))).to(hidden.dtype)

    def forward(
        self,
        hidden: Float[Tensor, "batch tokens width"],
        valid: Bool[Tensor, "batch tokens"] | None = None,
        state: State | None = None,
    ) -> Float[Tensor, "batch tokens width"]:
        """Tells the memory every token, and gives what it says to each right afterwards."""
        projected = torch.cat([self.q_proj(hidden), self.k_proj(hidden), self.v_proj(hidden)], -1)
        tail = state.get("tail") if state else None
        convolved, tail = self.convolution(projected, tail, valid)
        query, key, value = (
            split_heads(part, self.heads) for part in _precise(silu(convolved)).chunk(3, -1)
        )
        begun = self._begun(state, len(hidden))
        read, memory = fast_weight_scan(
            normalize(query, dim=-1, eps=1e-6),
            normalize(key, dim=-1, eps=1e-6),
            value,
            self.largest_step * self.step_gate(hidden),
            begun,
            momentum=None if self.momentum_gate is None else self.momentum_gate(hidden),
            decay=None if self.decay_gate is None else self.decay_gate(hidden),
            chunk=self.chunk,
            clip=self.clip,
            valid=valid,
        )
        if state is not None:
            state.update(tail=tail, count=memory.count)
            for name in ("weights", "surprise", "start"):
                state.update({f"{name}.{i}": w for i, w in enumerate(getattr(memory, name))})
        return merge_heads(read).to(hidden.dtype)

    def _begun(self, state: State | None, batch: int) -> FastWeights:
        if not state:
            return FastWeights.begin([_precise(weight) for weight in self.initial], batch)
        weights, surprise, start = (
            tuple(state[f"{name}.{layer}"] for layer in range(len(self.initial)))
            for name in ("weights", "surprise", "start")
        )
        return FastWeights(weights, surprise, start, state["count"])


class NeuralMemory(Mixer):
    """The memory as a layer of its own (LMM).

    Args:
        width: of the tokens.
        heads: memories side by side, each of `width / heads` dimensions.
        persistent: learned tokens before the first.
        memory: options of `FastWeightMemory`: depth, expansion, chunk, momentum, decay, kernel, largest_step, clip.

    Cost: 5 width^2 multiplications a token, and 8 a weight of the memory, of which there are
    2 expansion width^2 / heads at depth 2. The state holds the weights three times (as they are, as they move, as the chunk
    found them) and does not grow.

    Raises:
        InputError: heads that do not divide, a number out of range.

    >>> mixer = NeuralMemory(width=32, heads=2)
    >>> mixer(torch.randn(2, 10, 32)).shape
    torch.Size([2, 10, 32])
    """

    positional = True

    def __init__(self, width: int, heads: int, *, persistent: int = 4, **memory: Any) -> None:
        super().__init__()
        self.memory = FastWeightMemory(width, heads, **memory)
        self.persistent = PersistentTokens(width, persistent)
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.gate_proj = nn.Linear(width, width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(
        self,
        hidden: Float[Tensor, "batch tokens width"],
        *,
        valid: Bool[Tensor, "batch tokens"] | None = None,
        state: State | None = None,
    ) -> Float[Tensor, "batch tokens width"]:
        told, known, more = self.persistent(hidden, valid, state)
        read = self.norm(self.memory(told, known, state)[:, more:])
        return self.o_proj(read * silu(self.gate_proj(hidden)))


class Gate(nn.Module):
    """sigmoid(W h + b + logit(start)) for each head: a rate that begins near `start` and is learnt from there."""

    def __init__(self, width: int, heads: int, *, start: float) -> None:
        super().__init__()
        self.linear = nn.Linear(width, heads)
        nn.init.zeros_(self.linear.bias)
        self.logit = math.log(start / (1 - start))

    def forward(
        self, hidden: Float[Tensor, "batch tokens width"]
    ) -> Float[Tensor, "batch heads tokens"]:
        return torch.sigmoid(_precise(self.linear(hidden)) + self.logit).transpose(1, 2)


class PersistentTokens(nn.Module):
    """Learned tokens in front of a sequence: what a model knows whatever it reads."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        if count < 0:
            raise InputError.of("persistent", given=count, expected="0 or more")
        self.tokens = nn.Parameter(torch.randn(count, width)) if count else None

    def forward(
        self, hidden: Tensor, valid: Tensor | None, state: State | None
    ) -> tuple[Tensor, Tensor | None, int]:
        """The sequence with them in front unless a state has begun already, its validity, and how many there are."""
        if self.tokens is None or state:
            return hidden, valid, 0
        batch, count = len(hidden), len(self.tokens)
        if valid is not None:
            valid = torch.cat([valid.new_ones(batch, count), valid], 1)
        return torch.cat([self.tokens.expand(batch, -1, -1), hidden], 1), valid, count


class ShortConvolution(nn.Module):
    """A causal convolution of each channel by itself: y_t = sum_i w_i x_{t - kernel + 1 + i}, zeros before the first token."""

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, kernel).uniform_(-1, 1) / kernel**0.5)

    def forward(
        self,
        states: Float[Tensor, "batch tokens channels"],
        tail: Float[Tensor, "batch before channels"] | None = None,
        valid: Bool[Tensor, "batch tokens"] | None = None,
    ) -> tuple[Float[Tensor, "batch tokens channels"], Float[Tensor, "batch before channels"]]:
        """The convolution over valid tokens, after a tail of kernel - 1 earlier ones; and the new tail."""
        batch, tokens, channels = states.shape
        kernel = self.weight.shape[1]
        if tail is None:
            tail = states.new_zeros(batch, kernel - 1, channels)
        none = torch.zeros(batch, dtype=torch.long, device=states.device)
        slots = lay_out(valid, none, tokens, tokens)
        packed = torch.cat([tail, slots.gather(states, 1)], 1)
        count = packed.shape[1] - kernel + 1
        out = sum(packed[:, i : i + count] * self.weight[:, i] for i in range(kernel))
        assert isinstance(out, Tensor)
        if slots.filled is None:
            return out, packed[:, count:]
        newest = slots.filled.sum(1)[:, None] + torch.arange(kernel - 1, device=states.device)
        tail = torch.take_along_dim(packed, newest[..., None], 1)
        return slots.scatter(out, 1), tail


@contextmanager
def part_of(state: State | None, name: str) -> Iterator[State | None]:
    """The state of one part of a mixer, kept in the mixer's own under `name.`."""
    if state is None:
        yield None
        return
    front = name + "."
    inner = {key.removeprefix(front): state[key] for key in state if key.startswith(front)}
    yield inner
    state.update({front + key: tensor for key, tensor in inner.items()})


def _precise(states: Tensor) -> Tensor:
    """In float32 at least: sums over a whole sequence do not fit half precision."""
    return states.to(torch.promote_types(states.dtype, torch.float32))
