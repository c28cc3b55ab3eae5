"""The trainer: learns, goes on where it was, and loses nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from regard._errors import InputError, ModelError
from regard.labs import tasks
from regard.labs.training import CHECKPOINT, train
from regard.nn import LanguageModel, LanguageModelConfig

TASK = tasks.induction(vocabulary=8, length=12)


def build() -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(
        LanguageModelConfig(
            vocab_size=8, hidden_size=32, num_hidden_layers=2, num_attention_heads=2
        )
    )


def test_learns_induction() -> None:
    model = build()
    training = train(model, TASK, steps=300, rate=3e-3)
    assert training.steps == 300
    assert not model.training
    (step, accuracy, nats) = training.held_out[-1]
    assert step == 300 and accuracy > 0.9 and nats < 0.5


def test_goes_on_where_it_was(tmp_path: Path) -> None:
    whole, parts = build(), build()
    expected = train(whole, TASK, steps=12, batch=4)
    first = train(parts, TASK, steps=12, batch=4, stop=5, out=tmp_path)
    assert first.steps == 5
    second = train(build(), TASK, steps=12, batch=4, out=tmp_path)
    assert second.losses == pytest.approx(expected.losses, abs=1e-6)
    third = build()
    assert train(third, TASK, steps=12, batch=4, out=tmp_path).losses == second.losses
    for a, b in zip(third.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_refuses_the_checkpoint_of_another_run(tmp_path: Path) -> None:
    train(build(), TASK, steps=2, batch=4, out=tmp_path)
    before = (tmp_path / CHECKPOINT).read_bytes()
    with pytest.raises(InputError, match=r"rate was 0\.001, now 0\.5"):
        train(build(), TASK, steps=2, batch=4, rate=0.5, out=tmp_path)
    other = LanguageModel(LanguageModelConfig(vocab_size=8, hidden_size=16, num_attention_heads=2))
    with pytest.raises(InputError, match="another shape"):
        train(other, TASK, steps=2, batch=4, out=tmp_path)
    assert (tmp_path / CHECKPOINT).read_bytes() == before


def test_stops_at_a_loss_that_is_not_finite() -> None:
    model = build()
    with torch.no_grad():
        model.norm.weight.fill_(float("inf"))
    with pytest.raises(ModelError, match="lower rate"):
        train(model, TASK, steps=2, batch=2)


@pytest.mark.parametrize("settings", [{"steps": 0}, {"rate": -1.0}, {"batch": 0}])
def test_impossible_settings(settings: dict[str, float]) -> None:
    with pytest.raises(InputError, match="above 0"):
        train(build(), TASK, **settings)  # type: ignore[arg-type]


def test_draws_its_curve() -> None:
    training = train(build(), TASK, steps=60, batch=2, measure_every=20)
    assert [step for step, _, _ in training.held_out] == [20, 40, 60]
    axes = training.plot()
    assert axes.get_xlabel() == "step" and len(axes.get_lines()) == 3
