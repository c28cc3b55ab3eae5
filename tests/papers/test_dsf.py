"""The parts of the experiment against independent computations."""

from __future__ import annotations

import copy
import math
from fractions import Fraction
from typing import Any

import pytest
import torch

from fixtures_models import tiny_llama
from regard._errors import InputError
from regard.papers import Run, dsf
from regard.papers import _dsf_recall as recalls
from regard.papers import _dsf_runs as runs

FIT = recalls.Fit(width=8, layers=2, steps=4, batch=4, tested=100)
TASK = recalls.Recall(16, 20, 3)


def test_the_forms_agree_and_the_identities_hold():
    torch.manual_seed(0)
    assert max(runs.deviations(tokens=9).values()) < 1e-10
    found = runs.telescoping(tokens=9)
    assert found["separable"] < 1e-10 and found["selective"] > 1e-3
    same = runs.equivalence(tokens=20)
    assert same["equivalent"] < 1e-10 and same["learnt"] > 0.01 and 0.9 < same["growth"] < 1
    assert runs.reversed_sigmoid() < 1e-10


def test_errors_of_the_series_are_those_of_its_definition():
    scores, value = torch.randn(2, 5, 5, dtype=torch.float64), torch.randn(2, 5, 3).double()
    (found,) = runs.series_errors(scores, value, [3])
    for head in range(2):
        whole, part = [], []
        for i in range(5):
            row = scores[head, i, : i + 1]
            exact, cut = row.exp(), 1 + row + row**2 / 2 + row**3 / 6
            whole.append(exact / exact.sum() @ value[head, : i + 1])
            part.append(cut / cut.sum() @ value[head, : i + 1])
        off = (torch.stack(part) - torch.stack(whole)).norm() / torch.stack(whole).norm()
        assert float(found[head]) == pytest.approx(float(off))


@pytest.mark.parametrize("order", [1, 8, 47, 64, 128])
def test_a_series_far_below_zero_is_exact(order):
    scores = [-60.25, -40.5, -13.0, -11.0, 0.0, 30.5]
    expected = [
        float(sum(Fraction(x) ** p / math.factorial(p) for p in range(order + 1))) for x in scores
    ]
    found = runs.series(torch.tensor(scores, dtype=torch.float64), order)
    close = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(found, close, rtol=1e-6, atol=1e-10)


