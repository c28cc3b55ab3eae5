"""Merging operators against loops, closed forms and each other."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regard._errors import InputError
from regard.ops.merging import (
    curvature_mean,
    drop_and_rescale,
    elected_mean,
    fisher_saliency,
    graft_threshold,
    low_rank,
    rank_one,
)

F64 = torch.float64


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def test_rank_one_keeps_rank_one_and_sums():
    exact = torch.outer(draw(5).abs(), draw(7, seed=1).abs())
    torch.testing.assert_close(rank_one(exact), exact)
    other = draw(5, 7).square()
    found = rank_one(other)
    assert torch.linalg.matrix_rank(found) == 1
    torch.testing.assert_close(found.sum(0), other.sum(0))
    torch.testing.assert_close(found.sum(1), other.sum(1))
    assert not rank_one(torch.zeros(3, 2)).any()


def test_low_rank_is_exact_at_that_rank_and_never_negative():
    moment = (draw(6, 2).abs() @ draw(2, 5, seed=1).abs()).contiguous()
    torch.testing.assert_close(low_rank(moment, 2), moment)
    assert bool((low_rank(draw(6, 5).square(), 2) >= 0).all())
    with pytest.raises(InputError, match="rank"):
        low_rank(moment, 0)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1000), st.floats(0, 1))
def test_the_threshold_keeps_that_share_of_all_numbers_together(seed, density):
    parts = [draw(3, 4, seed=seed).square(), 100 * draw(9, seed=seed + 1).square()]
    least = graft_threshold(parts, density)
    kept = sum(int((part >= least).sum()) for part in parts)
    assert kept == int(density * 21 + 1e-9)


def test_the_threshold_is_that_of_sorting():
    parts = [draw(6), draw(2, 2, seed=1)]
    ordered = torch.cat([part.flatten() for part in parts]).sort(descending=True).values
    assert graft_threshold(parts, 0.3) == float(ordered[2])
    with pytest.raises(InputError, match="density"):
        graft_threshold(parts, 1.5)
    with pytest.raises(InputError, match="at least one"):
        graft_threshold([], 0.5)


def test_power_one_minimises_the_summed_quadratics():
    """With H diagonal, sum_t (w - w_t)^T H_t (w - w_t) is least where its gradient is 0; power 1/2 is not that point."""
    experts, curvature, base = draw(3, 40), draw(3, 40, seed=1).square() + 0.1, draw(40, seed=2)
    merged = base + curvature_mean(experts - base, curvature, power=1.0)
    gradient = (curvature * (merged - experts)).sum(0)
    assert float(gradient.abs().max()) < 1e-12
    half = base + curvature_mean(experts - base, curvature, power=0.5)
    assert float((curvature * (half - experts)).sum(0).abs().max()) > 0.1


def test_the_mean_by_a_loop_with_masks():
    edits, seconds = draw(3, 4, 5), draw(3, 4, 5, seed=1).square()
    masks = draw(3, 4, 5, seed=2) > 0.3
    seconds[:, 0, 0], masks[:, 0, 1] = 0.0, False
    found = curvature_mean(edits, seconds, masks)
    for row in range(4):
        for column in range(5):
            here = [t for t in range(3) if masks[t, row, column]]
            weights = [float(seconds[t, row, column]) ** 0.5 + 1e-26 for t in here]
            own = [float(edits[t, row, column]) for t in here]
            expected = (
                sum(w * d for w, d in zip(weights, own, strict=True)) / sum(weights) if here else 0
            )
            assert float(found[row, column]) == pytest.approx(expected, abs=1e-12)
    assert not found.isnan().any() and found[0, 1] == 0


def test_equal_curvature_is_the_plain_mean_and_scale_is_free():
    edits = draw(4, 6)
    torch.testing.assert_close(curvature_mean(edits, torch.full_like(edits, 1e-14)), edits.mean(0))
    seconds = draw(4, 6, seed=1).square()
    torch.testing.assert_close(
        curvature_mean(edits, seconds * 1e-12), curvature_mean(edits, seconds), atol=1e-9, rtol=1e-9
    )


def test_gradient_of_the_mean():
    edits, seconds = (
        draw(2, 3).requires_grad_(),
        (draw(2, 3, seed=1).square() + 0.1).requires_grad_(),
    )
    assert torch.autograd.gradcheck(curvature_mean, (edits, seconds))


def test_saliency_is_the_loss_of_reverting():
    curvature, edit = draw(8).square(), draw(8, seed=1)
    loss = 0.5 * (curvature * edit.square()).sum()
    torch.testing.assert_close(fisher_saliency(edit, curvature).sum() / 2, loss)


def test_the_elected_mean_by_a_loop():
    edits = draw(5, 20)
    edits[draw(5, 20, seed=1) > 0.5] = 0
    found = elected_mean(edits)
    for i in range(20):
        total = float(edits[:, i].sum())
        agreeing = [float(d) for d in edits[:, i] if float(d) * total > 0]
        expected = sum(agreeing) / len(agreeing) if agreeing else 0.0
        assert float(found[i]) == pytest.approx(expected)


def test_dropping_keeps_the_expectation():
    edit = draw(50)
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([drop_and_rescale(edit, 0.25, generator) for _ in range(4000)])
    assert float((draws != 0).double().mean()) == pytest.approx(0.25, abs=0.01)
    torch.testing.assert_close(draws.mean(0), edit, atol=0.15, rtol=0.15)
    with pytest.raises(InputError, match="density"):
        drop_and_rescale(edit, 0.0, generator)


def test_errors():
    with pytest.raises(InputError, match="power"):
        curvature_mean(torch.ones(1, 2), torch.ones(1, 2), power=0.0)
    with pytest.raises(InputError, match="at least 0"):
        curvature_mean(torch.ones(1, 2), -torch.ones(1, 2))
