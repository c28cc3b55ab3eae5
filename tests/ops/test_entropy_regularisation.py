"""The entropy band against loops written from the algorithm, and against closed forms."""

from __future__ import annotations

import math

import pytest
import torch

from regard._errors import InputError
from regard.ops import (
    attention_entropy,
    causal_ceiling,
    entropic_overload,
    head_entropy_penalty,
    row_entropy_penalty,
)

F64 = torch.float64


def maps(batch: int = 2, heads: int = 3, rows: int = 7, sharpness: float = 3.0) -> torch.Tensor:
    torch.manual_seed(0)
    scores = sharpness * torch.randn(batch, heads, rows, rows, dtype=F64)
    hidden = torch.ones(rows, rows, dtype=torch.bool).triu(1)
    return scores.masked_fill(hidden, -math.inf).softmax(-1)


def test_entropy_of_one_key_and_of_all():
    torch.testing.assert_close(
        attention_entropy(torch.eye(5, dtype=F64)), torch.zeros(5, dtype=F64)
    )
    uniform = torch.ones(6, 6, dtype=F64).tril() / torch.arange(1, 7, dtype=F64)[:, None]
    expected = torch.arange(1, 7, dtype=F64).log()
    torch.testing.assert_close(attention_entropy(uniform), expected, atol=1e-7, rtol=0)
    torch.testing.assert_close(causal_ceiling(6).double(), expected, atol=1e-6, rtol=0)


def test_entropy_has_a_gradient_at_weights_of_zero():
    scores = torch.tensor([[3.0, -1.0, -math.inf]], requires_grad=True)
    attention_entropy(scores.softmax(-1)).sum().backward()
    assert scores.grad is not None and bool(scores.grad.isfinite().all())
    assert torch.autograd.gradcheck(
        lambda s: attention_entropy(s.softmax(-1)), torch.randn(3, 4, dtype=F64, requires_grad=True)
    )


@pytest.mark.parametrize("causal", [False, True])
def test_penalties_by_the_algorithm(causal):
    weights = maps()
    batch, heads, rows, _ = weights.shape
    levels, tolerance = torch.tensor([0.5, 0.1, 0.9], dtype=F64), 0.2
    ceiling = [math.log(i + 1) if causal else math.log(rows) for i in range(rows)]
    found, by_rows, by_heads = attention_entropy(weights), 0.0, 0.0
    for h in range(heads):
        level = float(levels[h])
        for b in range(batch):
            for i in range(rows):
                delta = float(found[b, h, i]) - level * ceiling[i]
                by_rows += delta**2 / heads if abs(delta) > tolerance * ceiling[i] else 0
        highest = sum(ceiling) / rows
        delta = float(found[:, h].mean()) - level * highest
        by_heads += delta**2 / heads if abs(delta) > tolerance * highest else 0
    given = torch.tensor(ceiling, dtype=F64) if causal else None
    options = {"tolerance": tolerance, "ceiling": given}
    assert by_rows > 0 and by_heads > 0
    assert float(row_entropy_penalty(found, levels, **options)) == pytest.approx(by_rows)
    assert float(head_entropy_penalty(found, levels, **options)) == pytest.approx(by_heads)


def test_inside_the_band_nothing_is_paid_and_nothing_learnt():
    top = math.log(10)
    entropy = torch.full((2, 1, 10), 0.6 * top, dtype=F64, requires_grad=True)
    for penalty in (head_entropy_penalty, row_entropy_penalty):
        inside = penalty(entropy, torch.tensor([0.5], dtype=F64))
        assert inside.detach() == 0
        assert not torch.autograd.grad(inside, entropy)[0].any()
    outside = head_entropy_penalty(entropy, torch.tensor([0.2], dtype=F64))
    torch.testing.assert_close(outside.detach(), torch.tensor((0.4 * top) ** 2, dtype=F64))


def test_levels_move_towards_the_entropy():
    entropy = torch.full((1, 2, 8), 0.9, dtype=F64) * math.log(8)
    levels = torch.tensor([0.5, 0.95], dtype=F64, requires_grad=True)
    head_entropy_penalty(entropy, levels).backward()
    assert levels.grad is not None
    assert float(levels.grad[0]) < 0 and float(levels.grad[1]) == 0


def test_overload_counts_every_head_once():
    shares = entropic_overload(torch.tensor([[0.0, 1.0, 2.0], [3.0, 3.9, 4.0]]))
    torch.testing.assert_close(shares, torch.tensor([1.0, 1.0, 1.0, 3.0]) / 6)
    with pytest.raises(InputError, match="above 0"):
        entropic_overload(torch.zeros(1, 2))


def test_a_negative_tolerance_is_refused():
    with pytest.raises(InputError, match="tolerance"):
        head_entropy_penalty(torch.ones(1, 1, 4), torch.ones(1), tolerance=-0.1)
