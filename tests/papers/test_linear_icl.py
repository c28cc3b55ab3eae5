"""The parts of the experiment against independent computations."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from regard.papers import _linear_icl_runs as runs

SMALL = runs.Size(dimension=2, examples=6, width=8, layers=2, steps=3, batch=4)


def test_a_query_sees_the_examples_before_it_and_nothing_else():
    torch.manual_seed(0)
    model = runs.Reader(SMALL, 6).eval()
    shown, queries = torch.randn(3, 6, 3), torch.randn(3, 2, 2)
    after = torch.tensor([2, 5])
    with torch.no_grad():
        before = model(shown, queries, after)
        late = shown.clone()
        late[:, 2:] += 1
        changed = model(late, queries, after)
        torch.testing.assert_close(changed[:, 0], before[:, 0])
        assert (changed[:, 1] - before[:, 1]).abs().min() > 1e-6
        other = queries.clone()
        other[:, 1] += 1
        torch.testing.assert_close(model(shown, other, after)[:, 0], before[:, 0])
        alone = model(shown[:, :2], queries[:, :1], after[:1])
        torch.testing.assert_close(alone, before[:, :1])


def test_training_the_reader_repeats():
    one, two = (runs.reader(SMALL, [1.0, 4.0], (3, 6), 250, 5) for _ in range(2))
    assert one == two
    assert len(one["scales"]) == len(one["lengths"]) == 2 and min(one["scales"]) > 0


def test_the_moments_of_cubic_labels_agree_with_sampling():
    found = runs.cubic_labels((2.0, 1.0), 10, 8, 60_000, 0.5)
    assert found["here"] == pytest.approx(found["theory"], abs=1.5 * found["bar"])
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((2_000_000, 2)) * np.sqrt([2.0, 1.0]), np.array([0.6, -0.4])
    s = float(w @ np.diag([2.0, 1.0]) @ w)
    moved = np.diag([2.0, 1.0]) @ w
    spread = np.cov((x * ((x @ w) ** 3)[:, None]).T)
    expected = 15 * s**3 * np.diag([2.0, 1.0]) + 81 * s**2 * np.outer(moved, moved)
    np.testing.assert_allclose(spread, expected, rtol=0.06, atol=0.06 * np.abs(expected).max())


def test_every_start_below_the_bound_arrives():
    shares = runs.starts((1.5, 1.0), 20, (0.5, 0.9), 4, 40.0)
    assert shares["theorem"] == [100.0, 100.0]
    assert len(shares["indefinite"]) == 2


def test_queries_orthogonal_to_the_prompt_get_nothing():
    found = runs.other_queries((1.0, 1.0, 1.0), 500)
    assert found["orthogonal"] < 1e-12
    assert found["N = M = 20"] == pytest.approx(found["20 theory"], abs=2 * found["20 bar"])
