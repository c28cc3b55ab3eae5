"""The parts of the experiment against independent computations."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from regard.nn import ScaledFusedFFN, TemperatureAttention
from regard.papers import Run
from regard.papers import _entropy_guided_runs as runs
from regard.papers import entropy_guided as paper

TINY = runs.Scale(steps=2, layers=2, heads=2, width=16, tokens=12, batch=2, windows=3)


def test_the_regularizer_is_that_of_dense_maps():
    assert runs.largest_difference() < 1e-8


@pytest.mark.parametrize("name", runs.ARMS)
def test_an_arm_is_made_of_what_it_says(name):
    arm = runs.ARMS[name]
    model = runs.Decoder(30, TINY, arm)
    kinds = [type(module) for module in model.modules()]
    assert kinds.count(nn.LayerNorm) == (5 if arm.norms else 0)
    assert kinds.count(nn.GELU) == (2 if arm.activation == "gelu" else 0)
    assert kinds.count(nn.ReLU) == (2 if arm.activation == "relu" else 0)
    assert kinds.count(ScaledFusedFFN) == (2 if arm.fused else 0)
    assert kinds.count(TemperatureAttention) == (2 if arm.temperature else 0)
    ids = torch.randint(30, (2, 12))
    before = model(ids)
    ids[:, 7:] = 0
    torch.testing.assert_close(model(ids)[:, :7], before[:, :7])


def test_training_measures_what_the_model_does():
    found = runs.train_code("EReg 1e-5", 0, TINY)
    assert len(found["losses"]) == 2 and not found["diverged"]
    assert 1 < found["perplexity"] < 200
    assert [len(layer) for layer in found["entropy"]] == [2, 2]
    assert all(0 <= value <= math.log(12) for layer in found["entropy"] for value in layer)
    assert found["losses"] == runs.train_code("EReg 1e-5", 0, TINY)["losses"]


def test_operations_are_counted_from_the_shapes():
    full = runs.operations("SM + LN + GELU", TINY)
    fused = runs.operations("SM + ScFuFFN", TINY)
    assert full == {
        "softmax rows": 48,
        "norms": 60,
        "activations": 4 * 16 * 24,
        "feed-forward products": 8 * 16 * 16 * 24,
    }
    assert fused["norms"] == fused["activations"] == 0
    assert full["feed-forward products"] == 8 * fused["feed-forward products"]


def result(perplexity: float, entropy: list[list[float]]) -> dict[str, Any]:
    return {
        "perplexity": perplexity,
        "entropy": entropy,
        "diverged": False,
        "losses": [3.0, 2.0],
        "levels": [[0.5, 0.6], [0.4, 0.5]],
        "temperatures": [1.0, 1.1],
    }


def test_overload_looks_at_the_first_half_of_the_layers():
    found = [result(5.0, [[4.0, 3.1], [2.9, 0.1], [4.0, 4.0], [0.0, 0.0]])]
    assert paper.overload(found) == 50
    assert paper.overload(found, early=False) == 50
    assert paper.layer_means(found) == pytest.approx([3.55, 1.5, 4.0, 0.0])


def test_verdicts_follow_the_numbers(tmp_path):
    wide, low = [[3.0, 3.0], [3.0, 3.0]], [[1.0, 3.0], [0.2, 0.2]]

    def recorded(**perplexity: float) -> dict[str, Any]:
        run = Run(paper.PAPER, scale="quick", work=tmp_path)
        found = {
            name: [
                result(
                    perplexity.get(name.split()[0] + str(i), 5.0) + 0.01 * j, wide if i < 6 else low
                )
                for j in range(2)
            ]
            for i, name in enumerate(runs.ARMS)
        }
        paper.record(run, TINY, found)
        return {name: held["holds"] for name, held in run.records.items()}

    better = recorded(EReg7=4.0, SM2=6.0, SM4=9.0)
    assert (better["norms"], better["relu"], better["rescue"]) == (True, True, True)
    assert (better["overload"], better["regularized"], better["collapse"]) == (True, True, False)
    worse = recorded(EReg6=5.5, EReg7=5.5, EReg8=5.5, SM2=4.0)
    assert (worse["norms"], worse["relu"], worse["regularized"]) == (False, False, False)


def test_divergence_is_recorded_as_such(tmp_path):
    run = Run(paper.PAPER, scale="quick", work=tmp_path)
    wide = [[3.0, 3.0], [3.0, 3.0]]
    found = {name: [result(5.0, wide)] for name in runs.ARMS}
    found["SM"] = [{"diverged": True, "losses": [3.0], "levels": [[0.5]], "temperatures": []}]
    paper.record(run, TINY, found)
    assert run.records["collapse"]["here"] == "diverged" and run.records["collapse"]["holds"]
    assert run.records["rescue"]["holds"] is True
