"""Titans: three ways to set a neural memory beside attention, which sees sharply but not far.

    as context:  in each segment S   h = M(q(S)) with the memory as the segment found it;   y = attention over [P | h | S]
                                     the memory is told y;                                  out = y (x) M(y)
    as gate:     y = window attention over [P | x], P always in sight;   m = memory(P | x);     out = y (x) m
    as layer:    out = window attention over memory(P | x)

with P learned tokens and y (x) m = W_o (sigmoid(RMSNorm(m)) * RMSNorm(y)).

All three are causal here, where the paper's drawings are not: as context, a token sees those h that come from tokens up to
itself, and reads M(y) from the memory as its own token leaves it, not from the one at the segment's end. As layer, the memory's
output is normalised before attention. Positions are rotary, and count learned tokens.

Source: Behrouz, Zhong and Mirrokni 2025, "Titans: Learning to Memorize at Test Time" (arXiv 2501.00663), section 4.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import pad

from regard._errors import at_least_one
from regard.attach.modules import HookedAttention
from regard.engine import DeferredMask
from regard.nn._visible import window_mask
from regard.nn.mixer import Mixer, State
from regard.nn.neural_memory import FastWeightMemory, NeuralMemory, PersistentTokens, part_of
from regard.nn.projections import check_heads, merge_heads, split_heads
from regard.nn.rotary import rotate
from regard.ops._slots import lay_out

Rule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class MemoryAsGate(Mixer):
    """Window attention and memory side by side; the memory gates (MAG).

    Args:
        width: of the tokens.
        heads: of the attention; must divide `width` into an even size.
        window: tokens that a token sees, itself included, besides the learned ones.
        persistent: learned tokens before the first.
        memory_heads: memories side by side; `heads` by default.
        memory: options of `NeuralMemory`: depth, expansion, chunk, momentum, decay, kernel, largest_step, clip.

    Cost: that of window attention and of the memory. The state is `window` keys and values, and the memory.

    Raises:
        InputError: heads that do not divide, a number out of range.

    >>> mixer = MemoryAsGate(width=32, heads=2, window=8)
    >>> mixer(torch.randn(2, 20, 32)).shape
    torch.Size([2, 20, 32])
    """

    positional = True

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        window: int = 64,
        persistent: int = 4,
        memory_heads: int | None = None,
        **memory: Any,
    ) -> None:
        super().__init__()
        self.attention = WindowAttention(width, heads, window=window, prefix=persistent)
        self.memory = FastWeightMemory(width, memory_heads or heads, **memory)
        self.persistent = PersistentTokens(width, persistent)
        self.combine = Combination(width)

    def forward(
        self,
        hidden: Float[Tensor, "batch tokens width"],
        *,
        valid: Bool[Tensor, "batch tokens"] | None = None,
        state: State | None = None,
    ) -> Float[Tensor, "batch tokens width"]:
        told, known, more = self.persistent(hidden, valid, state)
        with part_of(state, "attention") as part:
            attended = self.attention(told, known, part)
        with part_of(state, "memory") as part:
            read = self.memory(told, known, part)
        return self.combine(attended[:, more:], read[:, more:])


class MemoryAsLayer(Mixer):
    """The memory first, window attention over what it says (MAL).

    Args: as `MemoryAsGate`.

    Raises:
        InputError: heads that do not divide, a number out of range.

    >>> mixer = MemoryAsLayer(width=32, heads=2, window=8)
    >>> mixer(torch.randn(2, 20, 32)).shape
    torch.Size([2, 20, 32])
    """

    positional = True

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        window: int = 64,
        persistent: int = 4,
        memory_heads: int | None = None,
        **memory: Any,
    ) -> None:
        super().__init__()
        self.persistent = PersistentTokens(width, persistent)
        self.memory = NeuralMemory(width, memory_heads or heads, persistent=0, **memory)
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.attention = WindowAttention(width, heads, window=window)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(
        self,
        hidden: Float[Tensor, "batch tokens width"],
        *,
        valid: Bool[Tensor, "batch tokens"] | None = None,
        state: State | None = None,
    ) -> Float[Tensor, "batch tokens width"]:
        told, known, more = self.persistent(hidden, valid, state)
        with part_of(state, "memory") as part:
            read = self.memory(told, valid=known, state=part)
        with part_of(state, "attention") as part:
            attended = self.attention(self.norm(read), known, part)
        return self.o_proj(attended[:, more:])


class MemoryAsContext(Mixer, HookedAttention):
    """Attention within segments, to which the memory adds what it knows from earlier ones (MAC).

    Args:
        width: of the tokens.
        heads: of the attention; must divide `width` into an even size.
        segment: tokens that attention sees at once.
        persistent: learned tokens before each segment.
        memory_heads: memories side by side; `heads` by default.
        memory: options of `NeuralMemory`.

    Cost: 2 segment + persistent keys a token, and the memory, which is read twice. The state is a segment's keys and values
    twice, and the memory with its weights at the segment's start.

    Raises:
        InputError: heads that do not divide, a number out of range.

    >>> mixer = MemoryAsContext(width=32, heads=2, segment=8)
    >>> mixer(torch.randn(2, 20, 32)).shape
    torch.Size([2, 20, 32])
    """

    positional = True

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        segment: int = 32,
        persistent: int = 4,
        memory_heads: int | None = None,
        **memory: Any,
    ) -> None:
        super().__init__()
        check_heads(width, heads, even=True)
        at_least_one(segment=segment)
        self.heads, self.segment = heads, segment
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.memory = FastWeightMemory(width, memory_heads or heads, **memory)
        self.context_norm = nn.RMSNorm(width, eps=1e-6)
        self.persistent = PersistentTokens(width, persistent)
        self.combine = Combination(width)

    def forward(
        self,
        hidden: Float[Tensor, "batch tokens width"],
        *,
        valid: Bool[Tensor, "batch tokens"] | None = None,
        state: State | None = None,
    ) -> Float[Tensor, "batch tokens width"]:
        batch, tokens, _ = hidden.shape
        held = self._held(state, hidden)
        count = held["filled"].sum(1)
        slots = lay_out(valid, count, self.segment, tokens)
        rows = slots.gather(hidden, 1)
        with part_of(state, "memory") as part:
            memory: State = {} if part is None else part
            mixed = []
            for first, last in slots.parts:
                filled = (
                    torch.ones(batch, last - first, dtype=torch.bool, device=hidden.device)
                    if slots.filled is None
                    else slots.filled[:, first:last]
                )
                place = (slots.first + first) % self.segment
                attended = self._attend(rows[:, first:last], filled, place, held)
                known = None if slots.filled is None else filled
                read = self.memory(attended, known, memory)
                self._close(held, memory)
                mixed.append(self.combine(attended, read))
        if state is not None:
            state.update({f"segment.{name}": tensor for name, tensor in held.items()})
        return slots.scatter(torch.cat(mixed, 1), 1)

    def _held(self, state: State | None, hidden: Tensor) -> State:
        """The segment so far: keys and values of h and of S in their slots, and the memory's weights before it."""
        if state:
            front = "segment."
            return {k.removeprefix(front): state[k] for k in state if k.startswith(front)}
        batch, _, width = hidden.shape
        empty = hidden.new_zeros(batch, self.heads, 2 * self.segment, width // self.heads)
        held = {
            "key": empty,
            "value": empty,
            "filled": torch.zeros(batch, self.segment, dtype=torch.bool, device=hidden.device),
        }
        return held | {f"weights.{i}": w for i, w in enumerate(self.memory.empty(batch))}

    def _attend(self, segment: Tensor, filled: Tensor, place: int, held: State) -> Tensor:
        """Attention of some tokens of a segment over learned tokens, the memory's answers and the segment so far."""
        weights = [held[f"weights.{layer}"] for layer in range(len(self.memory.initial))]
        context = self.context_norm(self.memory.read(segment, weights))
        learned = self.persistent.tokens
        prefix = 0 if learned is None else len(learned)
        size, tokens = self.segment, segment.shape[1]
        here = torch.arange(place, place + tokens, device=segment.device)
        room = (0, 0, place, size - place - tokens)
        new = pad(filled, room[2:])
        mine = new.repeat(1, 2)[:, None, :, None]
        for name, projection in (("key", self.k_proj), ("value", self.v_proj)):
            both = [
                split_heads(projection(part), self.heads).to(held[name].dtype)
                for part in (context, segment)
            ]
            if name == "key":
                both = [rotate(both[0], prefix + here), rotate(both[1], prefix + size + here)]
            fresh = torch.cat([pad(part, room) for part in both], 2)
            held[name] = torch.where(mine, fresh, held[name])
        held["filled"] = held["filled"] | new
        key, value = (held[name][:, :, : size + place + tokens] for name in ("key", "value"))
        query = rotate(split_heads(self.q_proj(segment), self.heads), prefix + size + here)
        places = torch.arange(size, device=segment.device)
        up_to = held["filled"][:, None, :] & (places <= here[:, None])
        itself = (places == here[:, None]).expand_as(up_to)
        visible = torch.cat([up_to, up_to | itself], -1)[..., : size + place + tokens]
        if learned is not None:
            front = learned.expand(len(segment), -1, -1)
            first = rotate(
                split_heads(self.k_proj(front), self.heads), torch.arange(prefix, device=key.device)
            )
            key = torch.cat([first.to(key.dtype), key], 2)
            value = torch.cat([split_heads(self.v_proj(front), self.heads).to(key.dtype), value], 2)
            visible = pad(visible, (prefix, 0), value=True)
        mixed = self.attend(query, key, value, mask=visible[:, None], valid=filled)
        return merge_heads(mixed)

    def _close(self, held: State, memory: State) -> None:
        """Where a segment is full, the next one begins, with the memory as it is now."""
        full = held["filled"].all(1)
        if not bool(full.any()):
            return
        for layer, weight in enumerate(self.memory.weights(memory)):
            name = f"weights.{layer}"
            held[name] = torch.where(full[:, None, None, None], weight, held[name])
        held["filled"] = held["filled"] & ~full[:, None]


class Combination(nn.Module):
    """y (x) m = W_o (sigmoid(RMSNorm(m)) * RMSNorm(y)): what the memory says gates what attention says."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(width, eps=1e-6)
        self.memory_norm = nn.RMSNorm(width, eps=1e-6)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(
        self,
        attended: Float[Tensor, "batch tokens width"],
        read: Float[Tensor, "batch tokens width"],
    ) -> Float[Tensor, "batch tokens width"]:
        return self.o_proj(torch.sigmoid(self.memory_norm(read)) * self.attention_norm(attended))


class WindowAttention(HookedAttention):
    """Causal attention within a window of valid tokens, whose first `prefix` tokens all later ones see. Gives merged heads."""

    def __init__(self, width: int, heads: int, *, window: int, prefix: int = 0) -> None:
        super().__init__()
        check_heads(width, heads, even=True)
        at_least_one(window=window)
        self.heads, self.window, self.prefix = heads, window, prefix
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)

    def forward(
        self,
        hidden: Float[Tensor, "batch tokens width"],
        valid: Bool[Tensor, "batch tokens"] | None = None,
        state: State | None = None,
    ) -> Float[Tensor, "batch tokens width"]:
        batch, tokens, _ = hidden.shape
        if valid is None and state is None:
            return self._attend_alike(hidden)
        known = valid
        if known is None:
            known = torch.ones(batch, tokens, dtype=torch.bool, device=hidden.device)
        seen = (
            state["seen"] if state else torch.zeros(batch, dtype=torch.long, device=hidden.device)
        )
        positions = seen[:, None] + known.long().cumsum(1) - 1
        query, key, value = self._project(hidden)
        query, key = rotate(query, positions), rotate(key, positions)
        if state is not None:
            key, value, positions, known = self._remember(state, key, value, positions, known)
            state["seen"] = positions[:, -1] + 1

        def rule(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            column = positions[batch, key]
            near = (positions[batch, query] - column < self.window) | (column < self.prefix)
            return (key == query) | ((key < query) & near & known[batch, key])

        mask = _mask(rule, (batch, 1, tokens, key.shape[2]), known)
        mixed = self.attend(query, key, value, mask=mask, valid=valid, key_valid=known)
        return merge_heads(mixed)

    def _attend_alike(self, hidden: Tensor) -> Tensor:
        """Rows without padding from their first token on: one mask for all of them."""
        tokens = hidden.shape[1]
        query, key, value = self._project(hidden)
        positions = torch.arange(tokens, device=hidden.device)
        query, key = rotate(query, positions), rotate(key, positions)
        mask = window_mask(tokens, tokens, self.window, self.prefix)
        return merge_heads(self.attend(query, key, value, mask=mask))

    def _project(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = (
            split_heads(projection(hidden), self.heads)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        return query, key, value

    def _remember(
        self, state: State, key: Tensor, value: Tensor, positions: Tensor, known: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """All keys in sight; the first `prefix` and the newest `window - 1` valid ones stay in the state."""
        keep = self.prefix + self.window - 1
        if state:
            key = torch.cat([state["key"], key], 2)
            value = torch.cat([state["value"], value], 2)
            positions = torch.cat([state["positions"], positions], 1)
            known = torch.cat([state["valid"], known], 1)
        else:
            key, value = pad(key, (0, 0, keep, 0)), pad(value, (0, 0, keep, 0))
            positions, known = pad(positions, (keep, 0), value=-1), pad(known, (keep, 0))
        rank = torch.where(positions < self.prefix, positions.max() + 1, positions)
        rank = torch.where(known, rank, -1)
        newest = rank.topk(keep, dim=1).indices.sort(1).values
        state.update(
            key=key.take_along_dim(newest[:, None, :, None], 2),
            value=value.take_along_dim(newest[:, None, :, None], 2),
            positions=positions.gather(1, newest),
            valid=known.gather(1, newest),
        )
        return key, value, positions, known


def _mask(rule: Rule, shape: tuple[int, int, int, int], known: Tensor | None) -> DeferredMask:
    return DeferredMask(rule, shape, query_offset=shape[3] - shape[2], key_valid=known)  # pyright: ignore[reportCallIssue]
