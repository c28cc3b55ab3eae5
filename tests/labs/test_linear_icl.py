"""Linear attention on in-context regression: the layer against its definition, the formulas against brute force."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regard._errors import InputError
from regard.labs import linear_icl as lab
from regard.labs.flows import descend, flow
from regard.labs.linear_icl import LinearICL, draw_prompts, predict

SPECTRUM = np.diag([2.0, 1.0, 0.5, 0.25])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def some_covariance(size: int, seed: int) -> np.ndarray:
    draw = np.random.default_rng(seed).standard_normal((size, size + 2))
    return draw @ draw.T / size


def root_of(covariance: np.ndarray) -> torch.Tensor:
    return torch.as_tensor(np.linalg.cholesky(covariance))


@given(seed=st.integers(0, 10**6), size=st.integers(1, 5), examples=st.integers(1, 7))
@settings(max_examples=25, deadline=None)
def test_the_prediction_is_the_last_entry_of_the_whole_layer(seed, size, examples):
    random = generator(seed)
    value, key = torch.randn(2, 3, size + 1, size + 1, dtype=torch.float64, generator=random)
    prompts = draw_prompts(torch.eye(size, dtype=torch.float64), examples, (3, 2), random)
    found = predict(value, key, prompts.matrices)
    for s in range(3):
        for b in range(2):
            e = prompts.matrices[s, b]
            whole = e + value[s] @ e @ (e.T @ key[s] @ e) / examples
            torch.testing.assert_close(found[s, b], whole[-1, -1])


def test_the_prediction_is_one_step_of_descent_for_the_trained_weights():
    weight = np.linalg.inv(lab.icl_gamma(SPECTRUM, 20))
    value, key = torch.zeros(2, 5, 5, dtype=torch.float64)
    value[-1, -1], key[:-1, :-1] = 1, torch.as_tensor(weight)
    drawn = draw_prompts(root_of(SPECTRUM), 9, (6,), generator())
    x, y = drawn.matrices[:, :-1, :-1], drawn.matrices[:, -1, :-1]
    expected = (
        torch.einsum("bi,ij,bjn,bn->b", drawn.matrices[:, :-1, -1], torch.as_tensor(weight), x, y)
        / 9
    )
    torch.testing.assert_close(predict(value, key, drawn.matrices), expected)


def test_only_the_last_row_and_the_first_columns_reach_the_prediction():
    value, key = (
        torch.randn(2, 4, 4, dtype=torch.float64, generator=generator()).requires_grad_().unbind()
    )
    drawn = draw_prompts(torch.eye(3, dtype=torch.float64), 5, (8,), generator(1))
    to_value, to_key = torch.autograd.grad(
        predict(value, key, drawn.matrices).square().sum(), (value, key)
    )
    assert not to_value[:-1].any() and not to_key[:, -1].any()
    assert bool((to_value[-1] != 0).all()) and bool((to_key[:, :-1] != 0).all())


def test_prompts_have_the_laws_they_are_asked_for():
    covariance, other = some_covariance(3, 1), some_covariance(3, 2)
    drawn = draw_prompts(
        root_of(covariance), 4, (40_000,), generator(), query=root_of(other), noise=0.3
    )
    x = drawn.matrices[:, :-1]
    assert not drawn.matrices[:, -1, -1].any()
    np.testing.assert_allclose(
        np.cov(x[..., 0].numpy().T), covariance, atol=0.05 * np.abs(covariance).max()
    )
    np.testing.assert_allclose(np.cov(x[..., -1].numpy().T), other, atol=0.05 * np.abs(other).max())
    # w ~ N(0, I): labels have variance tr Lambda + noise
    assert float(drawn.matrices[:, -1, 0].var()) == pytest.approx(
        np.trace(covariance) + 0.3, rel=0.04
    )
    assert float(drawn.answers.var()) == pytest.approx(np.trace(other) + 0.3, rel=0.04)


def test_gamma_is_the_second_moment_of_the_sample_covariance():
    covariance = some_covariance(3, 4)
    x = draw_prompts(root_of(covariance), 5, (200_000,), generator()).matrices[:, :-1, :-1]
    sample = x @ x.mT / 5
    second = (sample @ sample).mean(0).numpy()
    np.testing.assert_allclose(
        second, lab.icl_gamma(covariance, 5) @ covariance, rtol=0.03, atol=0.03
    )


def test_the_velocity_is_minus_the_gradient_of_the_loss():
    covariance, step = some_covariance(3, 3), 1e-6
    rng = np.random.default_rng(0)
    u, matrix = rng.standard_normal(2), rng.standard_normal((2, 3, 3))
    du, dm = lab.icl_velocity(u, matrix, covariance, 7)
    loss = lambda u, m: lab.icl_loss(u, m, covariance, 7)  # noqa: E731
    np.testing.assert_allclose(
        du, -(loss(u + step, matrix) - loss(u - step, matrix)) / (2 * step), rtol=1e-6
    )
    for i in range(3):
        for j in range(3):
            push = np.zeros((3, 3))
            push[i, j] = step
            slope = (loss(u, matrix + push) - loss(u, matrix - push)) / (2 * step)
            np.testing.assert_allclose(dm[:, i, j], -slope, rtol=1e-5, atol=1e-7)


def test_the_loss_is_that_of_the_layer_on_prompts():
    covariance = some_covariance(3, 5)
    u, matrix = np.array(0.7), np.random.default_rng(1).standard_normal((3, 3)) / 4
    value, key = torch.zeros(2, 4, 4, dtype=torch.float64)
    value[-1, -1], key[:-1, :-1] = float(u), torch.as_tensor(matrix)
    drawn = draw_prompts(root_of(covariance), 6, (200_000,), generator())
    squares = 0.5 * (predict(value, key, drawn.matrices) - drawn.answers).square()
    bar = 4 * float(squares.std()) / math.sqrt(len(squares))
    assert float(squares.mean()) == pytest.approx(
        float(lab.icl_loss(u, matrix, covariance, 6)), abs=bar
    )


def test_the_limit_is_balanced_stationary_and_better_than_its_neighbours():
    covariance = some_covariance(4, 6)
    u, matrix = lab.icl_optimum(covariance, 10)
    assert u**2 == pytest.approx((matrix**2).sum())
    du, dm = lab.icl_velocity(np.array(u), matrix, covariance, 10)
    np.testing.assert_allclose(np.r_[du, dm.ravel()], 0, atol=1e-12)
    rng, least = np.random.default_rng(0), lab.icl_loss(np.array(u), matrix, covariance, 10)
    for _ in range(20):
        other = matrix + 0.1 * rng.standard_normal(matrix.shape)
        assert (
            lab.icl_loss(np.array(u + 0.1 * rng.standard_normal()), other, covariance, 10) > least
        )


def test_flow_and_descent_meet_in_the_limit_from_any_start_below_the_bound():
    covariance = np.diag([2.0, 1.5, 1.0])
    scale = 0.9 * lab.icl_largest_scale(covariance, 20)
    value, key = lab.start(3, scale, 5, generator())
    assert torch.allclose(
        key[:, :-1, :-1].flatten(1).norm(dim=1), torch.tensor(scale, dtype=torch.float64)
    )
    begin = (value[:, -1, -1].numpy(), key[:, :-1, :-1].numpy())
    velocity = lambda u, m: lab.icl_velocity(u, m, covariance, 20)  # noqa: E731
    goal, block = lab.icl_optimum(covariance, 20)
    u, matrix = flow(velocity, begin, np.array([0.0, 25.0]))
    np.testing.assert_allclose(u[-1], goal, atol=1e-4)
    np.testing.assert_allclose(matrix[-1], np.broadcast_to(block, (5, 3, 3)), atol=1e-4)
    # steps of finite size lose a little of the balance between u and U, but nothing of their product
    drift = []
    for step in (0.04, 0.02):
        u, matrix = descend(velocity, begin, np.array([0.0, 25.0]), step)
        product = u[-1][:, None, None] * matrix[-1]
        np.testing.assert_allclose(product, np.broadcast_to(goal * block, (5, 3, 3)), atol=1e-4)
        drift.append(np.abs(u[-1] - goal).max())
    assert drift[0] < 0.02 and drift[1] < 0.7 * drift[0]


@pytest.mark.parametrize(("examples", "printed"), [(5, 2.327), (20, 0.704), (200, 0.216)])
def test_risks_known_from_an_independent_computation(examples, printed):
    assert lab.icl_risk(SPECTRUM, 20, examples) == pytest.approx(printed, abs=6e-4)


def test_the_risk_formula_with_noise_and_a_covariance_that_does_not_commute():
    covariance, other = some_covariance(3, 7), some_covariance(3, 8)
    assert np.abs(covariance @ other - other @ covariance).max() > 0.1
    weight = np.linalg.inv(lab.icl_gamma(covariance, 12))
    here, bar = lab.measured_risk(
        weight, lambda n, g: draw_prompts(root_of(other), 8, (n,), g, noise=0.4), 150_000, 3
    )
    assert here == pytest.approx(lab.icl_risk(covariance, 12, 8, 0.4, other), abs=2 * bar)
    assert bar < 0.05 * here


def test_the_risk_of_fixed_linear_labels_averages_to_that_of_random_tasks():
    covariance, noise = some_covariance(3, 9), 0.2
    risks = []
    for w in np.eye(3):  # a quadratic form in w: its mean over N(0, I) is the sum over a basis
        moved = covariance @ w
        spread = np.outer(moved, moved) + (w @ moved) * covariance
        risks.append(lab.icl_risk_of_labels(covariance, 12, 8, 0.0, w, spread))
    spread = noise * covariance
    rest = lab.icl_risk_of_labels(covariance, 12, 8, noise, np.zeros(3), spread)
    assert sum(risks) + rest == pytest.approx(lab.icl_risk(covariance, 12, 8, noise))


def test_the_limit_on_random_covariances_minimises_the_mean_loss():
    size, examples = 3, 10
    entries = np.random.default_rng(0).exponential(size=(400_000, size))
    trace = entries.sum(1, keepdims=True)
    gamma = (1 + 1 / examples) * entries + trace / examples
    brute = (entries**2).mean() / (gamma * entries**2).mean()
    limit = lab.icl_random_covariance_limit((1, 2, 6), size, examples)
    assert limit == pytest.approx(brute, rel=0.02)
    risk = (
        (entries * (limit * (1 + 1 / 7) * entries + limit * trace / 7) * limit * entries)
        - 2 * limit * entries**2
        + entries
    )
    assert lab.icl_random_covariance_risk((1, 2, 6), size, examples, 7) == pytest.approx(
        risk.sum(1).mean(), rel=0.03
    )


def test_training_runs_are_independent_and_descend():
    root = torch.eye(2, dtype=torch.float64)
    begin = lab.start(2, 0.5, 3, generator())
    arguments = {"steps": 400, "rate": 0.02, "batch": 64, "seed": 5}
    trained = lab.train(lambda batch, g: draw_prompts(root, 10, batch, g), begin, **arguments)
    again = lab.train(lambda batch, g: draw_prompts(root, 10, batch, g), begin, **arguments)
    np.testing.assert_array_equal(trained.key, again.key)
    goal = np.linalg.inv(lab.icl_gamma(np.eye(2), 10))
    first, last = (np.abs(trained.product()[i] - goal).max() for i in (0, -1))
    assert last < 0.3 * first
    assert 0 < trained.stray() < 0.05
    assert len({float(v) for v in trained.key[-1, :, 0, 0]}) == 3


def test_settings_that_cannot_work_are_refused():
    with pytest.raises(InputError, match="rate must be below"):
        LinearICL(rate=0.5)
    with pytest.raises(InputError, match="spectrum must be"):
        LinearICL(spectrum=(1.0, 0.0))


def test_a_small_run_measures_everything_and_meets_what_is_exact():
    result = LinearICL(steps=60, batch=16, seeds=2, prompts=3000).run()
    for name in ("limit", "descent", "balance", "risk", "shift", "random risk"):
        assert result.checks[name].holds is True, str(result)
    rows = result.rows()
    assert {row["series"] for row in rows} == set(result.series) and len(result.series) >= 9
    assert all(math.isfinite(row["measured"]) for row in rows)
