"""Linear causal attention on linear sequences: the layer against its definition, the formulas against brute force."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regard._errors import InputError
from regard.labs import mesa_optimization as lab
from regard.labs.flows import flow
from regard.labs.mesa_optimization import MesaOptimization

DOUBLE = torch.complex128


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def weights(seeds: int, starts: int, d: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    random = {"dtype": DOUBLE, "generator": generator(seed)}
    value = torch.randn(seeds, starts, d, 2 * d, **random)
    return value, torch.randn(seeds, starts, 2 * d, 2 * d, **random)


@given(seed=st.integers(0, 10**6), d=st.integers(1, 3), length=st.integers(4, 7))
@settings(max_examples=15, deadline=None)
def test_the_layer_is_its_definition_token_by_token(seed, d, length):
    x = lab.draw("gaussian", d, length, (2, 2), generator(seed), kind=DOUBLE)
    value, key = weights(2, 2, d, seed + 1)
    found = lab.linear_causal_attention(value, key, x)
    for s in range(2):
        for k in range(2):
            for n in range(2):
                columns = []
                for t in range(1, length):
                    before = x[s, n, t - 2] if t > 1 else torch.zeros(d, dtype=DOUBLE)
                    columns.append(torch.cat([x[s, n, t - 1], before]))
                    if t == 1:
                        continue
                    e = torch.stack(columns, 1)
                    y = value[s, k] @ e @ e.conj().T @ key[s, k] @ columns[-1] / (t - 1)
                    torch.testing.assert_close(found[s, k, n, t - 2], y)


def test_the_diagonal_form_is_one_step_of_descent_on_least_squares():
    x = lab.draw("gaussian", 3, 9, (2, 4), generator(), kind=DOUBLE)
    value, key = (part.to(DOUBLE) for part in lab.begin((0.5, 0.4), (0.3, 2.0), 3, 2))
    found = lab.linear_causal_attention(value, key, x)
    for k, eta in enumerate((0.15, 0.8)):
        torch.testing.assert_close(found[:, k], lab.one_step_ols_gd(x, eta), atol=1e-6, rtol=1e-6)


def test_the_step_of_descent_is_the_gradient_of_least_squares():
    x, eta = lab.draw("gaussian", 2, 6, (1,), generator(), kind=DOUBLE), 0.3
    found = lab.one_step_ols_gd(x, eta)
    for t in range(2, 6):
        w = torch.zeros(2, 2, dtype=DOUBLE, requires_grad=True)
        left = x[0, 1:t].T - w @ x[0, : t - 1].T
        loss = left.abs().square().sum() / (2 * (t - 1))
        (gradient,) = torch.autograd.grad(loss, w)
        torch.testing.assert_close(found[0, t - 2], -eta * gradient @ x[0, t - 1])


def test_what_is_predicted_does_not_depend_on_later_tokens():
    x = lab.draw("gaussian", 2, 8, (1, 3), generator(), kind=DOUBLE)
    value, key = weights(1, 1, 2, 4)
    changed = x.clone()
    changed[:, :, 5:] += 1
    before, after = (lab.linear_causal_attention(value, key, part) for part in (x, changed))
    torch.testing.assert_close(before[..., :4, :], after[..., :4, :])
    assert (before[..., 4:, :] - after[..., 4:, :]).abs().min() > 1e-6


@pytest.mark.parametrize("start", ["gaussian", "sparse", "ones", "signs"])
def test_sequences_turn_and_their_moments_are_as_stated(start):
    d, scale, share = 3, 1.5, 0.4
    x = lab.draw(start, d, 6, (200_000,), generator(), scale=scale, share=share, kind=DOUBLE)
    first = x[:, 0].real
    assert x[:, 0].imag.abs().max() == 0
    there = first.abs().amin(1) > 1e-3
    turns = x[there, 1:] / x[there, :-1]
    torch.testing.assert_close(turns, turns[:, :1].expand_as(turns), atol=1e-8, rtol=1e-8)
    torch.testing.assert_close(x.abs(), x[:, :1].abs().expand(x.shape))
    moments = lab.start_moments(start, d, scale, share)
    square = first.square()
    cross = (square[:, 0] * square[:, 1:].square().sum(1)).mean()
    found = [square.mean(), (square**2).mean(), (square**3).mean(), cross]
    expected = [moments.second, moments.fourth, moments.sixth, moments.cross]
    np.testing.assert_allclose([float(v) for v in found], expected, rtol=0.06, atol=1e-9)
    assert float((first != 0).double().mean()) == pytest.approx(moments.support, abs=0.01)


@pytest.mark.parametrize("start", ["gaussian", "sparse", "ones", "signs"])
def test_the_diagonal_loss_and_the_error_by_position_are_the_measured_ones(start):
    d, length, a, b = 3, 7, 0.3, 0.9
    x = lab.draw(start, d, length, (1, 150_000), generator(1), scale=0.8, share=0.6)
    y = lab.linear_causal_attention(*lab.begin((a,), (b,), d, 1), x)[:, 0]
    squares = (y - x[:, :, 2:]).abs().square().double()
    moments = lab.start_moments(start, d, 0.8, 0.6)
    loss = lab.diagonal_loss(np.array(a), np.array(b), moments, d, length)
    assert float(squares.sum((2, 3)).mean()) / 2 == pytest.approx(float(loss), rel=0.02)
    error = squares.mean((0, 1, 3)).numpy() / moments.second
    predicted = lab.position_error(a * b, moments, np.arange(2, length))
    np.testing.assert_allclose(error, predicted, rtol=0.03)


def test_the_velocity_is_minus_the_gradient_of_one_pair_of_entries():
    # the loss of d equal pairs has d times the gradient of one
    moments, d, push = lab.start_moments("gaussian", 4, 0.7), 4, 1e-6
    a, b = np.array([0.3, 0.9]), np.array([0.5, 0.2])
    loss = lambda a, b: lab.diagonal_loss(a, b, moments, d, 9) / d  # noqa: E731
    to_a, to_b = lab.diagonal_velocity(a, b, moments, 9)
    np.testing.assert_allclose(
        to_a, -(loss(a + push, b) - loss(a - push, b)) / (2 * push), rtol=1e-6
    )
    np.testing.assert_allclose(
        to_b, -(loss(a, b + push) - loss(a, b - push)) / (2 * push), rtol=1e-6
    )


def test_the_limit_minimises_the_loss_and_the_flow_reaches_it_with_its_balance():
    moments = lab.start_moments("gaussian", 5)
    step = lab.mesa_step_size(moments, 20)
    assert step == pytest.approx(0.1731, abs=5e-5)
    grid = np.linspace(0, 0.4, 4001)
    losses = lab.diagonal_loss(grid, np.ones_like(grid), moments, 5, 20)
    assert grid[losses.argmin()] == pytest.approx(step, abs=1e-4)
    begin = np.array([0.1, 0.5, 2.0]), np.array([0.1, 1.5, 2.0])
    velocity = lambda a, b: lab.diagonal_velocity(a, b, moments, 20)  # noqa: E731
    a, b = (part[-1] for part in flow(velocity, begin, np.array([0.0, 1.0])))
    np.testing.assert_allclose(a * b, step, rtol=1e-6)
    np.testing.assert_allclose(a**2 - b**2, begin[0] ** 2 - begin[1] ** 2, atol=1e-6)
    for i in range(3):
        limits = lab.balanced_limit(float(begin[0][i]), float(begin[1][i]), step)
        assert limits == pytest.approx((a[i], b[i]), rel=1e-5)


def test_special_cases_of_the_step_size():
    far = lab.mesa_step_size(lab.start_moments("gaussian", 5, 2.0), 10**6)
    assert far == pytest.approx(1 / (5 * 4), rel=1e-4)
    for length in (5, 100):
        assert lab.mesa_step_size(lab.start_moments("sparse", 5, 2.0), length) == 0.25
        mean = sum(1 / (t - 1) for t in range(2, length)) / (length - 2)
        assert lab.inverse_mean(length) == pytest.approx(mean)
        ones = lab.mesa_step_size(lab.start_moments("ones", 5), length)
        assert ones == pytest.approx(1 / (1 + 4 * mean))


def test_long_contexts_scale_each_coordinate_by_its_square():
    x = lab.draw("gaussian", 2, 4000, (1, 3), generator(2), kind=DOUBLE)
    y = lab.one_step_ols_gd(x, 0.2)[..., -1, :]
    torch.testing.assert_close(
        y, 0.2 * x[..., 0, :].abs().square() * x[..., -1, :], atol=0.02, rtol=0.02
    )


def test_the_population_gradient_leaves_the_diagonal_form_only_for_all_ones():
    for start, most in (("gaussian", 0.06), ("sparse", 0.06), ("signs", 0.06), ("ones", None)):
        x = lab.draw(start, 2, 8, (1, 200_000), generator(3), share=0.6)
        value, key = (part.requires_grad_() for part in lab.begin((0.2,), (0.2,), 2, 1))
        wrong = lab.linear_causal_attention(value, key, x) - x[:, None, :, 2:]
        gradients = torch.autograd.grad(wrong.abs().square().sum((-2, -1)).mean() / 2, (value, key))
        inside, outside = [], []
        for part, mask in zip(gradients, lab.diagonal_part(2), strict=True):
            inside.append(float(part[..., mask].abs().max()))
            outside.append(float(part[..., ~mask].abs().max()))
        share = max(outside) / max(inside)
        assert share < most if most is not None else share > 0.2, (start, share)


def quick(**changes) -> MesaOptimization:
    small = {"dimension": 2, "length": 8, "steps": 60, "sequences": 60, "seeds": 2, "tests": 500}
    return MesaOptimization(**(small | changes))


def test_training_repeats_and_masked_entries_stay_at_zero():
    one, two = (quick(masked=True, start="ones").trained() for _ in range(2))
    torch.testing.assert_close(one.value, two.value, atol=0, rtol=0)
    assert (one.stray == 0).all()
    free = quick(start="ones").trained()
    assert (free.stray[0] == 0).all() and (free.stray[-1] > 0.05).all()
    in_value, _ = free.diagonal()
    assert in_value[..., 2:].abs().max() == 0 and (in_value[0, 0, 0, 0] == free.value[0, 0, 0, 0])


def test_the_first_step_of_training_is_the_gradient_times_the_stated_rate():
    laboratory = quick(start="sparse", a=(0.3,), b=(0.6,), steps=10)
    trained = laboratory.trained()
    moments = laboratory.moments
    size = max(0.3**2 + 0.6**2, 2 * laboratory.limit)
    assert trained.steps[1] == 1
    bend = 6 * (moments.sixth + moments.cross * lab.inverse_mean(8))
    np.testing.assert_allclose(trained.time[1], 0.1 / (bend * size), rtol=1e-5)
    moved = trained.product[1] - trained.product[0]
    to_a, to_b = lab.diagonal_velocity(np.array(0.3), np.array(0.6), moments, 8)
    expected = (to_a * 0.6 + to_b * 0.3) * trained.time[1]
    assert moved.mean() == pytest.approx(expected.mean(), rel=0.02)


def test_exact_starts_are_learnt_exactly():
    result = quick(start="sparse", steps=150, a=(0.1, 0.5), b=(0.1, 1.5)).run()
    assert all(check.holds is True for check in result.checks.values()), str(result)
    assert result.series["error"].measured[-1] < 1e-3
    assert result.series["ratio"].measured[-1] == pytest.approx(1, abs=0.02)


def test_without_the_condition_nothing_is_predicted():
    result = quick(start="ones").run()
    assert set(result.checks) == {"descent", "stray"} and result.checks["stray"].sense == ">"
    assert np.isnan(result.series["error"].predicted).all()
    assert all(math.isfinite(row["measured"]) for row in result.rows())


def test_settings_that_cannot_work_are_refused():
    with pytest.raises(InputError, match="as many starts"):
        MesaOptimization(a=(0.1,), b=(0.1, 0.2))
    with pytest.raises(InputError, match="start must be one of gaussian"):
        lab.start_moments("cauchy", 3)
    with pytest.raises(InputError, match="start must be one of gaussian"):
        lab.draw("cauchy", 3, 5, (1,), generator())
