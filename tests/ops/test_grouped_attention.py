"""Grouped attention against float64 softmax attention under masks that are written down pair by pair."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from regard._errors import InputError
from regard.ops.grouped_attention import (
    group_visible,
    grouped_attention,
    shift_groups,
    unshift_groups,
    visible_pairs,
)


def by_rolling(tokens: int, size: int, *, shifted: bool, sinks: int, leak: bool) -> Tensor:
    """The visible pairs `[query, key]`, found by rolling token numbers and cutting, as LongLoRA words it."""
    seen = torch.zeros(tokens, tokens, dtype=torch.bool)
    order = list(range(tokens)) + [None] * (-tokens % size)
    if shifted:
        order = order[size // 2 :] + order[: size // 2]
    for start in range(0, len(order), size):
        group = order[start : start + size]
        for i, t in enumerate(group):
            for k in group[: i + 1]:
                if t is not None and k is not None and (leak or k <= t):
                    seen[t, k] = True
    for t in range(tokens):
        seen[t, : min(sinks, t + 1)] = True
    return seen


def dense(query: Tensor, key: Tensor, value: Tensor, seen: Tensor) -> Tensor:
    """Softmax attention, one query at a time; `seen` `[batch, heads, queries, keys]`."""
    output = query.new_zeros(*query.shape[:3], value.shape[-1])
    group = query.shape[1] // key.shape[1]
    for b in range(query.shape[0]):
        for h in range(query.shape[1]):
            for t in range(query.shape[2]):
                names = seen[b, h, t].nonzero()[:, 0]
                scores = key[b, h // group, names] @ query[b, h, t] / math.sqrt(query.shape[-1])
                output[b, h, t] = scores.softmax(0) @ value[b, h // group, names]
    return output


def tensors(heads: int, kv_heads: int, tokens: int, batch: int = 2) -> tuple[Tensor, ...]:
    query = torch.randn(batch, heads, tokens, 6, dtype=torch.float64)
    key, value = (torch.randn(batch, kv_heads, tokens, n, dtype=torch.float64) for n in (6, 5))
    return query, key, value


def masks(heads: int, shifted: int, tokens: int, size: int, sinks: int, leak: bool) -> Tensor:
    pair = [by_rolling(tokens, size, shifted=s, sinks=sinks, leak=leak) for s in (False, True)]
    return torch.stack([pair[h >= heads - shifted] for h in range(heads)])[None]


@pytest.mark.parametrize("leak", [False, True])
@pytest.mark.parametrize("sinks", [0, 1, 4])
@pytest.mark.parametrize("shifted", [0, 1, 3, 5, 6])
@pytest.mark.parametrize(("tokens", "kv_heads"), [(32, 6), (32, 2), (27, 3)])
def test_equals_dense_attention_under_the_same_mask(tokens, kv_heads, shifted, sinks, leak):
    query, key, value = tensors(6, kv_heads, tokens)
    seen = masks(6, shifted, tokens, 8, sinks, leak).expand(2, -1, -1, -1)
    found = grouped_attention(query, key, value, 8, shifted=shifted, sinks=sinks, leak=leak)
    torch.testing.assert_close(found, dense(query, key, value, seen), rtol=0, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(1, 60),
    half=st.integers(1, 12),
    sinks=st.integers(0, 6),
    shifted=st.booleans(),
    leak=st.booleans(),
)
def test_the_mask_by_positions_is_the_mask_by_rolling(tokens, half, sinks, shifted, leak):
    size = 2 * half
    positions = torch.arange(tokens)
    found = group_visible(
        positions[:, None],
        positions[None],
        tokens,
        size,
        shifted=shifted,
        sinks=sinks,
        leak=leak,
    )
    if size >= tokens:
        expected = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    else:
        expected = by_rolling(tokens, size, shifted=shifted, sinks=sinks, leak=leak)
    assert torch.equal(found, expected)
    pairs = visible_pairs(tokens, size, shifted=shifted, sinks=sinks, leak=leak)
    assert pairs == int(expected.sum())


def test_the_leak_is_where_the_card_of_the_method_puts_it():
    """16 tokens in groups of 4: the rolled heads let tokens 0 and 1 see 14 and 15."""
    positions = torch.arange(16)
    seen = group_visible(positions[:, None], positions[None], 16, 4, shifted=True, leak=True)
    future = [(t, k) for t, k in seen.nonzero().tolist() if k > t]
    assert future == [(0, 14), (0, 15), (1, 14), (1, 15)]


@pytest.mark.parametrize("leak", [False, True])
@pytest.mark.parametrize("sinks", [0, 4])
def test_only_the_leak_lets_the_end_reach_the_beginning(leak, sinks):
    query, key, value = tensors(4, 2, 32)
    changed = value.clone()
    changed[:, :, 28:] += 1  # the last half group
    settings = {"shifted": 2, "sinks": sinks, "leak": leak}
    moved = grouped_attention(query, key, changed, 8, **settings) - grouped_attention(
        query, key, value, 8, **settings
    )
    earlier = moved[:, :, :28].abs().amax((0, 2, 3))
    assert torch.equal(earlier > 0, torch.tensor([False, False, leak, leak]))
    assert bool((moved[:, 2:, :4].abs().amax(-1) > 0).all()) is leak
    assert float(moved[:, :, 4:28].abs().max()) == 0


@pytest.mark.parametrize("size", [32, 40])
@pytest.mark.parametrize("shifted", [0, 4])
def test_one_group_is_full_causal_attention(size, shifted):
    query, key, value = tensors(4, 2, 32)
    seen = torch.ones(32, 32, dtype=torch.bool).tril().expand(2, 4, -1, -1)
    found = grouped_attention(query, key, value, size, shifted=shifted, sinks=4, leak=True)
    torch.testing.assert_close(found, dense(query, key, value, seen), rtol=0, atol=1e-12)


@pytest.mark.parametrize("leak", [False, True])
def test_padding_behind_a_row_changes_nothing_but_its_own_end(leak):
    """A row of 21 tokens in a batch of 32 is what the same mask without the padding gives."""
    query, key, value = tensors(4, 2, 32)
    valid = torch.ones(2, 32, dtype=torch.bool)
    valid[1, 21:] = False
    seen = masks(4, 2, 32, 8, 4, leak).expand(2, -1, -1, -1) & valid[:, None, None, :]
    found = grouped_attention(query, key, value, 8, shifted=2, sinks=4, leak=leak, valid=valid)
    expected = dense(query, key, value, seen)
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(found[1, :, :21], expected[1, :, :21], rtol=0, atol=1e-12)
    assert bool(found.isfinite().all())


@pytest.mark.parametrize(("sinks", "leak"), [(0, True), (4, True), (4, False)])
def test_gradients_are_those_of_dense_attention(sinks, leak):
    ours = [x.requires_grad_() for x in tensors(4, 2, 20, batch=1)]
    theirs = [x.detach().clone().requires_grad_() for x in ours]
    weight = torch.randn(1, 4, 20, 5, dtype=torch.float64)
    grouped = grouped_attention(*ours, 8, shifted=2, sinks=sinks, leak=leak)
    (grouped * weight).sum().backward()
    (dense(*theirs, masks(4, 2, 20, 8, sinks, leak)) * weight).sum().backward()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=0, atol=1e-12)


@given(groups=st.integers(1, 5), size=st.integers(1, 9), shift=st.integers(0, 9))
def test_shifting_back_restores_the_order(groups, size, shift):
    states = torch.randn(2, 3, groups * size, 4)
    grouped = shift_groups(states, size, shift)
    assert grouped.shape == (2, groups, 3, size, 4)
    assert torch.equal(grouped[:, 0, :, 0], states[:, :, shift % (groups * size)])
    assert torch.equal(unshift_groups(grouped, shift), states)


def test_errors_name_what_was_given():
    query, key, value = tensors(4, 2, 32)
    with pytest.raises(InputError, match=r"size must be an even number of tokens.*got 7"):
        grouped_attention(query, key, value, 7)
    with pytest.raises(InputError, match=r"sinks must be 0\.\.4, half a group of 8, got 5"):
        grouped_attention(query, key, value, 8, sinks=5)
    with pytest.raises(InputError, match="shifted must be between 0 and the 4 heads, got 5"):
        grouped_attention(query, key, value, 8, shifted=5)
    with pytest.raises(InputError, match="size must be a divisor of the 32 tokens, got 5"):
        shift_groups(query, 5)
