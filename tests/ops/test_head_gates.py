"""Gates of a mixture of heads against their closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regard._errors import InputError
from regard.ops import (
    chosen_heads,
    head_gates,
    load_balance_loss,
    query_norm_logits,
    routed_gates,
    straight_through_gates,
)


def by_hand(
    shared: list[float], routed: list[float], split: list[float], active: int
) -> list[float]:
    """The released form, a sum at a time."""
    a = [math.exp(x) / sum(map(math.exp, shared)) for x in shared]
    p = [math.exp(x) / sum(map(math.exp, routed)) for x in routed]
    alpha = [math.exp(x) / sum(map(math.exp, split)) for x in split]
    on = sorted(range(len(p)), key=lambda i: p[i])[len(p) - active :]
    mass = sum(p[i] for i in on)
    first = [2 * alpha[0] * len(shared) * x for x in a]
    rest = [2 * alpha[1] * active * p[i] / mass if i in on else 0.0 for i in range(len(p))]
    if not routed:
        return [len(shared) * x for x in a]
    return first + rest if shared else [x / (2 * alpha[1]) for x in rest]


@pytest.mark.parametrize(
    ("shared", "routed", "active"), [(3, 5, 2), (0, 6, 4), (4, 0, 0), (1, 3, 3)]
)
def test_by_the_formula(shared: int, routed: int, active: int) -> None:
    always, sometimes, split = (
        torch.randn(2, 3, n, dtype=torch.float64) for n in (shared, routed, 2)
    )
    found = head_gates(always, sometimes, split, active)
    for b in range(2):
        for t in range(3):
            one = (part[b, t].tolist() for part in (always, sometimes, split))
            expected = by_hand(next(one), next(one), next(one), active)
            torch.testing.assert_close(found[b, t], torch.tensor(expected, dtype=torch.float64))


def test_equal_logits_leave_the_heads_as_they_are() -> None:
    found = head_gates(torch.zeros(7, 3), torch.zeros(7, 5), torch.zeros(7, 2), 2)
    assert torch.equal(found[:, :3], torch.ones(7, 3))
    assert torch.equal(found[:, 3:].sort(-1).values, torch.tensor([0, 0, 0, 1.0, 1]).expand(7, -1))


@given(st.integers(1, 7), st.integers(1, 7))
@settings(deadline=None)
def test_scale_is_kept(routed: int, active: int) -> None:
    active = min(active, routed)
    logits = torch.randn(11, routed)
    gates = routed_gates(logits, active)
    torch.testing.assert_close(gates.sum(-1), torch.full((11,), float(active)))
    assert torch.equal(gates > 0, chosen_heads(logits, active))
    assert (gates > 0).sum(-1).tolist() == [active] * 11


def test_loss_is_active_when_even_and_routed_when_one_head_takes_all() -> None:
    even = torch.eye(4).repeat(5, 1) * 3  # each head chosen by a quarter of the tokens
    torch.testing.assert_close(load_balance_loss(even, 1), torch.tensor(1.0))
    one = torch.tensor([50.0, 0, 0, 0]).expand(9, 4)
    torch.testing.assert_close(load_balance_loss(one, 1), torch.tensor(4.0))
    torch.testing.assert_close(load_balance_loss(torch.zeros(9, 4), 3), torch.tensor(3.0))


def test_loss_pushes_the_head_that_is_used_most() -> None:
    logits = torch.tensor([[2.0, 0.0, 0.0], [2.0, 1.0, 0.0], [0.0, 1.0, 0.0]], requires_grad=True)
    load_balance_loss(logits, 1).backward()
    assert logits.grad is not None
    assert (logits.grad[:, 0] > 0).all(), "less of the head that two of three tokens chose"
    probability = logits.detach().softmax(-1)
    share = torch.tensor([2 / 3, 1 / 3, 0.0])  # no gradient comes through these
    mean = (probability * share).sum(-1, keepdim=True)
    expected = 3 * probability * (share - mean) / 3
    torch.testing.assert_close(logits.grad, expected)


def test_loss_leaves_padding_out() -> None:
    logits, valid = torch.randn(2, 6, 4), torch.rand(2, 6) > 0.4
    alone = torch.stack(
        [row for row, real in zip(logits.flatten(0, 1), valid.flatten(), strict=True) if real]
    )
    torch.testing.assert_close(load_balance_loss(logits, 2, valid), load_balance_loss(alone, 2))


def test_straight_through() -> None:
    logits = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    gates = straight_through_gates(logits, 2)
    assert torch.equal(gates, chosen_heads(logits, 2).double()), "exactly 0 and 1"
    weight = torch.randn(5, 4, dtype=torch.float64)
    (found,) = torch.autograd.grad(gates, logits, weight)
    (expected,) = torch.autograd.grad(logits.softmax(-1), logits, weight)
    torch.testing.assert_close(found, expected)
    assert not straight_through_gates(logits.detach(), 2).requires_grad


def test_gradients_by_differences() -> None:
    logits = [torch.randn(3, n, dtype=torch.float64, requires_grad=True) for n in (2, 4, 2)]
    gates = lambda shared, routed, split: head_gates(shared, routed, split, 2)  # noqa: E731
    assert torch.autograd.gradcheck(gates, logits)


def test_query_norms() -> None:
    query = torch.randn(2, 5, 7, 3, dtype=torch.float64)
    found = query_norm_logits(query)
    for b in range(2):
        for t in range(7):
            norms = torch.stack([query[b, h, t].square().sum().sqrt() for h in range(5)])
            spread = ((norms - norms.mean()).square().sum() / 4).sqrt()
            torch.testing.assert_close(found[b, t], norms / spread)


def test_bad_input() -> None:
    with pytest.raises(InputError, match="active"):
        chosen_heads(torch.randn(3), 4)
    with pytest.raises(InputError, match="0 without routed heads"):
        head_gates(torch.zeros(2), torch.zeros(0), torch.zeros(2), 1)
    with pytest.raises(InputError, match="routed heads"):
        query_norm_logits(torch.randn(1, 1, 2, 3))
