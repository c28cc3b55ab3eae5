"""The parts of the experiment against independent computations."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from regard.labs.softmax_icl import (
    Networks,
    SoftmaxICL,
    debiased_gd,
    debiased_risk,
    debiased_step,
    plain_risk,
)
from regard.papers import _softmax_icl_runs as runs

SMALL = SoftmaxICL(dimension=2, examples=8, heads=(1, 2), seeds=2, steps=12, batch=8)


def test_a_trained_network_survives_as_plain_values():
    trained = SMALL.trained()
    again = runs.unpack(runs.pack(trained))
    assert again.networks.counts == (1, 2)
    for one, other in zip(trained.networks.parameters, again.networks.parameters, strict=True):
        torch.testing.assert_close(one, other, atol=0, rtol=0)
    np.testing.assert_allclose(trained.eta(1), again.eta(1), rtol=1e-5)


def test_the_fixed_predictors_have_their_exact_errors():
    found = runs.predictors(60_000)
    eta, _ = debiased_step(5, 40, 0.1)
    for i, length in enumerate(runs.PRINTED_LENGTHS):
        bar = 1.5 * found["bar"][i]
        assert found["debiased"][i] == pytest.approx(debiased_risk(5, length, 0.1, eta), rel=bar)
        assert found["plain"][i] == pytest.approx(plain_risk(5, length, 0.1, eta), rel=bar)
        assert found["ridge"][i] < found["debiased"][i] < found["one head"][i]


def test_answers_that_are_the_debiased_step_are_recognised(monkeypatch):
    trained = SMALL.trained()
    found = runs.lessons(SMALL, trained, 500)
    assert found["nearer"].shape == (2, 2) and (found["nearer"] > 0.01).all()
    eta, _ = debiased_step(*SMALL.place)

    def step(self, p):
        return debiased_gd(p.x, p.y, p.query, eta)[None, None].expand(2, 2, -1, -1)

    monkeypatch.setattr(Networks, "predict", step)
    found = runs.lessons(SMALL, trained, 500)
    np.testing.assert_allclose(found["correlation"], 1, atol=1e-5)
    np.testing.assert_allclose(found["nearer"], 0, atol=1e-9)
    np.testing.assert_allclose(found["loss"], found["step loss"], rtol=1e-5)


def test_linear_attention_learns_the_plain_step_and_overshoots_on_longer_prompts():
    lab = SoftmaxICL(dimension=2, examples=20, heads=(1,), seeds=2, steps=10, batch=8)
    layer = runs.linear_layer(lab, 600, 64)
    best = 1 / (1 + (1 + 1.1 * 2) / 20)  # minimises the plain step's exact risk
    np.testing.assert_allclose(layer, np.broadcast_to(best * np.eye(2), (2, 2, 2)), atol=0.08)
    found = runs.by_length(lab, lab.trained(), layer, (20, 80), 4000)
    assert found["network"].shape == (2, 2, 1) and found["linear"].shape == (2, 2)
    for i, length in enumerate((20, 80)):
        expected = plain_risk(2, length, 0.1, best * length / 20)
        assert found["linear"][i].mean() == pytest.approx(expected, rel=0.2)


def test_heads_that_serve_both_labels_are_counted():
    scales = np.array([[3.0, 0.1], [-3.0, -4.0], [0.2, 4.0]])
    assert runs.served(scales).tolist() == [1, 2, 1]


def test_the_further_trainings_give_what_the_claims_read():
    found = runs.anisotropic((2.0, 1.0), 2, 10, 8, 1e-2)
    assert np.shape(found["diagonal"]) == (2, 2) and np.shape(found["goal"]) == (2,)
    found = runs.several((2, 3), 2, 10, 8, 1e-2, 500)
    assert np.shape(found["errors"]) == (2, 2) and found["own"] > 0
    assert [np.shape(part) for part in found["scales"]] == [(2, 2, 2), (2, 3, 2)]
