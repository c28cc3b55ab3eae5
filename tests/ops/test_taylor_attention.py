"""Taylor attention against the masked quadratic form, in chunks and from a state."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from regard.ops.taylor_attention import separate_taylor_attention, taylor_attention


def draw(tokens: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(2, 2, tokens, size, generator=generator, dtype=torch.float64)
        for size in (4, 4, 3)
    )  # type: ignore[return-value]


def quadratic(query: Tensor, key: Tensor, value: Tensor, separate: bool) -> Tensor:
    """The weights themselves, one matrix an order."""
    products = query @ key.mT / 2
    orders = [w.tril() for w in (torch.ones_like(products), products, products**2 / 2)]
    if separate:
        return sum(w / w.sum(-1, keepdim=True) @ value for w in orders)  # type: ignore[return-value]
    weights = orders[0] + orders[1] + orders[2]
    return weights / weights.sum(-1, keepdim=True) @ value


@pytest.mark.parametrize("chunk", [1, 4, 100])
@pytest.mark.parametrize("separate", [False, True])
def test_recurrence_is_the_quadratic_form(chunk: int, separate: bool) -> None:
    query, key, value = draw(13)
    function = separate_taylor_attention if separate else taylor_attention
    found, _ = function(query, key, value, chunk=chunk)
    torch.testing.assert_close(found, quadratic(query, key, value, separate))


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 7), min_size=1, max_size=4), st.integers(0, 99))
def test_goes_on_from_a_state(sizes: list[int], seed: int) -> None:
    query, key, value = draw(sum(sizes), seed)
    state, parts = None, []
    for part in zip(*(one.split(sizes, 2) for one in (query, key, value)), strict=True):
        output, state = taylor_attention(*part, state=state, chunk=3)
        parts.append(output)
    torch.testing.assert_close(torch.cat(parts, 2), taylor_attention(query, key, value)[0])


def test_small_scores_give_softmax_attention() -> None:
    query, key, value = draw(12)
    dense = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=0.01
    )
    found, _ = taylor_attention(query, key, value, scale=0.01)
    torch.testing.assert_close(found, dense, atol=1e-4, rtol=0)
    assert not torch.equal(found, dense)


def test_outputs_lie_between_values() -> None:
    query, key, value = draw(12)
    found, _ = taylor_attention(30 * query, key, value)
    assert bool((found <= value.cummax(2).values + 1e-9).all())
    assert bool((found >= value.cummin(2).values - 1e-9).all())


def test_padding_is_as_if_it_were_not_there() -> None:
    query, key, value = draw(10)
    valid = torch.arange(10).expand(2, 10) >= 4
    noisy = [torch.where(valid[:, None, :, None], one, torch.inf) for one in (key, value)]
    found, _ = taylor_attention(query, *noisy, valid=valid, chunk=3)
    alone, _ = taylor_attention(query[:, :, 4:], key[:, :, 4:], value[:, :, 4:])
    torch.testing.assert_close(found[:, :, 4:], alone)
    assert found[:, :, :4].abs().max() == 0


def test_gradients() -> None:
    inputs = [one[:1, :1].requires_grad_() for one in draw(5)]
    assert torch.autograd.gradcheck(lambda *x: taylor_attention(*x, chunk=2)[0], inputs)


def test_half_precision_sums_in_float32() -> None:
    query, key, value = draw(600)
    found, state = taylor_attention(*(one.bfloat16() for one in (query, key, value)))
    assert found.dtype == torch.bfloat16 and state.second.dtype == torch.float32
    exact, _ = taylor_attention(query, key, value)
    assert (found.double() - exact).norm() / exact.norm() < 0.02
