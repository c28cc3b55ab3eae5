"""Tasks whose answers are in the sample: each is checked against a solver that reads it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from regard._errors import InputError
from regard.labs import tasks
from regard.labs.tasks import IGNORED, TASKS, Samples, Task

SMALL: dict[str, Task] = {
    "recall": tasks.recall(vocabulary=32, length=40, pairs=6),
    "packed recall": tasks.recall(vocabulary=32, length=40, pairs=6, spread=False),
    "selective_copy": tasks.selective_copy(vocabulary=12, length=30, copied=5),
    "induction": tasks.induction(vocabulary=12, length=20),
    "needle": tasks.needle(vocabulary=16, length=40),
    "characters": tasks.characters(length=40),
}


def solve(name: str, ids: list[int]) -> list[int]:
    """The answers of one sample in the order in which they are asked, from its tokens before each question alone."""
    if name.endswith("recall"):
        known: dict[int, int] = {}
        answers = []
        for i, token in enumerate(ids[:-1]):
            if 1 <= token < 16:
                if token in known:
                    answers.append(known[token])
                known.setdefault(token, ids[i + 1])
        return answers
    if name == "selective_copy":
        mark = ids.index(1)
        return [token for token in ids[:mark] if token]
    if name == "induction":
        return [ids[ids.index(0) + 1]]
    return [ids[ids.index(1) + 1]]


@pytest.mark.parametrize("name", [name for name in SMALL if name != "characters"])
def test_the_answer_is_in_the_sample(name: str) -> None:
    samples = SMALL[name].draw(50, 3)
    for ids, labels in zip(samples.ids, samples.labels, strict=True):
        asked = labels != IGNORED
        assert torch.equal(ids[asked], labels[asked])
        assert solve(name, ids.tolist()) == labels[asked].tolist()


@pytest.mark.parametrize("task", SMALL.values(), ids=SMALL)
def test_draws(task: Task) -> None:
    samples = task.draw(20, 3)
    assert samples.ids.shape == samples.labels.shape == (20, task.length)
    assert int(samples.ids.min()) >= 0 and int(samples.ids.max()) < task.vocabulary
    assert torch.equal(samples.ids, task.draw(20, 3).ids)
    assert not torch.equal(samples.ids, task.draw(20, 4).ids)


class Oracle(nn.Module):
    """Gives each answer a probability of 1 - 2^-10, and the rest to the next token."""

    def __init__(self, samples: Samples, vocabulary: int, right: bool) -> None:
        super().__init__()
        self.samples, self.vocabulary, self.right = samples, vocabulary, right

    def forward(self, ids: torch.Tensor) -> object:
        following = ids.roll(-1, 1) if self.right else (ids.roll(-1, 1) + 1) % self.vocabulary
        logits = torch.full((*ids.shape, self.vocabulary), -100.0)
        return type("Output", (), {"logits": logits.scatter(-1, following[..., None], 0.0)})()


@pytest.mark.parametrize("task", SMALL.values(), ids=SMALL)
def test_measures_what_is_asked(task: Task) -> None:
    samples = task.draw(8, 0)
    right, nats = task.evaluate(Oracle(samples, task.vocabulary, True), count=8)
    assert right == 1 and nats < 1e-6
    wrong, lost = task.evaluate(Oracle(samples, task.vocabulary, False), count=8)
    assert wrong == 0 and lost == pytest.approx(100, rel=1e-4)


def test_held_out_text_is_not_trained_on() -> None:
    task = tasks.characters(length=64)
    held = bytes(task.draw(1, 0, held_out=True).ids[0].tolist())
    drawn = task.draw(3000, 1).ids
    assert held not in {bytes(row.tolist()) for row in drawn}
    text = bytes(tasks._bytes("prose").tolist())
    assert text.find(held) >= len(text) * 9 // 10 or text.count(held) > 1


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("recall", {"pairs": 0}),
        ("recall", {"pairs": 40}),
        ("selective_copy", {"copied": 200}),
        ("induction", {"length": 3}),
        ("needle", {"depth": (0.5, 0.2)}),
        ("characters", {"kind": "music"}),
    ],
)
def test_impossible_settings(name: str, settings: dict[str, object]) -> None:
    with pytest.raises(InputError):
        TASKS[name](**settings)
