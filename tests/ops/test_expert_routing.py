"""Gates, balance and mixture of experts against every expert on every token."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import silu

from regard._errors import InputError
from regard.ops import expert_balance, expert_gates, expert_mixture


def weights(experts=4, inner=6, width=5):
    kind = {"dtype": torch.float64}
    first = torch.randn(2, experts, inner, width, **kind).unbind()
    return *first, torch.randn(experts, width, inner, **kind)


def test_gates_are_a_softmax_over_the_chosen():
    logits = torch.randn(7, 4, dtype=torch.float64)
    gates = expert_gates(logits, 2)
    for row, gate in zip(logits, gates, strict=True):
        best = row.argsort(descending=True)[:2]
        torch.testing.assert_close(gate[best], row[best].softmax(0))
        assert int((gate > 0).sum()) == 2
    with pytest.raises(InputError, match="active"):
        expert_gates(logits, 5)


def test_the_mixture_is_the_dense_sum():
    gate, up, down = weights()
    hidden = torch.randn(20, 5, dtype=torch.float64)
    gates = expert_gates(torch.randn(20, 4, dtype=torch.float64), 2)
    gates[3] = 0
    dense = torch.stack(
        [(silu(hidden @ gate[e].T) * (hidden @ up[e].T)) @ down[e].T for e in range(4)], 1
    )
    expected = (gates[..., None] * dense).sum(1)
    torch.testing.assert_close(expert_mixture(hidden, gates, gate, up, down), expected)


def test_an_expert_sees_its_own_tokens_only():
    gate, up, down = weights()
    hidden = torch.randn(6, 5, dtype=torch.float64)
    gates = torch.zeros(6, 4, dtype=torch.float64)
    gates[:, 1] = 1
    gate[2] = torch.nan
    assert expert_mixture(hidden, gates, gate, up, down).isfinite().all()


def test_gradients():
    parts = [part.requires_grad_() for part in weights(3, 2, 2)]
    hidden = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    logits = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)

    def mixed(hidden, logits, *parts):
        return expert_mixture(hidden, expert_gates(logits, 2), *parts)

    assert torch.autograd.gradcheck(mixed, (hidden, logits, *parts))


def test_balance_by_the_formula_and_its_gradient_evens_out():
    logits = torch.randn(50, 4, dtype=torch.float64, requires_grad=True)
    valid = torch.rand(50) < 0.7
    gates = expert_gates(logits, 2)
    loss = expert_balance(gates, logits, valid)
    use = gates[valid].mean(0)
    torch.testing.assert_close(loss, 4 * (use * logits[valid].softmax(-1).mean(0)).sum() - 1)
    shift = torch.zeros(4, dtype=torch.float64)
    shift[2] = 5
    skewed = expert_gates(logits + shift, 2)
    assert expert_balance(skewed, logits + shift) > loss + 0.3
    (gradient,) = torch.autograd.grad(expert_balance(skewed, logits + shift), logits)
    assert (gradient.sum(0) > 0).tolist() == [False, False, True, False]


def test_even_use_costs_nothing():
    logits = 30 * torch.eye(4)[[0, 1, 2, 3, 2, 3, 0, 1]]
    assert abs(float(expert_balance(expert_gates(logits, 1), logits))) < 1e-6
