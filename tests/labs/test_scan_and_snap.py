"""The one-layer model against autograd through real attention, and the theorems against small exact cases."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from regard._errors import InputError
from regard.labs import scan_and_snap as lab
from regard.labs.scan_and_snap import ScanAndSnap, follow, make_classes, motion

WEIGHTS = [0.05, 0.1, 0.15, 0.2, 0.3]


def random_state(classes: lab.Classes, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng, size = np.random.default_rng(seed), classes.probability.shape[1]
    return rng.standard_normal((size, size)), rng.standard_normal((classes.rows, size))


def log_likelihood(
    decoder: torch.Tensor, row: torch.Tensor, tokens: torch.Tensor, label: int
) -> torch.Tensor:
    """The definition: softmax over positions, token masses, l2 norm, decoder, softmax."""
    weights = torch.softmax(row[tokens], 0)
    onehot = torch.nn.functional.one_hot(tokens, len(row)).double()
    mass = onehot.mT @ weights
    return (decoder @ (mass / mass.norm())).log_softmax(0)[label]


def test_the_batch_gradient_is_that_of_softmax_attention_over_positions():
    random = torch.Generator().manual_seed(0)
    size, rows, batch, length = 9, 3, 5, 14
    decoder = torch.randn(2, size, size, dtype=torch.float64, generator=random).requires_grad_()
    attention = torch.randn(2, rows, size, dtype=torch.float64, generator=random).requires_grad_()
    tokens = torch.randint(size, (2, batch, length), generator=random)
    last = torch.randint(rows, (2, batch), generator=random)
    label = torch.randint(size, (2, batch), generator=random)
    total = torch.stack(
        [
            torch.stack(
                [
                    log_likelihood(
                        decoder[r], attention[r, last[r, b]], tokens[r, b], int(label[r, b])
                    )
                    for b in range(batch)
                ]
            ).mean()
            for r in range(2)
        ]
    )
    expected = torch.autograd.grad(total.sum(), (decoder, attention))
    seen = torch.nn.functional.one_hot(tokens, size).sum(2).double()
    loss, found = lab.sample_gradient(decoder.detach(), attention.detach(), seen, last, label)
    torch.testing.assert_close(loss, -total.detach())
    torch.testing.assert_close(found, expected)


def test_the_long_sequence_velocity_is_the_gradient_of_the_mean_log_likelihood():
    classes = make_classes(2, 2, [1.0, 2.0], [1.0, 3.0])
    y, z = (torch.tensor(part, requires_grad=True) for part in random_state(classes))
    total = torch.zeros(())
    for n, (m, label) in enumerate(zip(classes.last, classes.label, strict=True)):
        mass = torch.softmax(z[m] + torch.tensor(classes.probability[n]).log(), 0)
        total = total + (y @ (mass / mass.norm())).log_softmax(0)[label] / 4
    to_y, to_z = torch.autograd.grad(total, (y, z))
    found = motion(y.detach().numpy(), z.detach().numpy(), classes, np.array(2.0), np.array(0.5))
    np.testing.assert_allclose(found.decoder, 2.0 * to_y.numpy(), atol=1e-12)
    np.testing.assert_allclose(found.attention, 0.5 * to_z.numpy(), atol=1e-12)


def test_long_sequences_have_the_long_sequence_gradient():
    classes = make_classes(2, 1, [1.0], [1.0, 3.0])
    y, z = random_state(classes, 1)
    limit = motion(y, z, classes, np.array(1.0), np.array(1.0))
    length = 400_000
    seen = torch.as_tensor(classes.probability * length)[None]
    seen = torch.poisson(seen, generator=torch.Generator().manual_seed(0))
    last, label = (torch.as_tensor(part)[None] for part in (classes.last, classes.label))
    _, (to_y, to_z) = lab.sample_gradient(
        torch.as_tensor(y)[None], torch.as_tensor(z)[None], seen, last, label
    )
    np.testing.assert_allclose(to_y[0], limit.decoder, atol=5e-3)
    np.testing.assert_allclose(to_z[0], limit.attention, atol=5e-3)


def test_runs_of_one_batch_do_not_mix():
    classes = make_classes(3, 1, [1.0], [1.0, 2.0])
    times, rates = np.array([0.0, 5.0, 20.0]), np.array([1.0, 3.0])
    for step in (None, 0.5):
        both = follow(classes, rates, 0.1 * rates, times, step=step)
        alone = follow(classes, *np.array([[3.0], [0.3]]), times, step=step)
        np.testing.assert_allclose(both.attention[:, 1:], alone.attention, rtol=1e-4, atol=1e-9)
        np.testing.assert_allclose(both.drive[:, 1:], alone.drive, rtol=1e-4, atol=1e-9)


def test_z_is_conserved_and_the_common_token_falls_by_the_exact_law():
    classes = make_classes(6, 1, [0.2], [0.1, 0.2, 0.5])
    times = np.linspace(0, 200, 400)
    course = follow(classes, np.array(2.0), np.array(0.5), times)
    assert np.abs(course.attention.sum(-1)).max() < 1e-6 * np.abs(course.attention).max() + 1e-9
    mass = lab.token_mass(course.attention[:, classes.last], classes.probability)
    common = mass[..., 0] ** 2 / (mass**2).sum(-1)
    rise = np.diff(course.drive, axis=0)
    fallen = np.r_[np.zeros((1, 6)), np.cumsum(rise * (1 - (common[1:] + common[:-1]) / 2), 0)]
    np.testing.assert_allclose(-course.attention[:, classes.last, 0], fallen, rtol=1e-3, atol=1e-6)
    # the theorem's own B = -z_c leaves that factor out, and is off by it
    assert course.drive[-1, 0] > 1.02 * -course.attention[-1, 0, 0]


def test_an_independent_computation_of_the_course_of_the_common_token():
    classes = ScanAndSnap().population()
    assert classes.probability.shape == (20, 141)
    times = np.array([10.0, 20.0, 50.0, 100.0, 500.0])
    course = follow(classes, np.array(2.0), np.array(0.05), times, step=1.0)
    np.testing.assert_allclose(
        -course.attention[:, 0, 0], [3e-4, 1.3e-3, 9.4e-3, 2.35e-2, 5.42e-2], rtol=0.1
    )
    chi = lab.relative_growth(course, classes)
    assert chi.shape == (5, 4) and (np.diff(chi, axis=0) > 0).all()
    assert course.rising.all()


def test_descent_nears_the_flow_as_steps_shrink():
    classes = make_classes(5, 1, [0.2], WEIGHTS)
    times, rates = np.array([0.0, 10.0, 40.0]), (np.array(2.0), np.array(0.1))
    exact = follow(classes, *rates, times).drive[-1, 0]
    off = [abs(follow(classes, *rates, times, step=h).drive[-1, 0] - exact) for h in (0.5, 0.25)]
    assert off[0] < 0.05 * exact and off[1] / off[0] == pytest.approx(0.5, abs=0.05)


def test_growth_begins_by_the_scanning_law():
    classes = make_classes(20, 1, [0.2], WEIGHTS)
    times = np.array([0.0, 0.5, 1.0])
    course = follow(classes, np.array(2.0), np.array(0.05), times)
    law = lab.early_growth(times, classes, 2.0, 0.05)
    np.testing.assert_allclose(course.drive[1:, 0], law[1:], rtol=0.03)


def test_growth_factors_of_a_class_do_not_depend_on_the_token_compared_with():
    classes = make_classes(20, 1, [0.2], WEIGHTS)
    course = follow(classes, np.array(2.0), np.array(0.05), np.array([0.0, 30.0, 60.0]))
    chi = lab.relative_growth(course, classes)
    assert np.ptp(chi[-1]) < 0.05 * chi[-1].mean()


def test_exponents_and_their_crossing_on_a_known_curve():
    times = np.geomspace(0.1, 1000, 400)
    exponent = lab.local_exponent(
        times, times**2 / (1 + times) ** 2
    )  # 2 / (1 + t): through 1 at t = 1
    np.testing.assert_allclose(exponent[5:-5], 2 / (1 + times[5:-5]), rtol=2e-3)
    assert lab.crossing(times, exponent) == pytest.approx(1, rel=5e-3)
    assert math.isnan(lab.crossing(times, np.full(400, 2.0)))
    # B ~ ln^2(a t) has the exponent that the snapping law names
    values = np.log(141 * 2 * times / 20) ** 2
    late = lab.late_exponent(float(times[300]), 20, 141, 2.0)
    assert lab.local_exponent(times, values)[300] == pytest.approx(late, rel=1e-3)


def test_classes_share_common_tokens_and_nothing_else():
    classes = make_classes(3, 2, [1.0] * 10, np.linspace(0.1, 1, 10).tolist())
    assert classes.probability.shape == (6, 10 + 60 + 3 + 6)
    np.testing.assert_allclose(classes.probability.sum(1), 1)
    assert classes.common.sum() == 10 and classes.distinct.sum(1).tolist() == [10] * 6
    assert classes.distinct.sum(0).max() == 1
    assert classes.last.tolist() == [0, 0, 1, 1, 2, 2] and len(set(classes.label.tolist())) == 6
    assert not classes.probability[:, classes.label].any()


def test_training_on_sequences_repeats_and_lowers_the_loss():
    classes = make_classes(2, 1, [1.0] * 10, np.linspace(0.1, 1, 10).tolist())
    one = np.ones(2)
    arguments = {"length": 64, "batch": 32, "steps": 40, "momentum": 0.9, "seed": 3}
    trained = lab.train_sampled(classes, one, one, **arguments)
    again = lab.train_sampled(classes, one, one, **arguments)
    np.testing.assert_array_equal(trained.attention, again.attention)
    np.testing.assert_allclose(trained.losses[:, 0], math.log(classes.probability.shape[1]))
    assert (trained.losses[:, -1] < 0.05).all()
    z = trained.attention[:, 0]
    assert (z[:, classes.distinct[0]].mean(1) > z[:, classes.common].mean(1)).all()


def test_settings_that_cannot_work_are_refused():
    with pytest.raises(InputError, match="horizon must be at least"):
        ScanAndSnap(horizon=20.0)
    with pytest.raises(InputError, match="different weights"):
        ScanAndSnap(distinct=(0.5, 0.5))
    with pytest.raises(InputError, match="last must be at least 2"):
        ScanAndSnap(last=1, each=1)


def test_a_small_run_measures_everything():
    result = ScanAndSnap(
        classes=8,
        horizon=300.0,
        sweep_classes=(8,),
        sweep_rates=(1.0, 4.0),
        seeds=2,
        steps=30,
        batch=32,
        length=64,
        ratios=(1.0, 10.0),
    ).run()
    assert result.checks["fates"].holds is True
    assert result.checks["conserved"].holds is True
    assert result.checks["common, exact"].holds is True
    assert all(math.isfinite(row["measured"]) for row in result.rows())
    assert len(result.series) >= 11 and len(result.checks) >= 13
