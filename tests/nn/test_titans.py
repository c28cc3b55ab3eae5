"""Titans' three layers against what their equations say, written out with dense attention and memories run from scratch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import regard
from regard._errors import InputError
from regard.instruments import Entropy
from regard.nn import (
    LanguageModel,
    LanguageModelConfig,
    MemoryAsContext,
    MemoryAsGate,
    MemoryAsLayer,
)
from regard.nn.projections import merge_heads, split_heads
from regard.nn.rotary import rotate
from regard.nn.titans import Combination, WindowAttention
from regard.ops import read_memory

WIDTH, HEADS, SEEN, LEARNED = 16, 2, 5, 3


def hidden(tokens: int = 22, batch: int = 2) -> Tensor:
    return torch.randn(batch, tokens, WIDTH).double()


def dense(attention: WindowAttention, states: Tensor) -> Tensor:
    """Window attention with a mask of all pairs."""
    count = states.shape[1]
    position = torch.arange(count)
    query, key, value = (
        split_heads(projection(states), HEADS)
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    scores = rotate(query, position) @ rotate(key, position).mT / (WIDTH // HEADS) ** 0.5
    distance = position[:, None] - position
    sight = (distance >= 0) & ((distance < attention.window) | (position < attention.prefix))
    return merge_heads(scores.masked_fill(~sight, -torch.inf).softmax(-1) @ value)


@pytest.mark.parametrize("prefix", [0, LEARNED])
def test_window_attention_sees_its_window_and_its_prefix(prefix: int) -> None:
    attention, states = WindowAttention(WIDTH, HEADS, window=SEEN, prefix=prefix).double(), hidden()
    torch.testing.assert_close(attention(states), dense(attention, states))


def combined(by: Combination, attended: Tensor, read: Tensor) -> Tensor:
    def norm(states: Tensor, scale: Tensor) -> Tensor:
        return scale * states / (states.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    gate = torch.sigmoid(norm(read, by.memory_norm.weight))
    return by.o_proj(gate * norm(attended, by.attention_norm.weight))


def test_the_gate_is_the_memory() -> None:
    mixer, states = (
        MemoryAsGate(WIDTH, HEADS, window=SEEN, persistent=LEARNED, chunk=4).double(),
        hidden(),
    )
    assert mixer.persistent.tokens is not None
    told = torch.cat([mixer.persistent.tokens.expand(2, -1, -1), states], 1)
    expected = combined(mixer.combine, dense(mixer.attention, told), mixer.memory(told))
    torch.testing.assert_close(mixer(states), expected[:, LEARNED:])


def test_the_layer_attends_to_what_the_memory_says() -> None:
    mixer, states = (
        MemoryAsLayer(WIDTH, HEADS, window=SEEN, persistent=LEARNED, chunk=4).double(),
        hidden(),
    )
    assert mixer.persistent.tokens is not None
    told = torch.cat([mixer.persistent.tokens.expand(2, -1, -1), states], 1)
    expected = mixer.o_proj(dense(mixer.attention, mixer.norm(mixer.memory(told))))
    torch.testing.assert_close(mixer(states), expected[:, LEARNED:])


def test_the_context_comes_from_the_memory_of_earlier_segments() -> None:
    size = SEEN
    mixer = MemoryAsContext(WIDTH, HEADS, segment=size, persistent=LEARNED, chunk=4).double()
    states, learned = hidden(), mixer.persistent.tokens
    assert learned is not None
    told: list[Tensor] = []
    found = []
    for part in states.split(size, 1):
        weights = mixer.memory.empty(2)
        if told:
            state: dict[str, Tensor] = {}
            mixer.memory(torch.cat(told, 1), state=state)
            weights = mixer.memory.weights(state)
        asked = torch.nn.functional.normalize(
            torch.nn.functional.silu(mixer.memory.q_proj(part)).unflatten(-1, (HEADS, -1)), dim=-1
        )
        context = mixer.context_norm(merge_heads(read_memory(weights, asked.transpose(1, 2))))
        count = part.shape[1]
        rows = torch.cat([learned.expand(2, -1, -1), context, part], 1)
        own = torch.arange(count)
        positions = torch.cat([torch.arange(LEARNED), LEARNED + own, LEARNED + size + own])
        key = rotate(split_heads(mixer.k_proj(rows), HEADS), positions)
        query = rotate(split_heads(mixer.q_proj(part), HEADS), LEARNED + size + own)
        causal = torch.ones(count, count).tril().bool()
        sight = torch.cat([torch.ones(count, LEARNED).bool(), causal, causal], 1)
        scores = (query @ key.mT / (WIDTH // HEADS) ** 0.5).masked_fill(~sight, -torch.inf)
        attended = merge_heads(scores.softmax(-1) @ split_heads(mixer.v_proj(rows), HEADS))
        told.append(attended)
        read = mixer.memory(torch.cat(told, 1))[:, -count:]
        found.append(combined(mixer.combine, attended, read))
    torch.testing.assert_close(mixer(states), torch.cat(found, 1))


@pytest.mark.parametrize("kind", [MemoryAsContext, MemoryAsGate, MemoryAsLayer])
def test_memory_reaches_beyond_the_window_and_segment(kind: type) -> None:
    mixer, states = kind(WIDTH, HEADS, chunk=4).double(), hidden(tokens=200)
    other = states.clone()
    other[:, 3] += 1
    assert (mixer(other) - mixer(states))[:, -1].abs().max() > 1e-9


@pytest.mark.parametrize("kind", [MemoryAsContext, MemoryAsGate, MemoryAsLayer])
def test_the_state_does_not_grow(kind: type) -> None:
    mixer, state = kind(WIDTH, HEADS, chunk=4).double(), {}
    mixer(hidden(tokens=3), state=state)
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    mixer(hidden(tokens=90), state=state)
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == shapes


@pytest.mark.parametrize("kind", [MemoryAsContext, MemoryAsGate, MemoryAsLayer])
def test_padding_in_the_middle_changes_nothing(kind: type) -> None:
    mixer, states = kind(WIDTH, HEADS, chunk=4).double(), hidden(tokens=60)
    valid = torch.rand(2, 60, generator=torch.Generator().manual_seed(3)) > 0.4
    state: dict[str, Tensor] = {}
    noisy = torch.where(valid[..., None], states, 50.0)
    pieces = zip(noisy.split([26, 1, 14, 19], 1), valid.split([26, 1, 14, 19], 1), strict=True)
    found = torch.cat([mixer(part, valid=known, state=state) for part, known in pieces], 1)
    for row in range(2):
        alone = mixer(states[row : row + 1, valid[row]])
        torch.testing.assert_close(found[row, valid[row]], alone[0], atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("name", ["memory_as_context", "memory_as_gate", "memory_as_layer"])
def test_instruments_see_the_attention_part(name: str) -> None:
    config = LanguageModelConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, mixers=[name])
    model, entropy = LanguageModel(config).eval(), Entropy()
    ids = torch.randint(50, (2, 40))
    plain = model(ids).logits
    with regard.attach(model, entropy):
        assert torch.allclose(model(ids).logits, plain, atol=1e-5)
    assert entropy.compute() is not None


def test_bad_options_are_named() -> None:
    with pytest.raises(InputError, match="window must be 1 or more, got 0"):
        MemoryAsGate(16, 2, window=0)
    with pytest.raises(InputError, match="segment must be 1 or more, got 0"):
        MemoryAsContext(16, 2, segment=0)
    with pytest.raises(InputError, match="depth"):
        MemoryAsLayer(16, 2, depth=0)
