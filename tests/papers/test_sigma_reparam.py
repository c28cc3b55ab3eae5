"""The parts of the experiment against independent computations."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from regard.nn import SigmaReparamConv2d, SigmaReparamLinear
from regard.papers import _sigma_reparam_runs as runs
from regard.papers import sigma_reparam as paper

TINY = runs.Scale(steps=3, layers=2, width=16, heads=2, batch=8)


def test_the_bound_is_met_and_decays():
    torch.manual_seed(0)
    found = runs.bound_numbers(100)
    assert found["below"] == 0 and found["rows"] == 1200
    assert found["gap"] < 1e-9
    assert found["slope"] == pytest.approx(-1, abs=0.02)


def test_norms_of_updates_keep_above_the_proposition():
    torch.manual_seed(0)
    found = runs.update_norms([16, 64], 2)
    assert (found["below"], found["matrices"]) == (0, 4)
    assert found["exponent"] == pytest.approx(
        math.log(found["norms"]["64"] / found["norms"]["16"]) / math.log(4)
    )


@pytest.mark.parametrize("name", runs.ARMS)
def test_an_arm_has_the_norms_and_layers_that_it_says(name):
    arm = runs.ARMS[name]
    model = runs.VisionTransformer(TINY, arm)
    kinds = [type(module) for module in model.modules()]
    assert kinds.count(torch.nn.LayerNorm) == (5 if arm.norms else 0)
    assert kinds.count(SigmaReparamLinear) == (13 if arm.sigma else 0)
    assert kinds.count(SigmaReparamConv2d) == (1 if arm.sigma else 0)
    assert model(torch.randn(3, 1, 8, 8)).shape == (3, 10)


def test_entropy_of_a_layer_is_that_of_its_weights():
    torch.manual_seed(0)
    layer, hidden = runs.Layer(16, 2, norms=True), torch.randn(2, 16, 16)
    layer(hidden)
    inner = layer.norm1(hidden)
    query, key = (
        project(inner).view(2, 16, 2, 8).transpose(1, 2) for project in (layer.q_proj, layer.k_proj)
    )
    weights = torch.softmax(query @ key.transpose(-1, -2) / math.sqrt(8), -1)
    expected = -(weights * weights.log()).sum(-1).mean()
    assert layer.entropy == pytest.approx(float(expected.detach()), abs=1e-5)


def test_digits_are_not_trained_on_and_held_out():
    images, labels, held, answers = runs.digits(0)
    assert (len(images), len(held)) == (1437, 360) == (len(labels), len(answers))
    assert float(images.min()) == -1 and float(images.max()) == 1


def test_training_is_repeatable_and_hot_rates_reach_queries_and_keys_alone():
    one, two = (runs.train_digits("pre-LN + sigmaReparam", 1e-3, 1, TINY) for _ in range(2))
    assert one["loss"] == two["loss"] and one["entropy"] == two["entropy"]
    assert one["spike"] == pytest.approx(
        max(b - min(one["loss"][: i + 1]) for i, b in enumerate(one["loss"]))
    )
    hot = runs.train_digits("pre-LN + sigmaReparam", 1e-3, 1, TINY, hot=10.0)
    assert hot["loss"][0] == one["loss"][0] and hot["loss"][-1] != one["loss"][-1]


def result(accuracy: float, entropy: list[float]) -> dict[str, Any]:
    return {
        "accuracy": accuracy,
        "entropy": entropy,
        "loss": [2.0, 1.0],
        "spike": 0.0,
        "seconds": 1.0,
    }


def test_verdicts_follow_the_numbers(tmp_path):
    from regard.papers import Run

    def recorded(plain: float, own: float) -> dict[str, Any]:
        run = Run(paper.PAPER, scale="quick", work=tmp_path)
        found = {
            name: {
                rate: [result(0.9, [2.5, plain if name == paper.PLAIN else own]) for _ in range(3)]
                for rate in (1e-3, 1e-2)
            }
            for name in runs.ARMS
        }
        paper.record_training(run, TINY, found)
        paper.record_forced(run, TINY, {n: found[n][1e-2] for n in (paper.PLAIN, paper.SIGMA)})
        return {name: held["holds"] for name, held in run.records.items()}

    good, bad, calm = recorded(0.1, 2.0), recorded(0.1, 0.05), recorded(2.4, 2.0)
    assert (good["collapse"], good["forced"], good["accuracy"]) == (True, True, True)
    assert (bad["collapse"], bad["forced"]) == (False, False)
    assert (calm["collapse"], calm["forced"]) == (None, False)
