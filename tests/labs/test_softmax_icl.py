"""Softmax attention on in-context regression: the network against its definition, the formulas against brute force."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regard._errors import InputError
from regard.labs import softmax_icl as lab
from regard.labs.flows import flow
from regard.labs.softmax_icl import Networks, SoftmaxICL, Task, draw

PLACE = (5, 40, 0.1)
USES = ((True, True, True, True, False, False), (False, False, True, True, True, True))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(seed=st.integers(0, 10**6), d=st.integers(1, 4), labels=st.integers(1, 3))
@settings(max_examples=15, deadline=None)
def test_a_network_is_multi_head_attention_by_the_definition(seed, d, labels):
    task = Task.several([[True] * d] * labels, 5, 0.1)
    networks = Networks.start([1, 3], task, 2, generator(seed))
    prompts = draw(task, (2, 3), generator(seed + 1))
    found = networks.predict(prompts)
    assert found.shape == (2, 2, 3, labels)
    for s in range(2):
        for n, own in enumerate((range(1), range(1, 4))):
            for b in range(3):
                # columns are tokens
                z = torch.cat([prompts.x[s, b], prompts.y[s, b]], 1).T
                asked = torch.cat([prompts.query[s, b], torch.zeros(labels)])
                total = torch.zeros(labels)
                for h in own:
                    key, query = networks.key[s, h], networks.query[s, h]
                    scores = z.T @ key.T @ query @ asked / math.sqrt(d + labels)
                    mixed = z @ torch.softmax(scores, 0)
                    total = total + networks.output[s, h] @ networks.value[s, h] @ mixed
                torch.testing.assert_close(found[s, n, b], total, atol=1e-5, rtol=1e-4)


def test_prompts_shared_by_all_seeds_are_answered_as_repeated_ones():
    task = Task.regression(3, 6, 0.1)
    networks = Networks.start([1, 2], task, 2, generator())
    shared = draw(task, (4,), generator(1))
    twice = lab.Prompts(
        *(torch.stack([part, part]) for part in (shared.x, shared.y, shared.query, shared.answer))
    )
    torch.testing.assert_close(networks.predict(shared), networks.predict(twice))


def test_the_query_sees_neither_itself_nor_its_label():
    task = Task.regression(3, 6, 0.1)
    networks, prompts = Networks.start([2], task, 1, generator()), draw(task, (4,), generator(1))
    other = lab.Prompts(prompts.x, prompts.y, prompts.query, prompts.answer + 1)
    torch.testing.assert_close(networks.predict(prompts), networks.predict(other))
    order = torch.tensor([3, 1, 0, 5, 4, 2])  # no positions
    mixed = lab.Prompts(prompts.x[:, order], prompts.y[:, order], prompts.query, prompts.answer)
    torch.testing.assert_close(networks.predict(prompts), networks.predict(mixed))


def with_pattern(omega: tuple[float, ...], mu: tuple[float, ...]) -> Networks:
    networks = Networks.start([len(omega)], Task.regression(5, 40, 0.1), 1, generator())
    eye = torch.diag(torch.tensor([1.0] * 5 + [0.0]))
    networks.query[:] = eye
    for h, (o, m) in enumerate(zip(omega, mu, strict=True)):
        networks.key[0, h] = o * math.sqrt(6) * eye
        networks.output[0, h, 0] = torch.tensor([0.0] * 5 + [m])
    networks.value[:] = torch.eye(6)
    return networks


def test_a_network_with_the_pattern_is_the_reduced_model():
    networks = with_pattern((0.3, -0.2), (1.5, -1.1))
    p = draw(Task.regression(*PLACE), (8,), generator(1))
    expected = lab.kernel_heads([0.3, -0.2], [1.5, -1.1], p.x, p.y, p.query)
    torch.testing.assert_close(networks.predict(p)[0, 0], expected, atol=1e-5, rtol=1e-4)
    scores = {key: float(value[0, 0]) for key, value in lab.pattern_scores(networks).items()}
    assert scores["off"] == pytest.approx(0, abs=1e-6) and scores["label"] == pytest.approx(1)
    assert scores["sum"] == pytest.approx(0.4 / 2.6) and scores["signs"] == 1
    assert scores["eta"] == pytest.approx(0.3 * 1.5 + 0.2 * 1.1)
    mean = (1.5 * 0.3 + 1.1 * 0.2) / 2.6
    spread = math.sqrt((1.5 * (0.3 - mean) ** 2 + 1.1 * (0.2 - mean) ** 2) / 2.6)
    assert scores["equal"] == pytest.approx(spread / mean)
    np.testing.assert_allclose(
        lab.effective_matrix(networks, 0)[0], scores["eta"] * np.eye(5), atol=1e-5
    )


def test_the_scores_see_what_departs_from_the_pattern():
    networks = with_pattern((0.3, -0.2), (1.5, 1.1))
    networks.key[0, :, 0, 5] = 10.0  # the score now reads the examples' labels
    networks.output[0, :, 0, 0] = 1.0
    scores = {key: float(value[0, 0]) for key, value in lab.pattern_scores(networks).items()}
    assert scores["off"] > 0.5 and scores["signs"] == pytest.approx(1.5 / 2.6)
    assert scores["label"] == pytest.approx((1.5 * 1.5 / 2.5 + 1.1 * 1.1 / 2.1) / 2.6)
    assert scores["sum"] == pytest.approx(1)


def test_small_omega_makes_the_effective_matrix_the_prediction():
    networks = with_pattern((1.0, -1.0), (1.0, -1.0))
    matrix = torch.randn(5, 5, generator=generator(3))
    small = 1e-3
    networks.query[:] = torch.eye(6)
    for h, sign in enumerate((1, -1)):
        networks.key[0, h, :5, :5] = sign * small * math.sqrt(6) * matrix
        networks.output[0, h, 0, 5] = sign / (2 * small)
    p = draw(Task.regression(*PLACE), (200,), generator(1))
    weight = torch.as_tensor(lab.effective_matrix(networks, 0)[0])
    moved = (p.x - p.x.mean(1, keepdim=True)) * p.y
    expected = (p.query @ weight * moved.mean(1)).sum(-1)
    torch.testing.assert_close(networks.predict(p)[0, 0, :, 0], expected, atol=5e-3, rtol=1e-2)


def test_the_velocity_is_minus_half_the_gradient_of_the_loss():
    rng, push = np.random.default_rng(0), 1e-6
    omega, mu = 0.3 * rng.standard_normal((2, 6, 3))
    to_omega, to_mu = lab.reduced_velocity(omega, mu, *PLACE)
    loss = lambda o, m: lab.reduced_loss(o, m, *PLACE)  # noqa: E731
    for h in range(3):
        step = push * np.eye(3)[h]
        by_omega = (loss(omega + step, mu) - loss(omega - step, mu)) / (2 * push)
        by_mu = (loss(omega, mu + step) - loss(omega, mu - step)) / (2 * push)
        np.testing.assert_allclose(to_omega[:, h], -by_omega / 2, rtol=1e-5, atol=1e-8)
        np.testing.assert_allclose(to_mu[:, h], -by_mu / 2, rtol=1e-5, atol=1e-8)


def measured(predict, d: int, examples: int, noise: float, count: int) -> tuple[float, float]:
    found = lab.measured_errors({"one": predict}, Task.regression(d, examples, noise), count, 0)
    return float(found["one"][0]), float(found["one"][1])


def test_the_reduced_loss_nears_the_measured_one_as_d_and_length_grow():
    gaps = []
    for d, examples in ((5, 40), (20, 400)):
        scale = math.sqrt(d / 5)
        omega, mu = [0.13 / scale, -0.13 / scale], [3.45 * scale, -3.45 * scale]
        predict = lambda p, o=omega, m=mu: lab.kernel_heads(o, m, p.x, p.y, p.query)  # noqa: E731
        here, _ = measured(predict, d, examples, 0.1, 20_000)
        formula = lab.reduced_loss(np.array(omega), np.array(mu), d, examples, 0.1)
        gaps.append(abs(here - float(formula)))
    assert gaps[1] < 0.5 * gaps[0] < 0.05


@pytest.mark.parametrize(("d", "examples", "eta"), [(5, 40, 0.879), (3, 6, 0.5)])
def test_the_exact_risks_of_both_steps_are_the_measured_ones(d, examples, eta):
    for risk, step in ((lab.debiased_risk, lab.debiased_gd), (lab.plain_risk, lab.plain_gd)):
        here, bar = measured(lambda p, f=step: f(p.x, p.y, p.query, eta), d, examples, 0.3, 120_000)
        assert here == pytest.approx(risk(d, examples, 0.3, eta), abs=1.5 * bar)
        assert bar < 0.02 * here


def test_the_best_step_and_preconditioner_minimise_the_exact_risk():
    eta, _ = lab.debiased_step(*PLACE)
    risks = [lab.debiased_risk(*PLACE, e) for e in (eta - 0.01, eta, eta + 0.01)]
    assert risks[1] == min(risks)
    assert lab.preconditioned_risk([1.0] * 5, 40, 0.1) == pytest.approx(risks[1])
    spectrum, noise = [2.0, 1.0, 0.25], 0.2
    weight = torch.as_tensor(lab.best_preconditioner(spectrum, 12, noise)).float()
    task = Task.regression(3, 12, noise, spectrum)

    def step(scale):
        def predict(p):
            return lab.debiased_gd(p.x, p.y, p.query * weight * torch.tensor(scale), 1.0)

        return predict

    kinds = {"best": step([1.0, 1.0, 1.0])} | {
        f"{i}, {change}": step([change if j == i else 1.0 for j in range(3)])
        for i in range(3)
        for change in (0.85, 1.15)
    }
    found = lab.measured_errors(kinds, task, 200_000, 1)
    best, bar = found.pop("best")
    assert float(best) == pytest.approx(
        lab.preconditioned_risk(spectrum, 12, noise), abs=1.5 * float(bar)
    )
    assert all(float(other[0]) > float(best) for other in found.values())


def test_the_single_head_optimum_is_stationary_and_best():
    omega, mu, loss = lab.single_head(*PLACE)
    at = np.array([omega]), np.array([mu])
    np.testing.assert_allclose(np.concatenate(lab.reduced_velocity(*at, *PLACE)), 0, atol=1e-12)
    assert lab.reduced_loss(*at, *PLACE) == pytest.approx(loss)
    grid = np.linspace(0.01, 1.2, 300)[:, None]
    best = lab.reduced_loss(grid, lab.optimal_mu(grid, *PLACE), *PLACE)
    assert best.min() >= loss - 1e-12 and best.min() == pytest.approx(loss, abs=1e-4)


def test_two_heads_near_their_infimum_as_omega_shrinks_and_more_do_not_help():
    eta, infimum = lab.debiased_step(*PLACE)
    losses = []
    for size in (0.3, 0.1, 0.03, 0.01):
        omega = np.array([size, -size])
        mu = lab.optimal_mu(omega, *PLACE)
        losses.append(float(lab.reduced_loss(omega, mu, *PLACE)))
        assert mu[0] == pytest.approx(-mu[1])
    assert sorted(losses, reverse=True) == losses
    assert infimum < losses[-1] < infimum + 1e-4
    assert float(omega @ mu) == pytest.approx(eta, rel=1e-2)
    omega = 0.4 * np.random.default_rng(0).standard_normal((50, 4))
    assert (lab.reduced_loss(omega, lab.optimal_mu(omega, *PLACE), *PLACE) >= infimum).all()


def test_two_heads_with_small_omega_are_debiased_descent():
    p = draw(Task.regression(*PLACE), (400,), generator())
    x, y, query = p.x.double(), p.y.double(), p.query.double()
    eta, small = 0.879, 1e-3
    heads = [eta / (2 * small), -eta / (2 * small)]
    pair = lab.kernel_heads([small, -small], heads, x, y, query)
    torch.testing.assert_close(pair, lab.debiased_gd(x, y, query, eta), atol=1e-5, rtol=1e-4)
    plain = lab.plain_gd(x, y, query, eta)
    mean = eta * (x.mean(1) * query).sum(-1, keepdim=True) * y.mean(1)
    torch.testing.assert_close(plain - mean, lab.debiased_gd(x, y, query, eta))


def test_ridge_is_the_posterior_mean_and_beats_everything():
    p = draw(Task.regression(*PLACE), (20_000,), generator())
    x, y, query = p.x.double(), p.y.double(), p.query.double()
    bayes = lab.ridge(x, y, query, 0.1 * 5)
    for b in range(9):
        precision = x[b].T @ x[b] / 0.1 + 5 * torch.eye(5, dtype=torch.float64)
        mean = torch.linalg.inv(precision) @ x[b].T @ y[b, :, 0] / 0.1
        torch.testing.assert_close(bayes[b, 0], mean @ query[b])
    error = lambda answers: float((answers - p.answer).square().mean())  # noqa: E731
    assert error(bayes) == pytest.approx(0.115, abs=0.004)
    alone = lab.single_head(*PLACE)
    step = error(lab.debiased_gd(x, y, query, 0.879))
    assert error(bayes) < step < error(lab.kernel_heads(alone[:1], alone[1:2], x, y, query))


def test_the_risks_of_several_tasks_are_the_measured_ones():
    uses, task = np.array(USES), Task.several(USES, 48, 0.1)
    own, common = lab.task_risks(uses, 48, [0.4, 0.4])
    weights = torch.tensor(USES).float() / (1 + 4.4 / 48)

    def predict(p):
        steps = [lab.debiased_gd(p.x, p.y, p.query * w, 1.0)[..., k] for k, w in enumerate(weights)]
        return torch.stack(steps, -1)

    here, bar = lab.measured_errors({"own": predict}, task, 60_000, 0)["own"]
    assert own == pytest.approx(float(here), abs=1.5 * float(bar))
    assert common > 1.1 * own
    # no other common matrix does better
    rng, share = np.random.default_rng(0), 1 - 1 / 48
    size = uses.sum(1) + 0.4
    square = share * (48 * uses + size[:, None]) / 48
    for _ in range(300):
        w = rng.uniform(-0.2, 1.2, 6)
        m = share * (uses @ w) / (square @ w**2)
        loss = size - 2 * share * m * (uses @ w) + m**2 * (square @ w**2)
        assert loss.mean() >= common - 1e-9
    same = np.array([[True, True], [True, True]])
    assert np.ptp(lab.task_risks(same, 20, [0.1, 0.1])) < 1e-9


def test_networks_of_different_sizes_and_seeds_train_as_if_alone():
    task, how = Task.regression(3, 8, 0.1), {"steps": 30, "batch": 16, "rate": 1e-2, "seed": 4}
    both = Networks.start([1, 2], task, 2, generator())
    alone = Networks((2,), *(part[:, 1:].clone() for part in both.parameters))
    trained, again = lab.train(both, task, **how), lab.train(alone, task, **how)
    torch.testing.assert_close(both.query[:, 1:], alone.query, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(both.output[:, 1:], alone.output, atol=1e-4, rtol=1e-3)
    np.testing.assert_allclose(trained.eta(1), again.eta(0), atol=1e-4)
    assert np.abs(trained.eta(1)[-1] - trained.eta(1)[0]).min() > 1e-3
    assert trained.steps[0] == 0 and trained.steps[-1] == 30


def test_a_short_training_lowers_the_error():
    task = Task.regression(2, 20, 0.1)
    networks = Networks.start([2], task, 2, generator())
    before = lab.measured_errors({"n": networks.predict}, task, 4000, 1)["n"][0]
    lab.train(networks, task, steps=300, batch=64, rate=2e-2, seed=0)
    after = lab.measured_errors({"n": networks.predict}, task, 4000, 1)["n"][0]
    assert (after < 0.5 * before).all()


def test_what_each_head_adds_to_each_task_is_read_off_its_own_label():
    task = Task.several(USES, 8, 0.1)
    networks = Networks.start([1, 2], task, 2, generator())
    found = lab.task_scales(networks, 1)
    assert found.shape == (2, 2, 2)
    for h in range(2):
        for k in range(2):
            one = networks.output[1, 1 + h, k] @ networks.value[1, 1 + h, :, 6 + k]
            assert found[1, h, k] == pytest.approx(float(one), rel=1e-5)


def test_the_reduced_flow_splits_heads_into_two_groups_but_may_not_when_all_start_with_one_sign():
    omega, mu = 0.05 * np.random.default_rng(1).standard_normal((2, 9, 4))
    omega[:3], mu[:3] = np.abs(omega[:3]), np.abs(mu[:3])
    early = omega + mu
    mixed = (early > 0).any(1) & (early < 0).any(1)
    assert 3 <= (~mixed).sum() < 9
    velocity = lambda o, m: lab.reduced_velocity(o, m, *PLACE)  # noqa: E731
    omega, mu = (part[-1] for part in flow(velocity, (omega, mu), np.array([0.0, 300.0])))
    assert (omega * mu > 0).mean() > 0.9
    assert (np.abs(mu.sum(1)) < 0.05 * np.abs(mu).sum(1))[mixed].all()
    loss = lab.reduced_loss(omega, mu, *PLACE)
    np.testing.assert_allclose(loss[mixed], lab.debiased_step(*PLACE)[1], atol=0.005)
    assert np.isclose(loss[~mixed], lab.single_head(*PLACE)[2], atol=0.005).any()


def test_settings_that_cannot_work_are_refused():
    with pytest.raises(InputError, match="spread must be at most"):
        SoftmaxICL(spread=1.0, dimension=64)


def test_a_small_run_measures_everything():
    result = SoftmaxICL(
        heads=(1, 2), steps=30, batch=16, seeds=2, prompts=1000, horizon=100.0
    ).run()
    assert result.checks["flow, 1"].holds is True and result.checks["descent, 4"].holds is True
    assert all(math.isfinite(row["measured"]) for row in result.rows())
    assert {"1 head", "4 heads", "2 heads, trained"} <= set(result.series)
