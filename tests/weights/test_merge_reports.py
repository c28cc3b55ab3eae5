"""Reports on masks and moments against counts by hand, SciPy and masks whose structure is known."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import spearmanr

from regard._errors import InputError
from regard.weights import (
    curvature_rank_correlation,
    curvature_similarity,
    mask_density,
    mask_density_by_layer,
    mask_structure,
)

MASKS = {
    "layers.0.self_attn.q_proj.weight": torch.tensor([[True, False]]),
    "layers.1.self_attn.q_proj.weight": torch.tensor([[False, False]]),
    "layers.0.mlp.up_proj.weight": torch.tensor([[True]]),
    "layers.0.mlp.down_proj.weight": torch.tensor([[False, False, True]]),
    "scale": torch.tensor([False]),
}


def test_density_by_role_and_layer() -> None:
    assert mask_density(MASKS) == {"query": 0.25, "feed-forward": 0.5, "other": 0.0}
    assert mask_density_by_layer(MASKS) == {
        (0, "query"): 0.5,
        (1, "query"): 0.0,
        (0, "feed-forward"): 0.5,
    }


def test_a_mask_of_whole_rows_is_not_like_chance() -> None:
    mask = torch.zeros(12, 10, dtype=torch.bool)
    mask[:3] = True
    found = mask_structure(mask)
    assert found.effective_rank == pytest.approx(1)
    assert found.empty == 9 / 22
    assert found.chance_empty == pytest.approx((12 * 0.75**10 + 10 * 0.75**12) / 22)
    assert found.chance_rank > 3
    assert mask_structure(torch.zeros(3, 2, dtype=torch.bool)).effective_rank == 0


def test_a_mask_without_structure_is_like_chance() -> None:
    generator = torch.Generator().manual_seed(1)
    masks = [torch.rand(40, 30, generator=generator) < 0.08 for _ in range(20)]
    found = [mask_structure(mask) for mask in masks]
    mean = {n: sum(getattr(f, n) for f in found) / 20 for n in ("empty", "chance_empty")}
    assert mean["empty"] == pytest.approx(mean["chance_empty"], abs=0.02)
    ranks = {n: sum(getattr(f, n) for f in found) / 20 for n in ("effective_rank", "chance_rank")}
    assert ranks["effective_rank"] == pytest.approx(ranks["chance_rank"], rel=0.03)


def test_curvature_by_cosine_and_by_ranks() -> None:
    first, second = (
        {"a": torch.rand(4, 5, generator=g), "b": torch.rand(7, generator=g)}
        for g in (torch.Generator().manual_seed(s) for s in (0, 1))
    )
    left, right = (torch.cat([v["a"].flatten(), v["b"]]) for v in (first, second))
    expected = left.sqrt() @ right.sqrt() / (left.sum() * right.sum()).sqrt()
    assert curvature_similarity(first, second) == pytest.approx(float(expected), abs=1e-6)
    ranks = spearmanr(left.numpy(), right.numpy()).statistic
    assert curvature_rank_correlation(first, second) == pytest.approx(ranks, abs=1e-9)
    louder = {name: 1e6 * moment for name, moment in first.items()}
    assert curvature_rank_correlation(first, louder) == pytest.approx(1)


def test_moments_that_do_not_fit() -> None:
    with pytest.raises(InputError, match="share no parameter names"):
        curvature_similarity({"a": torch.ones(2)}, {"b": torch.ones(2)})
    with pytest.raises(InputError, match=r"got \(2,\) and \(3,\)"):
        curvature_rank_correlation({"a": torch.ones(2)}, {"a": torch.ones(3)})
