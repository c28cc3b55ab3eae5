"""Dynamic masks against sorting every prefix, and their attention against a dense masked one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regard._errors import InputError
from regard.ops import (
    dynamic_mask,
    dynamic_mask_attention,
    lifetimes,
    running_top_k,
    value_importance,
    value_importance_linear,
)


def by_sorting(scores: list[float], k: int) -> list[set[int]]:
    """The k highest of every prefix; of equal ones the newer."""
    order = lambda j: (scores[j], j)  # noqa: E731
    return [set(sorted(range(i + 1), key=order)[-k:]) for i in range(len(scores))]


def by_lifetimes(ends: torch.Tensor) -> list[set[int]]:
    return [{j for j in range(i + 1) if i < int(ends[j])} for i in range(len(ends))]


@given(st.lists(st.integers(0, 6), min_size=1, max_size=40), st.integers(1, 12))
@settings(deadline=None)
def test_the_highest_of_every_prefix_ties_included(scores: list[int], k: int) -> None:
    ends = running_top_k(torch.tensor(scores, dtype=torch.float32), k)
    assert by_lifetimes(ends) == by_sorting(list(map(float, scores)), k)


def test_rows_are_their_own() -> None:
    scores = torch.randn(3, 2, 65)
    ends = running_top_k(scores, 7)
    for b in range(3):
        for h in range(2):
            assert torch.equal(ends[b, h], running_top_k(scores[b, h], 7))
            assert by_lifetimes(ends[b, h]) == by_sorting(scores[b, h].tolist(), 7)


def test_rising_and_falling_scores() -> None:
    rising = torch.arange(9.0)
    assert running_top_k(rising, 3).tolist() == [3, 4, 5, 6, 7, 8, 9, 9, 9]  # a sliding window
    falling = running_top_k(-rising, 3)
    assert falling.tolist() == [9, 9, 9, 3, 4, 5, 6, 7, 8]  # the first three, for good
    assert running_top_k(torch.zeros(9), 3).tolist() == running_top_k(rising, 3).tolist()


def dense(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, importance: torch.Tensor, w: int
) -> torch.Tensor:
    """The definition: a score matrix with -inf outside the w most important keys so far."""
    group, tokens = query.shape[1] // key.shape[1], key.shape[2]
    queries = query.shape[2]
    bias = importance[:, :, None, :].expand(-1, -1, tokens, -1)
    bias = bias.masked_fill(~torch.ones(tokens, tokens, dtype=torch.bool).tril(), -torch.inf)
    kept = torch.full_like(bias, -torch.inf)
    best = bias.topk(min(w, tokens), -1).indices
    kept = kept.scatter(-1, best, bias.gather(-1, best))[:, :, tokens - queries :]
    scores = query @ key.repeat_interleave(group, 1).mT / query.shape[-1] ** 0.5
    weights = (scores + kept.repeat_interleave(group, 1)).softmax(-1)
    return weights @ value.repeat_interleave(group, 1)


Four = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def tensors(queries: int = 33, keys: int = 33) -> Four:
    torch.manual_seed(1)
    query = torch.randn(2, 6, queries, 4, dtype=torch.float64, requires_grad=True)
    key, value = (torch.randn(2, 3, keys, 4, dtype=torch.float64, requires_grad=True) for _ in "kv")
    importance = torch.randn(2, 3, keys, dtype=torch.float64, requires_grad=True)
    return query, key, value, importance


@pytest.mark.parametrize("block", [1, 7, 33, 128])
@pytest.mark.parametrize("window", [1, 5, 32, 33, 90])
def test_attention_by_the_definition(window: int, block: int) -> None:
    inputs = tensors()
    ends = lifetimes(inputs[3], window)
    found = dynamic_mask_attention(*inputs, ends, block=block)
    expected = dense(*inputs, window)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)
    weight = torch.randn_like(found)
    for one, other in zip(
        torch.autograd.grad(found, inputs, weight),
        torch.autograd.grad(expected, inputs, weight),
        strict=True,
    ):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-12)


def test_the_newest_queries_alone() -> None:
    inputs = tensors(queries=9)
    found = dynamic_mask_attention(*inputs, lifetimes(inputs[3], 6), block=4)
    torch.testing.assert_close(found, dense(*inputs, 6), atol=1e-12, rtol=1e-12)


def test_gradients_by_differences() -> None:
    inputs = [tensor[:1, :, :7].detach().requires_grad_() for tensor in tensors()]
    ends = lifetimes(inputs[3], 3)
    query, key, value, importance = inputs
    attend = lambda q, k, v, i: dynamic_mask_attention(q, k, v, i, ends, block=3)  # noqa: E731
    assert torch.autograd.gradcheck(attend, (query, key, value, importance))


def test_keys_outside_get_no_gradient() -> None:
    query, key, value, importance = tensors()
    window = 4
    ends = lifetimes(importance, window)
    dynamic_mask_attention(query, key, value, importance, ends).square().sum().backward()
    never = ends <= torch.arange(ends.shape[-1])
    assert never.any() and not never.all()
    assert key.grad is not None and importance.grad is not None and value.grad is not None
    for grad in (key.grad[never], value.grad[never], importance.grad[never]):
        assert not grad.any()
    assert importance.grad[~never].any()


def test_a_mask_is_the_lifetimes_of_its_rows() -> None:
    ends = lifetimes(torch.randn(2, 3, 20), 5)
    whole = dynamic_mask(ends, torch.arange(20))
    assert (whole.sum(-1) == torch.arange(1, 21).clamp(max=5)).all()
    assert not whole.triu(1).any()
    rows = torch.tensor([3, 11, 19])
    assert torch.equal(dynamic_mask(ends, rows), whole[:, :, rows])


def test_local_keys_are_seen_besides() -> None:
    importance = torch.randn(1, 1, 30)
    mask = dynamic_mask(lifetimes(importance, 4, local=3), torch.arange(30))
    alone = dynamic_mask(lifetimes(importance, 4), torch.arange(30))
    near = torch.ones(30, 30, dtype=torch.bool).tril() & ~torch.ones(30, 30, dtype=torch.bool).tril(
        -3
    )
    assert torch.equal(mask, alone | near)


def test_padding_pushes_nothing_out() -> None:
    importance = torch.randn(1, 2, 12)
    valid = torch.tensor([0, 0, 1, 1, 0, 1, 1, 1, 1, 0, 1, 1], dtype=torch.bool)
    mask = dynamic_mask(lifetimes(importance, 3, valid=valid.expand(1, 2, -1)), torch.arange(12))
    real = dynamic_mask(lifetimes(importance[..., valid], 3), torch.arange(int(valid.sum())))
    assert torch.equal(mask[:, :, valid][..., valid], real)
    assert not mask[:, :, valid][..., ~valid].any()
    assert mask.any(-1).all(), "padding sees itself"


def test_importance_by_the_formula() -> None:
    value, weight, rate = torch.randn(2, 3, 5, 4), torch.randn(3, 12), torch.randn(3)
    found = value_importance(value, weight, rate)
    for b in range(2):
        for c in range(3):
            for j in range(5):
                u = sum(
                    float(weight[c, 4 * h + d] * value[b, h, j, d])
                    for h in range(3)
                    for d in range(4)
                )
                step = torch.log1p(torch.tensor(u).exp())
                torch.testing.assert_close(
                    found[b, c, j], (rate[c] * step).exp(), atol=1e-5, rtol=1e-4
                )
    torch.testing.assert_close(value_importance_linear(value, weight, rate), found.log())
    assert value_importance(value.bfloat16(), weight, rate).dtype == torch.float32


def test_bad_input() -> None:
    with pytest.raises(InputError, match="k must be 1 or more"):
        running_top_k(torch.randn(4), 0)
    with pytest.raises(InputError, match=r"\[kv_heads, 12\]"):
        value_importance(torch.randn(2, 3, 5, 4), torch.randn(3, 11), torch.randn(3))
    query, key, value, importance = tensors()
    ends = lifetimes(importance, 4)
    with pytest.raises(InputError, match="newest of the keys"):
        dynamic_mask_attention(
            query, key[:, :, :9], value[:, :, :9], importance[..., :9], ends[..., :9]
        )
    with pytest.raises(InputError, match="block"):
        dynamic_mask_attention(query, key, value, importance, ends, block=0)
