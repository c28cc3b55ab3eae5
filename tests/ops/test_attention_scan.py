"""The scan against the softmax of every prefix, and the merge's algebra."""

from __future__ import annotations

import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from regard._errors import InputError
from regard.ops import Attended, attention_scan, attention_scan_step, merge_attention
from regard.ops.attention_scan import prefix_scan


def draw(
    *shape: int, dim: int = 5, scale: float = 1.0, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scores = scale * torch.randn(*shape, dtype=torch.float64, generator=generator)
    return scores, torch.randn(*shape, dim, dtype=torch.float64, generator=generator)


def by_softmax(scores: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """The softmax of every prefix, masked and dense."""
    tokens = scores.shape[-1]
    later = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
    rows = scores[..., None, :].expand(*scores.shape, tokens).masked_fill(later, -torch.inf)
    return rows.softmax(-1) @ value


@pytest.mark.parametrize("block", [1, 2, 7, 32, 64])
@pytest.mark.parametrize("scale", [1.0, 30.0, 300.0])
def test_scan_is_the_softmax_of_every_prefix(block: int, scale: float) -> None:
    scores, value = draw(2, 3, 45, scale=scale)
    found, state = attention_scan(scores, value, block=block)
    torch.testing.assert_close(found, by_softmax(scores, value), atol=1e-13, rtol=1e-12)
    assert torch.equal(state.maximum, scores.amax(-1))
    log = state.maximum + state.total.log()
    torch.testing.assert_close(log, scores.logsumexp(-1), atol=1e-12, rtol=1e-12)


def test_growing_scores_leave_early_prefixes_exact() -> None:
    scores = torch.arange(200, dtype=torch.float32) * 10
    value = torch.randn(200, 3)
    found, _ = attention_scan(scores, value, block=16)
    torch.testing.assert_close(found, by_softmax(scores, value))
    torch.testing.assert_close(
        attention_scan(scores.flip(0), value)[0], by_softmax(scores.flip(0), value)
    )


def test_steps_are_the_scan() -> None:
    scores, value = draw(2, 3, 20, scale=30)
    whole, end = attention_scan(scores, value)
    state = None
    for t in range(20):
        one, state = attention_scan_step(scores[..., t], value[..., t, :], state)
        torch.testing.assert_close(one, whole[..., t, :], atol=1e-13, rtol=1e-12)
    for mine, theirs in zip(state, end, strict=True):
        torch.testing.assert_close(mine, theirs)


def random_set(seed: int, scale: float) -> Attended:
    scores, value = draw(3, 7, scale=scale, seed=seed)
    return attention_scan(scores, value)[1]


@given(st.integers(0, 999), st.floats(0.1, 200))
def test_merging_is_associative_and_commutative(seed: int, scale: float) -> None:
    a, b, c = (random_set(seed + i, scale) for i in range(3))
    left, right = (
        merge_attention(merge_attention(a, b), c),
        merge_attention(a, merge_attention(b, c)),
    )
    for one, other in zip(left, right, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-12)
    for one, other in zip(merge_attention(a, b), merge_attention(b, a), strict=True):
        assert torch.equal(one, other)


def test_merged_halves_are_the_whole() -> None:
    scores, value = draw(3, 40, scale=10)
    halves = (attention_scan(scores[:, i::2], value[:, i::2])[1] for i in range(2))
    expected = (scores.softmax(-1)[:, None] @ value)[:, 0]
    torch.testing.assert_close(merge_attention(*halves).output(), expected, atol=1e-13, rtol=1e-12)


def test_scan_in_rounds_merges_every_prefix() -> None:
    sets = random_set(1, 5.0)
    sets = Attended(sets.maximum, sets.total, sets.weighted)
    found, so_far = prefix_scan(sets), None
    for k in range(3):
        one = Attended(*(part[k] for part in sets))
        so_far = one if so_far is None else merge_attention(so_far, one)
        for mine, theirs in zip(found, so_far, strict=True):
            torch.testing.assert_close(mine[k], theirs)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(1, 10))
def test_parts_are_the_whole(sizes: list[int], block: int) -> None:
    scores, value = draw(2, sum(sizes), scale=20)
    state, parts = None, []
    for s, v in zip(scores.split(sizes, -1), value.split(sizes, -2), strict=True):
        part, state = attention_scan(s, v, state, block=block)
        parts.append(part)
    torch.testing.assert_close(torch.cat(parts, -2), by_softmax(scores, value))


@pytest.mark.parametrize("block", [1, 4, 64])
def test_tokens_that_are_not_there_change_nothing(block: int) -> None:
    scores, value = draw(2, 30, scale=3)
    there = torch.rand(30) > 0.5
    there[:5] = False
    found, state = attention_scan(scores.masked_fill(~there, -torch.inf), value, block=block)
    alone, end = attention_scan(scores[:, there], value[:, there])
    torch.testing.assert_close(found[:, there], alone)
    assert not found[:, :5].any()
    for mine, theirs in zip(state, end, strict=True):
        torch.testing.assert_close(mine, theirs)
    empty = attention_scan_step(torch.full((2,), -torch.inf).double(), value[:, 0])[1]
    for mine, theirs in zip(merge_attention(empty, end), end, strict=True):
        assert torch.equal(mine, theirs)
    assert not merge_attention(empty, empty).output().any()


@pytest.mark.parametrize("block", [1, 3, 64])
def test_gradients_are_those_of_the_softmax(block: int) -> None:
    inputs = tuple(part.requires_grad_() for part in draw(2, 11, scale=4))
    weight = torch.randn(2, 11, 5, dtype=torch.float64)
    for mine, theirs in zip(
        torch.autograd.grad((attention_scan(*inputs, block=block)[0] * weight).sum(), inputs),
        torch.autograd.grad((by_softmax(*inputs) * weight).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, atol=1e-12, rtol=1e-10)
    assert torch.autograd.gradcheck(lambda s, v: attention_scan(s, v, block=block)[0], inputs)


def test_gradients_pass_through_the_state_and_past_missing_tokens() -> None:
    scores, value = draw(12)
    scores[2:5] = -torch.inf
    inputs = (scores.requires_grad_(), value.requires_grad_())

    def halves(scores: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        _, state = attention_scan(scores[:6], value[:6], block=4)
        return attention_scan(scores[6:], value[6:], state, block=4)[0]

    whole = torch.autograd.grad(attention_scan(*inputs)[0][6:].square().sum(), inputs)
    for mine, theirs in zip(
        torch.autograd.grad(halves(*inputs).square().sum(), inputs), whole, strict=True
    ):
        assert mine.isfinite().all()
        torch.testing.assert_close(mine, theirs)


def test_no_token_sees_the_future() -> None:
    scores, value = draw(50)
    other, more = scores.clone(), value.clone()
    other[30:] += 500
    more[30:] *= -9
    assert torch.equal(
        attention_scan(other, more, block=8)[0][:30], attention_scan(scores, value, block=8)[0][:30]
    )


def test_far_faster_than_a_loop_over_tokens() -> None:
    scores, value = torch.randn(8, 4096), torch.randn(8, 4096, 16)

    def seconds(work) -> float:
        start = time.process_time()
        work()
        return time.process_time() - start

    def loop() -> None:
        state = None
        for t in range(4096):
            _, state = attention_scan_step(scores[:, t], value[:, t], state)

    attention_scan(scores, value)
    quick = min(seconds(lambda: attention_scan(scores, value)) for _ in range(5))
    assert seconds(loop) > 20 * quick


def test_mistakes_are_named() -> None:
    scores, value = draw(4)
    with pytest.raises(InputError, match="block must be 1 or more, got 0"):
        attention_scan(scores, value, block=0)
    with pytest.raises(InputError, match="1 or more tokens"):
        attention_scan(scores[:0], value[:0])
