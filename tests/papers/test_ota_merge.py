"""What the OTA experiment measures with: its tasks, its grafts, and verdicts that follow the numbers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from regard.labs.tasks import IGNORED
from regard.papers import Run
from regard.papers import _ota_merge_runs as runs
from regard.papers.ota_merge import PAPER, record_grafts, record_masks, record_merges

SMALL = runs.Size(width=16, layers=1, base_steps=2, steps=2, asked=20)


@pytest.fixture(scope="module")
def found() -> runs.Family:
    return runs.family(SMALL, 0)


def text(ids: torch.Tensor) -> str:
    return "".join("0123456789+=RS."[token] for token in ids.tolist())


def test_the_tasks_are_what_they_say() -> None:
    for name, task in runs.tasks().items():
        samples = task.draw(200, 0)
        for ids, labels in zip(samples.ids, samples.labels, strict=True):
            given, answer = text(ids).rstrip(".").split("=")
            assert text(labels[labels != IGNORED]) == answer
            assert torch.equal(ids[labels != IGNORED], labels[labels != IGNORED])
            if name == "addition":
                assert int(answer[::-1]) == sum(map(int, given.split("+")))
            elif name == "reversal":
                assert given == "R" + answer[::-1]
            else:
                assert given[0] == "S" and sorted(given[1:]) == list(answer)


def test_held_out_sums_are_never_trained_on() -> None:
    task = runs.tasks()["addition"]
    pairs = [
        {text(ids[:6]) for ids in task.draw(20_000, 0, held_out=held).ids} for held in (False, True)
    ]
    assert len(pairs[1]) > 900 and not pairs[0] & pairs[1]


def test_exact_match_wants_the_whole_answer(found: runs.Family) -> None:
    task = runs.tasks()["sorting"]
    samples = task.draw(50, 3, held_out=True)

    class Oracle(torch.nn.Module):
        wrong = 0

        def forward(self, ids: torch.Tensor) -> Any:
            logits = torch.nn.functional.one_hot(ids.roll(-1, 1), runs.VOCABULARY).float()
            logits[: self.wrong, -2] = torch.eye(runs.VOCABULARY)[runs.END]
            return type("Output", (), {"logits": logits})

    oracle: Any = Oracle()
    assert runs.exact_match(oracle, task, 50, 3) == 100
    oracle.wrong = 10  # one digit of six
    assert runs.exact_match(oracle, task, 50, 3) == 80
    assert len(samples.ids) == 50


def test_experts_start_from_the_base_and_keep_their_moments(found: runs.Family) -> None:
    assert len(found.experts) == len(found.moments) == 3
    for expert, moments in zip(found.experts, found.moments, strict=True):
        assert expert.keys() == moments.keys() == found.base.keys()
        assert any(not torch.equal(expert[n], found.base[n]) for n in expert)
    first, second = found.experts[:2]
    assert any(not torch.equal(first[n], second[n]) for n in first)


@pytest.mark.parametrize("kind", runs.KINDS)
def test_grafts_keep_the_share_that_they_say(kind: str, found: runs.Family) -> None:
    grafted = runs.grafts(found, 1, kind, 0.3)
    base, expert = found.base, found.experts[1]
    kept = sum(int((grafted[n] != base[n]).sum()) for n in base)
    changed = sum(int((expert[n] != base[n]).sum()) for n in base)
    total = sum(t.numel() for t in base.values())
    assert all(((grafted[n] == base[n]) | (grafted[n] == expert[n])).all() for n in base)
    assert kept / total == pytest.approx(0.3, abs=0.02) and kept < changed
    whole = runs.grafts(found, 1, kind, 1.0)
    assert all(torch.equal(whole[n], expert[n]) for n in base)


def test_a_graft_by_size_keeps_the_largest_edits(found: runs.Family) -> None:
    grafted, base, expert = runs.grafts(found, 0, "size", 0.2), found.base, found.experts[0]
    kept = {n: grafted[n] != base[n] for n in base}
    edits = {n: (expert[n] - base[n]).abs() for n in base}
    least = min(float(edits[n][kept[n]].min()) for n in base if kept[n].any())
    assert least >= max(float(edits[n][~kept[n]].max()) for n in base if (~kept[n]).any())


def test_all_experts_grafted_whole_merge_as_without_grafts(found: runs.Family) -> None:
    made = runs.merges(found, [1.0] * 3, 10)
    for name in found.base:
        torch.testing.assert_close(made["FFG + linear"][name], made["linear"][name])
        torch.testing.assert_close(made["OTA + FFG"][name], made["OTA"][name])
        torch.testing.assert_close(made["FFG + TIES"][name], made["TIES"][name])
    assert any(not torch.equal(made["OTA"][n], made["linear"][n]) for n in found.base)


def test_through_files_nothing_changes(found: runs.Family, tmp_path: Path) -> None:
    here = runs.through_files(found, [0.3, 0.4, 0.5], tmp_path)
    assert here["merged"] == 0 and here["moments"] < 1e-5
    assert here["whole"] == 4 * sum(v.numel() for v in found.moments[0].values())
    assert here["compressed"] < here["whole"] / 2


def test_shuffled_moments_are_less_alike() -> None:
    common = torch.rand(40, 40, generator=torch.Generator().manual_seed(0)) ** 4
    shared = runs.shared_curvature([{"w": common}, {"w": 3 * common}])
    assert shared["cosine"] == pytest.approx(1) and shared["ranks"] == pytest.approx(1)
    assert shared["cosine, shuffled"] < 0.9 and abs(shared["ranks, shuffled"]) < 0.1


def test_only_power_one_is_the_least_point() -> None:
    gaps = runs.quadratic_gaps(0)
    assert gaps["power 1"] < 1e-10 < 1e-3 < gaps["power 0.5"]


def invented(**scores: float) -> dict[str, Any]:
    """Numbers of a family in which every model has one score."""
    names = [
        "base", "trained on all", "linear", "task arithmetic", "TIES", "DARE-TIES", "Fisher", "OTA",
        "FFG + linear", "FFG + TIES", "OTA + FFG", "OTA + FFG, rank 1", "addition expert",
        "reversal expert", "sorting expert",
    ]  # fmt: skip
    levels = {"trained on all": 95.0, "OTA + FFG": 70.0, "FFG + linear": 66.0}
    levels |= {name: 99.0 for name in names if name.endswith("expert")} | scores
    return {
        "densities": [0.4, 0.4, 0.4],
        "scores": {name: [levels.get(name, 60.0)] * 3 for name in names},
        "grafts": {
            "curvature": [50.0] * len(runs.GRID),
            "size": [40.0] * len(runs.GRID),
            "random": [10.0] * len(runs.GRID),
        },
        "masks": {
            "roles": dict.fromkeys((*runs.MATRICES, "embedding", "norm"), 0.3) | {"query": 0.1},
            "layers": [],
            "rank": 0.8,
            "empty": 0.1,
            "chance empty": 0.0,
        },
        "curvature": {"cosine": 0.9, "cosine, shuffled": 0.8, "ranks": 0.7, "ranks, shuffled": 0.1},
    }


def verdicts(tmp_path: Path, one: dict[str, Any]) -> dict[str, Any]:
    run = Run(PAPER, scale="full", work=tmp_path)
    for record in (record_grafts, record_merges, record_masks):
        record(run, [one, one], "invented")
    assert all(math.isfinite(end) for r in run.records.values() for end in r["interval"] or ())
    return {claim: row["holds"] for claim, row in run.records.items()}


def test_verdicts_follow_the_numbers(tmp_path: Path) -> None:
    good = verdicts(tmp_path, invented())
    assert good == {
        "graft": True, "merge": True, "best": True, "driver": True, "alone": True,
        "rank-one": False, "together": True, "roles": False, "embeddings": False, "low-rank": True,
        "curvature": True,
    }  # fmt: skip
    worse = invented(**{"OTA + FFG": 55.0, "TIES": 80.0, "OTA": 50.0, "trained on all": 50.0})
    worse["grafts"]["curvature"] = [30.0] * len(runs.GRID)
    worse["masks"] |= {"rank": 0.95}
    worse["curvature"]["cosine"] = 0.6
    bad = verdicts(tmp_path, worse)
    assert not any(bad[c] for c in ("graft", "merge", "best", "alone", "together", "low-rank"))
    assert bad["driver"] is None and bad["curvature"] is False and bad["graft"] is False
    unlearnt = invented(**{"addition expert": 60.0})
    assert verdicts(tmp_path, unlearnt)["merge"] is None
    mixed = invented()
    mixed["grafts"]["curvature"][runs.GRID.index(0.1)] = 0.0
    assert verdicts(tmp_path, mixed)["graft"] is None
