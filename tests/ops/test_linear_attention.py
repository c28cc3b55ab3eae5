"""Linear attention against its matrix of weights, in every form."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import elu

from regard._errors import InputError
from regard.ops import causal_linear_attention, linear_attention
from regard.ops.linear_attention import LinearState, causal_product, check_sequences

EPS = 1e-6


def draw(*shape: int, count: int = 3, seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(*shape, dtype=torch.float64, generator=generator) for _ in range(count)
    )


def by_weights(query, key, value, mask) -> torch.Tensor:
    """The same from the matrix of weights."""
    weights = (elu(query) + 1) @ (elu(key) + 1).transpose(2, 3) * mask
    return weights @ value / (weights.sum(-1, keepdim=True) + EPS)


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_causal_is_the_masked_matrix(chunk: int) -> None:
    query, key, value = draw(2, 3, 23, 5)
    mask = torch.ones(23, 23, dtype=torch.float64).tril()
    found, state = causal_linear_attention(query, key, value, chunk=chunk)
    torch.testing.assert_close(found, by_weights(query, key, value, mask), atol=1e-12, rtol=1e-12)
    phi = elu(key) + 1
    torch.testing.assert_close(state.memory, torch.einsum("bhnd,bhne->bhde", phi, value))
    torch.testing.assert_close(state.normaliser, phi.sum(2))


def test_every_query_sees_every_valid_key() -> None:
    query, key = draw(2, 3, 9, 5, count=2)
    (value,) = draw(2, 3, 9, 4, count=1, seed=1)
    valid = torch.rand(2, 9) > 0.4
    found = linear_attention(query[:, :, :6], key, value, valid=valid)
    expected = by_weights(query[:, :, :6], key, value, valid[:, None, None].double())
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(1, 10))
def test_parts_are_the_whole(sizes: list[int], chunk: int) -> None:
    query, key, value = draw(2, 1, sum(sizes), 3)
    valid = torch.arange(sum(sizes)).expand(2, -1) >= torch.tensor([[0], [2]])
    whole, end = causal_linear_attention(query, key, value, valid=valid)
    state, parts = None, []
    for q, k, v, real in zip(
        *(part.split(sizes, 2) for part in (query, key, value)), valid.split(sizes, 1), strict=True
    ):
        part, state = causal_linear_attention(q, k, v, valid=real, state=state, chunk=chunk)
        parts.append(part)
    assert state is not None
    torch.testing.assert_close(torch.cat(parts, 2), whole)
    torch.testing.assert_close(state.memory, end.memory)


def test_the_future_is_not_even_rounded_in() -> None:
    query, key, value = (part.float() for part in draw(1, 1, 30, 4))
    other = value.clone()
    other[:, :, 20:] *= 1e6
    before, _ = causal_linear_attention(query, key, value, chunk=8)
    after, _ = causal_linear_attention(query, key, other, chunk=8)
    assert torch.equal(before[:, :, :20], after[:, :, :20])
    assert not torch.equal(before[:, :, 20:], after[:, :, 20:])


def test_gradients() -> None:
    query, key, value = (part.requires_grad_() for part in draw(1, 2, 5, 3))
    before = tuple(part.requires_grad_() for part in draw(1, 2, 3, 3, count=1))
    assert torch.autograd.gradcheck(
        lambda q, k, v, b: causal_product(q, k, v, before=b, chunk=2), (query, key, value, *before)
    )
    state = LinearState(torch.ones(1, 2, 3, 3).double(), torch.ones(1, 2, 3).double())
    assert torch.autograd.gradcheck(
        lambda q, k, v: causal_linear_attention(q, k, v, state=state, chunk=2)[0],
        (query, key, value),
    )
    assert torch.autograd.gradcheck(linear_attention, (query, key, value))


def test_half_precision_is_summed_in_float32() -> None:
    query, key, value = (part.half() for part in draw(1, 1, 3000, 4))
    found, state = causal_linear_attention(query, key, value + 100)
    assert found.dtype == state.memory.dtype == torch.float32 and found.isfinite().all()
    assert state.memory.abs().max() > torch.finfo(torch.float16).max


def test_mistakes_are_named() -> None:
    query, key, value = draw(1, 1, 4, 2)
    with pytest.raises(InputError, match="chunk must be 1 or more, got 0"):
        causal_linear_attention(query, key, value, chunk=0)
    with pytest.raises(InputError, match="1 or more tokens"):
        linear_attention(query, key[:, :, :0], value[:, :, :0])
    with pytest.raises(InputError, match=r"\(1, 1, 4, 2\) and \(1, 1, 3, 2\)"):
        check_sequences(key, value[:, :, :3], None)
    with pytest.raises(InputError, match=r"got \(1, 3\)"):
        check_sequences(key, value, torch.ones(1, 3, dtype=torch.bool))
