"""The parts of the experiment against independent computations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from regard.papers import Run
from regard.papers import _zeroi2v_runs as runs
from regard.papers import zeroi2v as paper

TINY = runs.Scale(still_steps=1, steps=2, width=24, layers=1, batch=4, test=20)
PIXEL = (torch.ones(3, 8, 8), torch.tensor([1, 2, 3]))


def corners(clips: torch.Tensor) -> torch.Tensor:
    """The first row and column of what is bright, `[clips, frames, (across, down)]`."""
    bright = clips[:, :, 0] > 0
    return torch.stack([bright.any(2).int().argmax(-1), bright.any(3).int().argmax(-1)], -1)


def test_digits_move_as_their_label_says_and_stay_inside():
    clips, labels = runs.moving(PIXEL, 60, 3, torch.Generator().manual_seed(0))
    assert clips.shape == (60, 3, 1, 16, 16)
    assert (clips > 0).sum((2, 3, 4)).eq(64).all()
    steps = corners(clips).diff(dim=1)
    assert torch.equal(steps, torch.tensor(runs.DIRECTIONS)[labels][:, None].expand(60, 2, 2))
    assert labels.unique().tolist() == list(range(8))


def test_every_clip_is_there_backwards_under_the_opposite_direction():
    clips, labels = runs.reversal_closed(PIXEL, 40, 3, torch.Generator().manual_seed(0))
    assert torch.equal(clips[20:], clips[:20].flip(1))
    steps = corners(clips)[:, 1] - corners(clips)[:, 0]
    assert torch.equal(steps, torch.tensor(runs.DIRECTIONS)[labels])
    assert torch.equal(steps[20:], -steps[:20])


def test_still_digits_are_placed_everywhere_and_not_held_out():
    images, labels = runs.still(PIXEL, 300, torch.Generator().manual_seed(0))
    assert set(labels.tolist()) == {1, 2, 3}
    places = corners(images[:, None])[:, 0]
    assert (int(places.min()), int(places.max())) == (0, 8)
    digits = runs.digit_images()
    assert (len(digits.train[0]), len(digits.held[0])) == (1437, 360)


@pytest.mark.parametrize("name", runs.ARMS)
def test_an_arm_trains_what_it_says(name):
    torch.manual_seed(0)
    arm, tower = runs.ARMS[name], runs.new_vit(TINY)
    model = runs.prepared(tower, arm, TINY, 0)
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    adapters = [n for n in trained if ".before." in n or ".after." in n]
    assert bool(adapters) is arm.adapters
    assert ("time" in trained) is arm.timed
    frozen = [n for n, p in model.named_parameters() if not p.requires_grad]
    assert (not frozen) is arm.everything
    assert {"head.weight", "head.bias", "backbone.layernorm.weight"} <= set(trained)
    assert all(p.requires_grad for p in tower.parameters())


def test_a_run_measures_merging_and_order():
    torch.manual_seed(0)
    tower, digits = runs.new_vit(TINY), runs.digit_images()
    blind = runs.train_arm(tower, digits, runs.BLIND, 0, TINY)
    sees = runs.train_arm(tower, digits, runs.SEES, 0, TINY)
    assert blind["reordered"] < 1e-5 and blind["reversed"] < 1e-5
    assert sees["reversed"] > 1e-5 and sees["merged"] < 1e-5
    assert sees["parameters"] == sum(p.numel() for p in tower.parameters())
    assert sees == runs.train_arm(tower, digits, runs.SEES, 0, TINY)


def test_multiplications_are_those_of_the_image_model():
    assert runs.inference_cost(runs.new_vit(TINY), TINY, 1)["multiply-adds"] == 1


def test_matrices_decay_and_embeddings_norms_and_biases_do_not():
    model = runs.prepared(runs.new_vit(TINY), runs.Arm(timed=True), TINY, 0)
    model.backbone.requires_grad_(True)
    decayed, kept = ({id(p) for p in group["params"]} for group in runs.parameter_groups(model))
    names = {id(p): name for name, p in model.named_parameters()}
    assert decayed | kept == set(names) and not decayed & kept
    undecayed = {names[one] for one in kept}
    assert {"time", "head.bias", "backbone.layernorm.weight"} <= undecayed
    assert {"backbone.embeddings.cls_token", "backbone.embeddings.position_embeddings"} <= undecayed
    assert all(dict(model.named_parameters())[names[one]].ndim >= 2 for one in decayed)
    assert "head.weight" in {names[one] for one in decayed}


def verdicts(tmp_path: Path, accuracy: dict[str, list[float]]) -> dict[str, Any]:
    run = Run(paper.PAPER, scale="quick", work=tmp_path)
    one = {"reordered": 1e-7, "reversed": 1e-7, "merged": 1e-7, "parameters": 10}
    found = {n: [{**one, "accuracy": float(a)} for a in values] for n, values in accuracy.items()}
    paper.record_accuracy(run, found, TINY, 90.0)
    paper.record_cost(run, found, {"time": 1.05, "multiply-adds": 1.0}, 10)
    return {name: row["holds"] for name, row in run.records.items()}


def test_verdicts_follow_the_numbers(tmp_path):
    def recorded(blind: float, sees: float, full: float) -> dict[str, Any]:
        accuracy = {name: [blind] for name in runs.ARMS}
        return verdicts(tmp_path, accuracy | {runs.SEES: [sees], runs.ALL: [full]})

    good, bad, none = recorded(45, 90, 92), recorded(55, 60, 90), recorded(12, 13, 14)
    names = ("blind", "order", "ceiling", "embedding")
    assert [good[name] for name in names] == [True] * 4
    assert [bad[name] for name in names] == [False, False, False, True]
    assert [none[name] for name in names[1:]] == [None] * 3
    assert recorded(20, 90, 92)["order"] is None  # adapters that learn tell at least the axis
    assert good["merge"] and good["free"] and good["time"]


def test_a_verdict_needs_all_seeds(tmp_path):
    accuracy = {name: [40.0, 40.0] for name in runs.ARMS}
    accuracy |= {runs.SEES: [70.0, 55.0], runs.ALL: [90.0, 90.0]}
    holds = verdicts(tmp_path, accuracy)
    assert (holds["order"], holds["ceiling"], holds["embedding"]) == (None, False, True)
