"""The delta rule in chunks against its definition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from regard._errors import InputError
from regard.ops import delta_rule


def tokens(count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    query, key = torch.randn(2, 2, 3, count, 4).double().unbind()
    value, beta = torch.randn(2, 3, count, 5).double(), 2 * torch.rand(2, 3, count).double()
    return query, normalize(key, dim=-1), value, beta


def loop(
    query: Tensor, key: Tensor, value: Tensor, beta: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    read = []
    for t in range(key.shape[2]):
        k, v, b = key[:, :, t, :, None], value[:, :, t, :, None], beta[:, :, t, None, None]
        state = state @ (torch.eye(4).double() - b * k @ k.mT) + b * v @ k.mT
        read.append((state @ query[:, :, t, :, None])[..., 0])
    return torch.stack(read, 2), state


@given(count=st.integers(1, 40), chunk=st.integers(1, 50), cut=st.integers(0, 40))
@settings(max_examples=25, deadline=None)
def test_equals_the_loop_for_any_chunk_and_any_split(count: int, chunk: int, cut: int) -> None:
    torch.manual_seed(count)
    told, state = tokens(count), torch.randn(2, 3, 5, 4).double()
    expected, end = loop(*told, state)
    parts, memory = [], state
    for some in (slice(0, min(cut, count)), slice(min(cut, count), count)):
        if some.stop > some.start:
            read, memory = delta_rule(*(part[:, :, some] for part in told), memory, chunk=chunk)
            parts.append(read)
    torch.testing.assert_close(torch.cat(parts, 2), expected, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(memory, end, atol=1e-10, rtol=1e-10)


def test_gradients() -> None:
    told = tuple(part[:1, :1].clone().requires_grad_() for part in tokens(7))
    assert torch.autograd.gradcheck(lambda *parts: delta_rule(*parts, chunk=3), told)


def test_full_strength_overwrites() -> None:
    query, key, value, beta = tokens(30)
    key[:, :, -1] = key[:, :, 3]
    _, state = delta_rule(query, key, value, torch.ones_like(beta))
    recalled = (state @ key[:, :, 3, :, None])[..., 0]
    torch.testing.assert_close(recalled, value[:, :, -1])


def test_strength_zero_leaves_the_matrix() -> None:
    query, key, value, beta = tokens(9)
    state = torch.randn(2, 3, 5, 4).double()
    read, after = delta_rule(query, key, value, 0 * beta, state)
    assert torch.equal(after, state)
    torch.testing.assert_close(read, query @ state.mT)


def test_bad_input_is_named() -> None:
    with pytest.raises(InputError, match="chunk must be 1 or more, got 0"):
        delta_rule(*tokens(3), chunk=0)
