"""What the experiment on attention as a graph measures with: arms of equal size, text kept apart, a base that stays frozen."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fixtures_models import tiny_llama
from regard.nn import LanguageModel
from regard.papers import Run
from regard.papers import _graph_isomorphic_runs as runs
from regard.papers import graph_isomorphic as paper

TINY = runs.Size(width=24, length=16, batch=8, train=256, held_out=128, epochs=4, every=2)


def test_identities_hold() -> None:
    worst, wrong = runs.exact_differences()
    assert worst < 1e-12 and wrong == 0


def test_only_edges_that_do_not_sum_to_one_count_neighbours() -> None:
    found = runs.counting()
    assert {name for name, apart in found.items() if apart > 1e-3} == {
        "GIN, binary edges",
        "PNA, binary edges",
    }


@pytest.mark.parametrize("size", [runs.Size(), paper.SIZE])
def test_all_arms_have_about_the_parameters_of_the_reference(size: runs.Size) -> None:
    counts = {arm: runs.parameters(runs.make(arm, size)) for arm in runs.ARMS}
    for count in counts.values():
        assert abs(count / counts["reference"] - 1) < 0.01


def test_training_and_held_out_text_share_no_window() -> None:
    text = runs.bytes_of(runs.texts.prose(60_000))
    known, unseen = text[: paper.SIZE.train], text[-paper.SIZE.held_out :]
    windows = {tuple(row) for row in known.unfold(0, paper.SIZE.length, 1).tolist()}
    assert not windows & {tuple(row) for row in runs.windows(unseen, paper.SIZE.length).tolist()}


def test_a_fit_measures_what_it_says() -> None:
    found = runs.fit("GIN 0.5", 0, TINY)
    assert len(found["held out"]) == 2 and len(found["alpha"]) == TINY.layers
    assert found["held out"][-1] < 4.85  # log(128), knowing nothing
    assert found == runs.fit("GIN 0.5", 0, TINY)


def test_losses_are_those_of_the_model() -> None:
    model, rows = tiny_llama(), torch.randint(300, (3, 12))
    expected = [float(model(row[None], labels=row[None]).loss) for row in rows]
    assert runs.losses_of(model, rows) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("arm", ["neighbours", "self-loops", "LoRA"])
def test_adapting_learns_and_leaves_the_base_alone(arm: str) -> None:
    pytest.importorskip("peft")
    base: LanguageModel = runs.base_model(TINY, 80, seed=0)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    rows = runs.windows(runs.bytes_of(runs.texts.code(2_000)), TINY.length)
    put = runs.adapters(3, 2)[arm]
    found = runs.adapt(base, put, rows, rows[:20], rate=2e-2, steps=60, batch=8, seed=0, every=30)
    mean = [sum(losses) / len(losses) for losses in found["losses"]]
    assert len(mean) == 3 and mean[-1] < mean[0] - 0.05
    assert all(torch.equal(before[name], tensor) for name, tensor in base.state_dict().items())
    assert all(parameter.requires_grad for parameter in base.parameters())
    assert [len(scales) for scales in found["scales"]] == ([] if arm == "LoRA" else [2] * 61)


def test_adapters_of_the_experiment_have_about_equal_parameters() -> None:
    per_layer = lambda width, hidden: 2 * width * (hidden + 1) + 2 * hidden**2 + 3 * hidden + 3  # noqa: E731
    hidden, rank = paper.SMALL
    width = paper.SIZE.width
    assert per_layer(width, hidden) == pytest.approx(4 * width * rank, rel=0.01)
    hidden, rank = paper.SMOLLM2  # queries 576 -> 576, values 576 -> 192
    assert per_layer(576, hidden) == pytest.approx((2 * 576 + 576 + 192) * rank, rel=0.01)


def test_graphs_are_those_of_eager_attention() -> None:
    model, ids = tiny_llama(), torch.randint(300, (1, 20))
    found = runs.graphs(model, ids)
    model.set_attn_implementation("eager")
    maps = model(ids, output_attentions=True).attentions
    for layer, weights in enumerate(maps):
        edges = weights[0].sum(0) > 0.1 + torch.tensor(1.5).log() / 10
        pairs = edges.sum().item()
        assert found[layer]["density"] == pytest.approx(pairs / 210)
        assert found[layer]["loops"] == pytest.approx(edges.diagonal().sum().item() / pairs)
        assert found[layer]["to the first token"] == pytest.approx(edges[:, 0].sum().item() / pairs)


def test_problems_to_learn_and_to_judge_by_differ() -> None:
    train, unseen = (
        {one.question for one in runs.texts.arithmetic_problems(n, s)} for n, s in paper.PROBLEMS
    )
    assert not train & unseen


def made_fit(best: float, end: float, training: float, alpha: list[float]) -> dict:
    held = [best + 1, best, end]
    return {"held out": held, "training": training, "alpha": alpha, "parameters": 100}


def made_course(start: float, end: float, scales: list[list[float]]) -> dict:
    losses = [[level, level + 0.1] for level in (start, (start + end) / 2, end)]
    return {"losses": losses, "scales": scales, "parameters": 9}


def test_verdicts_follow_from_what_was_measured(tmp_path: Path) -> None:
    run = Run(paper.PAPER, scale="full", work=tmp_path)
    levels = {
        "reference": 2.5,
        "GIN 0.5": 2.3,
        "GIN 1": 2.4,
        "GIN 4": 2.6,
        "GIN 0.5 + W_o": 2.2,
        "PNA": 2.4,
    }
    fits = {
        arm: [made_fit(b + s / 100, b + 0.3, b - 1, [0.9, 1.1]) for s in range(3)]
        for arm, b in levels.items()
    }
    fits["GIN 0.5"] = [dict(one, training=2.0) for one in fits["GIN 0.5"]]
    paper.record_fits(run, paper.SIZE, fits)
    shrinking = [[0.0 - step / 9, 0.3 - step / 30, 0.5 + step / 90] for step in range(11)]
    ends = {"neighbours": 1.0, "self-loops": 1.1, "LoRA": 1.05}
    courses = {
        arm: {
            rate: [made_course(2.0, end + rate, [] if arm == "LoRA" else shrinking)] * 3
            for rate in (1e-3, 1e-2)
        }
        for arm, end in ends.items()
    }
    paper.record_small(run, paper.SIZE, courses)
    paper.record_smollm2(run, courses)
    here = {name: record["here"] for name, record in run.records.items()}
    assert here["perplexity"] == pytest.approx(0.2)
    assert here["gap"] == pytest.approx(1.3 - 0.6)
    assert here["lora"] == here["smollm2"] == pytest.approx(0.05)
    assert here["neighbours"] == pytest.approx(0.1)
    assert (here["variants"], here["course"], here["depth"]) == (3, 2, 1)
    assert {name for name, record in run.records.items() if not record["holds"]} == {
        "pna",  # ahead of the reference, made so
        "minimum",  # at the same epoch
    }
    assert here["falls"] < 0
    run.figure("training", paper.draw_training(paper.SIZE, fits))
    run.figure("adapting", paper.draw_adapting(courses, courses))
    layer = {"density": 0.1, "loops": 0.3, "to the first token": 0.5}
    run.figure("graphs", paper.draw_graphs([layer, layer, layer], courses))
    assert len(list(tmp_path.glob("*.svg"))) == 3