def test_heads_of_a_model_are_read_as_it_attends():
    model = tiny_llama()
    model.tokenizer = lambda text: {"input_ids": list(range(1, 40))}
    heads, groups, dim = 4, 2, 16
    found = runs.pretrained_series(model, 12, (1, 40))
    assert len(found["errors"]) == len(found["largest"]) == 2 * heads
    for first, last in found[
        "errors"
    ]:  # small scores: many orders are the whole softmax, one is not
        assert last < 1e-8 < first
    layer = model.model.layers[0]
    with torch.no_grad():  # the first token is not turned, and sees itself alone
        hidden = layer.input_layernorm(model.model.embed_tokens(torch.tensor([1])))[0]
        query = layer.self_attn.q_proj(hidden).view(groups, heads // groups, dim)
        key = layer.self_attn.k_proj(hidden).view(groups, 1, dim)
    own = ((query * key).sum(-1).abs() * dim**-0.5).flatten()
    alone = runs.pretrained_series(model, 1, (1,))
    assert alone["largest"][:heads] == pytest.approx(own.tolist(), rel=1e-5)


def test_recall_asks_each_key_once_for_its_value():
    task = recalls.Recall(40, 64, 9)
    for row, asked, values in zip(
        *(part.tolist() for part in task.draw(50, torch.Generator().manual_seed(0))), strict=True
    ):
        pairs = dict(zip(row[0:18:2], row[1:18:2], strict=True))
        assert len(pairs) == 9 and len(set(pairs.values())) == 9
        assert all(1 <= k < 20 <= v < 40 for k, v in pairs.items())
        assert {row[i] for i in asked} == set(pairs)
        assert [pairs[row[i]] for i in asked] == values
        assert all(i >= 18 and i % 2 == 0 for i in asked)
        assert all(row[i] == 0 for i in range(18, 64) if i not in asked)


def test_early_places_are_asked_most():
    _, asked, _ = recalls.Recall(40, 64, 1).draw(4000, torch.Generator().manual_seed(0))
    shares = torch.bincount(((asked - 2) / 2).long().flatten(), minlength=31) / 4000
    odds = torch.arange(1.0, 32) ** -0.99
    expected = odds / odds.sum()
    assert float((shares - expected).abs().max()) < 4 * math.sqrt(0.25 / 4000)


def test_too_many_pairs_are_refused():
    with pytest.raises(InputError, match="pairs must be 1 or more"):
        recalls.Recall(40, 20, 6)
    with pytest.raises(InputError, match=r"keys \(3\)"):
        recalls.Recall(8, 64, 4)


def test_runs_trained_together_are_those_trained_alone():
    runs = [(1e-3, 0), (1e-2, 1), (1e-2, 0)]
    both = recalls.recall("linear", 4, TASK, FIT, runs)
    for i, run in enumerate(runs):
        alone = recalls.recall("linear", 4, TASK, FIT, [run])
        assert alone["loss"][0] == pytest.approx(both["loss"][i], abs=1e-4)
        assert len(both["loss"][i]) == FIT.steps


def test_the_rate_is_that_of_the_lowest_loss_of_another_seed():
    found = recalls.tuned_recall("linear", 4, TASK, FIT, [1, 2], [1e-5, 3e-2])
    assert found["rate"] == 3e-2
    assert found["right"] == recalls.recall("linear", 4, TASK, FIT, [(3e-2, 1), (3e-2, 2)])["right"]


def test_a_step_is_that_of_torch():
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    other = copy.deepcopy(model)
    optimiser = torch.optim.AdamW(
        [
            {"params": [other.weight], "weight_decay": 0.1},
            {"params": [other.bias], "weight_decay": 0.0},
        ],
        lr=0.01,
        betas=(0.9, 0.95),
    )
    stacked = {n: p.detach()[None].clone() for n, p in model.named_parameters()}
    moments = {n: (torch.zeros_like(p), torch.zeros_like(p)) for n, p in stacked.items()}
    for step in range(5):
        inputs = torch.randn(4, 3)
        optimiser.zero_grad()
        (10 * other(inputs)).square().mean().backward()
        own = {n: p.grad[None].clone() for n, p in other.named_parameters() if p.grad is not None}
        torch.nn.utils.clip_grad_norm_(other.parameters(), 1.0)
        optimiser.step()
        recalls._adamw(stacked, own, moments, torch.tensor([0.01]), step, 0.1)
    for name, parameter in other.named_parameters():
        torch.testing.assert_close(stacked[name][0], parameter.detach(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", recalls.MIXERS)
def test_every_mixer_learns_in_the_common_block(name):
    found = recalls.recall(
        name, 4, TASK, recalls.Fit(width=8, steps=20, batch=16, tested=50), [(3e-2, 0)]
    )
    (losses,) = found["loss"]
    assert losses[-1] < losses[0] and len(losses) == 20
    assert 0 <= found["right"][0] <= 100


def test_the_order_needed_is_the_one_from_which_errors_stay_small():
    count = len(dsf.LONG_ORDERS)
    rows = [
        [1.0] * 3 + [1e-5] * (count - 3),
        [1e-5, 1.0] + [1e-5] * (count - 2),
        [math.nan] * count,
    ]
    assert dsf.orders_needed(rows) == [dsf.LONG_ORDERS[3], dsf.LONG_ORDERS[2], 256]


def level(value: float) -> dict[str, Any]:
    return {"right": [value - 1, value, value + 1]}


def test_verdicts_follow_the_numbers(tmp_path):
    exp, plus, sig = dsf.ETAS

    def verdicts(**levels: float) -> dict[str, Any]:
        base = {
            "linear": 50.0, "SSD": 80.0, "softmax": 60.0, "plain": 20.0, "reverse": 40.0,
            "exp": 70.0, "plus": 60.0, "sig": 55.0,
        } | levels  # fmt: skip
        run = Run(dsf.PAPER, scale="quick", work=tmp_path)
        named = {"linear": "linear", "SSD": "SSD", "exp": exp, "plus": plus, "sig": sig}
        found = {
            name: {n: level(base[key] + n / 4) for n in dsf.MIDDLE} for key, name in named.items()
        }
        dsf.record_recall(run, found | {"softmax": {0: level(base["softmax"])}})
        gates = zip(dsf.GATES, ("plain", "reverse"), strict=True)
        dsf.record_gates(run, {name: {"(32, 4)": level(base[key])} for name, key in gates})
        return {name: one["holds"] for name, one in run.records.items()}

    good = verdicts(softmax=99.0)
    assert [name for name, holds in good.items() if not holds] == ["state"]  # 47 of 48 points left
    assert verdicts(softmax=53.0)["baseline"] is False
    assert verdicts(softmax=52.5)["state"] is True  # half a point of one and a half
    bad = verdicts(exp=40.0, reverse=10.0)
    assert [bad[name] for name in ("normalised", "exponential", "between", "reversed")] == [
        False
    ] * 4
    even = verdicts(SSD=50.0, exp=50.0, reverse=20.0)
    assert [even[name] for name in ("between", "normalised", "reversed")] == [None] * 3
