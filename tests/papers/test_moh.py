"""The parts of the mixture-of-heads experiment: gates of other kinds, evenness, information."""

from __future__ import annotations

import math

import pytest
import torch

import regard
from regard.engine import AttentionCall, Pipeline, attend
from regard.labs.tasks import characters
from regard.nn import SoftmaxAttention
from regard.papers import _moh_runs as runs


def test_every_arm_has_the_heads_it_says() -> None:
    on = {}
    for name, arm in runs.ARMS.items():
        gates = arm(96, 12).gates(torch.randn(2, 7, 96))  # type: ignore[operator]
        on[name] = set((gates > 0).sum(-1).flatten().tolist())
    assert on == {
        "dense": {12},
        "MoH 75 %": {9},
        "MoH 50 %": {6},
        "all heads weighted": {12},
        "MoH 75 %, no balance": {9},
        "random 75 %": {9},
        "9 heads": {9},
        "6 heads": {6},
    }


def test_arms_begin_alike_and_dense_is_plain_attention() -> None:
    task, size = characters(16), runs.Size(steps=1, width=96, layers=1)
    models = {name: runs.build(task, size, arm, 5) for name, arm in runs.ARMS.items()}
    first = {k: v for k, v in models["dense"].state_dict().items() if "router" not in k}
    for model in models.values():
        state = model.state_dict()
        assert all(torch.equal(value, state[name]) for name, value in first.items())
    mixer, plain = models["dense"].mixers[0], SoftmaxAttention(96, 12)
    plain.load_state_dict(mixer.state_dict(), strict=False)
    hidden = torch.randn(1, 9, 96)
    torch.testing.assert_close(mixer(hidden), plain(hidden))


def test_usage_adds_up_and_evenness_is_relative_entropy() -> None:
    task, size = characters(16), runs.Size(steps=1, width=96, layers=2)
    table = runs.usage(runs.build(task, size, runs.ARMS["MoH 75 %"], 0), task, count=2)
    assert [len(row) for row in table] == [9, 9]
    assert all(sum(row) == pytest.approx(6, abs=1e-5) for row in table)
    assert runs.evenness([[0.5] * 4]) == pytest.approx(1)
    assert runs.evenness([[1.0, 1.0, 0.0, 0.0]]) == pytest.approx(0.5)


def test_information_by_hand() -> None:
    apart = {"a": [[[1.0, 0.0]]] * 2, "b": [[[0.0, 1.0]]] * 2}
    assert runs.information(apart, [0, 0, 1, 1]) == pytest.approx(1)
    assert runs.information(apart, [0, 1, 0, 1]) == pytest.approx(0, abs=1e-6)
    half = {"a": [[[1.0, 0.0]]], "b": [[[0.5, 0.5]]]}
    overall = -(0.75 * math.log2(0.75) + 0.25 * math.log2(0.25))
    assert runs.information(half, [0, 1]) == pytest.approx(overall - 0.5)


def test_static_heads_are_the_same_for_all_tokens_and_shortest_is_the_opposite() -> None:
    call = AttentionCall.make(*torch.randn(3, 2, 6, 9, 4))
    static = runs.StaticHeads(2, 2)
    attend(call, Pipeline([static]))
    on = static.chosen["", 0]
    assert (on == on[0, 0]).all() and on[0, 0].sum() == 2
    short, long = runs.ShortestHeads(2, 2), regard.weights.QueryNormHeads(2, 2)
    attend(call, Pipeline([short, long]))
    assert torch.equal(short.chosen["", 0], ~long.chosen["", 0])


def test_tables_have_the_length_asked_for() -> None:
    assert len(runs.tables(500)) == 500 and runs.tables(500) == runs.tables(500)


@pytest.mark.model
@pytest.mark.slow
def test_tuning_lowers_the_loss_of_the_row_it_sees(smollm2: object) -> None:
    rows = runs.tokens_of(smollm2.tokenizer, regard.texts.prose(2000), 1, 24).repeat(3, 1)  # type: ignore[attr-defined]
    method = regard.weights.QueryNormHeads(5, 2)
    curve = runs.tune(smollm2, rows, rows[:1], method, [0, 3])
    assert curve["3"][0] < curve["0"][0]
