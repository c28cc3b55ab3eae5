"""The parts of the experiment: facts of the world, the language model's data, and the ablations."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from regard.labs.filtering_storing import FilteringStoring
from regard.nn import LanguageModel, LanguageModelConfig
from regard.papers import _filtering_storing_runs as runs
from regard.papers._filtering_storing_facts import CAPITALS, QUESTION, TEMPLATES

SMALL = FilteringStoring(
    subjects=12, templates=(6,), multiplicities=(1, 3), finetuned=(4,), width=32, steps=120, seeds=2
)


def test_every_capital_is_private_to_its_country():
    names = [name for pair in CAPITALS for name in pair]
    assert len(CAPITALS) == 100 and len(set(names)) == 200
    assert dict(CAPITALS)["Norway"] == "Oslo" and dict(CAPITALS)["Uruguay"] == "Montevideo"


def test_templates_name_the_country_before_the_capital_and_never_ask():
    asked = {word for word in QUESTION.split() if not word.startswith("{")}
    for text in TEMPLATES:
        words = text.split()
        assert words[0] == "{country}" and words[-1] == "{capital}"
        assert not asked & set(words)
    assert len(set(TEMPLATES)) == 12


def test_words_are_numbered_once_and_sentences_padded_on_the_right():
    words = runs.Words()
    row = words.encode(TEMPLATES[0], "Costa Rica", "San Jose")
    assert row[0] == words.number["Costa Rica"] and row[-1] == words.number["San Jose"]
    assert 0 not in row and max(words.number.values()) == len(words) - 1
    batch = words.batch([row, row[:2]])
    assert batch.shape == (2, len(row)) and batch[1, 2:].tolist() == [0] * (len(row) - 2)


def test_the_language_model_learns_its_sentences_and_repeats():
    size = runs.Size(
        layers=1, width=32, heads=2, steps=120, batch=20, tuning_steps=10, asked=4, countries=8
    )
    one, two = (runs.countries(size, 2, 3) for _ in range(2))
    assert one == two
    assert one["stored"] > 0.5
    assert one["fine-tuning loss"] < 6
    assert {one[key] >= 0 for key in ("seen", "unseen")} == {True}


def test_right_counts_the_last_words():
    class Fixed(LanguageModel):
        def forward(self, ids, **ignored):
            logits = torch.zeros(*ids.shape, 9)
            logits[..., 5] = 1.0
            return type("Output", (), {"logits": logits})

    model = Fixed(LanguageModelConfig(vocab_size=9, hidden_size=4, num_attention_heads=1))
    rows = [[1, 2, 5], [1, 3, 4], [2, 5], [2, 5]]
    assert runs._right(model, rows) == 3 / 4


def test_variants_begin_at_the_same_model_and_differ_by_how_they_are_tuned():
    found = runs.variants(SMALL, 6, 3, count=4, ranks=(1, 2))
    assert set(found) == {"full", "falling", "rank 1", "rank 2", "adam"}
    starts = [one["course"][0] for one in found.values()]
    np.testing.assert_allclose(starts, starts[0], rtol=1e-5)
    third = SMALL.finetune_steps // 3
    assert found["full"]["course"][:third] == found["falling"]["course"][:third]
    assert found["full"]["course"][-1] != found["falling"]["course"][-1]
    assert min(found["full"]["seen"]) == 1


def test_with_and_without_an_mlp_the_same_facts_are_learnt():
    found = runs.without_mlp(SMALL, 6, 3)
    for name in ("attention", "mlp"):
        assert len(found[name]["unseen"]) == 2
        assert min(found[name]["after subject"]) > -1e-5
    assert max(found["mlp"]["after template"]) < min(found["attention"]["after template"])


@pytest.mark.parametrize("count", [1, 3])
def test_a_cell_repeats(count):
    assert SMALL.cell(6, count) == SMALL.cell(6, count)
