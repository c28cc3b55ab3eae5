"""The parts of the experiment against independent computations."""

from __future__ import annotations

import numpy as np
import pytest

from regard.labs.mesa_optimization import MesaOptimization
from regard.papers import _mesa_optimization_runs as runs

SMALL = MesaOptimization(
    dimension=2, length=6, steps=30, sequences=40, seeds=2, tests=100, a=(0.2, 1.0), b=(0.2, 0.5)
)


def course(product: list[list[float]], limit: float) -> dict:
    """Ends of a b, `[seeds, starts]`, after a course that began at 0."""
    ends = np.array(product)
    return {"limit": limit, "product": [np.zeros_like(ends).tolist(), ends.tolist()]}


def test_the_worst_start_of_all_courses_is_shown():
    good = course([[1.0, 1.01], [1.0, 1.01]], 1.0)
    bad = course([[0.2, 0.22], [0.2, 0.22]], 0.2)
    one, shown = runs.worst([good, bad])
    assert one.measured == pytest.approx(1.1) and one.holds is False
    assert shown == "1.0000: 1.000, 1.010; 0.2000: 1.000, 1.100"
    assert runs.worst([good])[0].holds is True
    wide, _ = runs.worst([course([[0.9], [1.12]], 1.0)])
    assert wide.holds is None


def test_gap_and_drift_are_relative_to_the_larger_end():
    one = {
        "product": [[[4.0]], [[1.5]], [[0.2]]],
        "flow": [[[4.0]], [[1.1]], [[0.2]]],
        "balance": [[[0.0]], [[0.3]], [[-0.4]]],
    }
    assert runs.flow_gap(one) == pytest.approx(0.4 / 4)
    lab = MesaOptimization(a=(2.0,), b=(2.0,))
    assert runs.drift(one, lab) == pytest.approx(0.4 / 8)
    small = MesaOptimization(a=(0.1,), b=(0.1,))
    assert runs.drift(one, small) == pytest.approx(0.4 / (2 * small.limit))


def test_a_course_has_what_the_claims_read_and_repeats():
    one, two = runs.course(SMALL), runs.course(SMALL)
    assert one == two
    assert np.shape(one["product"]) == np.shape(one["flow"]) == (len(one["steps"]), 2, 2)
    assert np.shape(one["ratio"]) == np.shape(one["error"]) == (2, 2, 4)
    assert np.shape(one["loss"]) == (2, 2) and np.shape(one["gap"]) == (2, 2)
    assert np.shape(one["size"]["key"]) == (4, 4)
    np.testing.assert_allclose(np.array(one["product"])[0], [[0.04, 0.5]] * 2, rtol=1e-5)
    np.testing.assert_allclose(np.array(one["flow"])[0], [[0.04, 0.5]] * 2, rtol=1e-5)


def test_a_layer_of_two_scalars_is_a_step_of_descent():
    assert runs.exactness(SMALL, 20) < 1e-5
