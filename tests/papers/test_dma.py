"""The parts of the dynamic-mask experiment: ways to choose keys, tasks, and the separation measured."""

from __future__ import annotations

import pytest
import torch
from sklearn.metrics import roc_auc_score

from regard.labs.tasks import IGNORED, recall
from regard.nn import SlidingWindowAttention
from regard.ops import dynamic_mask, lifetimes
from regard.papers import _dma_runs as runs


def test_equal_importance_is_a_sliding_window() -> None:
    ours, plain = runs.SlidingChoice(32, 4, window=6), SlidingWindowAttention(32, 4, window=6)
    torch.nn.init.constant_(ours.q_norm.weight, 1.0)
    hidden = torch.randn(2, 20, 32)
    mask = dynamic_mask(lifetimes(torch.zeros(1, 4, 20), 6), torch.arange(20))[0, 0]
    band = torch.ones(20, 20, dtype=torch.bool).tril() & torch.ones(20, 20, dtype=torch.bool).triu(
        -5
    )
    assert torch.equal(mask, band)
    plain.load_state_dict({k: v for k, v in ours.state_dict().items() if k in plain.state_dict()})
    # the same but for the norms of queries and keys, which a constant score would hide
    torch.nn.init.zeros_(ours.q_proj.weight)
    torch.nn.init.zeros_(plain.q_proj.weight)
    torch.testing.assert_close(ours(hidden), plain(hidden), atol=1e-6, rtol=1e-5)


def test_every_choice_starts_from_the_same_weights() -> None:
    task, size = recall(16, 24, 2), runs.Size(steps=1, width=32)
    models = [runs.build(task, size, choice, 3) for choice in runs.choices(8, 24).values()]
    first = models[0].state_dict()
    for model in models[1:]:
        state = model.state_dict()
        assert all(torch.equal(first[name], state[name]) for name in first)
    windows = [model.mixers[0].window + model.mixers[0].local for model in models]  # type: ignore[operator]
    assert windows == [24, 8, 8, 8, 8, 8]


def test_separation_is_the_area_under_the_curve() -> None:
    scores, positive = torch.randint(0, 9, (200,)).float(), torch.rand(200) > 0.7
    assert runs.auc(scores, positive) == pytest.approx(roc_auc_score(positive, scores))
    assert runs.auc(positive.float(), positive) == 1.0
    assert runs.auc(torch.zeros(200), positive) == 0.5


def test_copying_asks_for_every_token_but_the_first() -> None:
    samples = runs.copying(16, 20).draw(5, 0)
    assert torch.equal(samples.ids[:, :10], samples.ids[:, 10:])
    assert (samples.labels[:, :11] == IGNORED).all()
    assert torch.equal(samples.labels[:, 11:], samples.ids[:, 11:])


def test_the_difference_from_doge_is_small() -> None:
    pytest.importorskip("transformers.models.doge", reason="no Doge in transformers")
    found = runs.doge_difference(1)
    assert found is not None and 0 < max(found.values()) < 1e-6


def test_speed_times_every_part() -> None:
    assert all(seconds > 0 for seconds in runs.speed(64, 8, 1).values())
