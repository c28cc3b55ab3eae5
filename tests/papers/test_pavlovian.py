"""The parts of the experiment: readers, effects, and the reading of heads in a live model."""

from __future__ import annotations

import math

import pytest
import torch

from regard.attach import attach
from regard.labs.pavlovian import KeyReader, head_capacity_report, safe_associations
from regard.nn import LanguageModel, LanguageModelConfig
from regard.papers import _pavlovian_runs as runs

SMALL = runs.Size(dim=6, cues=3, trials=8, steps=20, batch=8, runs=2, triples=10)


def model() -> LanguageModel:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    options = ("softmax", {"kv_heads": 2})
    made = LanguageModel(LanguageModelConfig(vocab_size=40, mixers=[options], **shape)).eval()
    made.tokenizer = Words()
    return made


class Words:
    """26 words, and tokens that are none."""

    def get_vocab(self) -> dict[str, int]:
        words = {f"Ġ{chr(ord('a') + i)}word": i for i in range(26)}
        return words | {"Ġab": 30, "word": 31, "ĠWord": 32, "Ġ1234": 33}

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": [{":": 34, "\n": 35}[text]]}


def test_words_are_whole_lower_case_common_and_begin_a_word():
    assert runs.common_words(Words()) == list(range(26))
    assert runs.common_words(Words(), 3) == [0, 1, 2]


def test_a_prompt_has_a_line_for_each_pair_and_asks_for_one():
    ids, places = runs.lines(Words(), [1, 2], [11, 12], 2)
    assert ids == [35, 1, 34, 11, 35, 2, 34, 12, 35, 2, 34]
    assert [ids[at] for at in places] == [11, 12]


def test_what_heads_do_is_what_dense_attention_does():
    made, ids = model(), torch.randint(26, (3, 7))
    slots = torch.tensor([1, 3, 5])
    reader, keys = runs.SlotReader(slots), KeyReader()
    with torch.no_grad(), attach(made, reader, keys):
        made(ids)
    calls: list[tuple[torch.Tensor, torch.Tensor]] = []

    class Keep(runs.Method):
        def before(self, call):
            calls.append((call.query, call.key))

    with torch.no_grad(), attach(made, Keep()):
        made(ids)
    for layer, (query, key) in enumerate(calls):
        torch.testing.assert_close(keys.keys[layer], key)
        scores = query[:, :, -1:] @ key.repeat_interleave(2, 1).mT * query.shape[-1] ** -0.5
        weights = scores.softmax(-1)[:, :, 0]
        expected = torch.stack([weights[i, :, slot] for i, slot in enumerate(slots)]).mean(0)
        torch.testing.assert_close(reader.mass[layer], expected)


def test_pairs_are_asked_for_once_and_every_head_is_described():
    found = runs.pairs_in_context(model(), 4, 5)
    assert found["pairs"] == 4 and 0 <= found["right"] <= 1
    assert len(found["mass"]) == len(found["safe"]) == 2 * 4
    assert found["safe"][0] == found["safe"][1] != found["safe"][2]
    assert max(found["safe"]) <= math.sqrt(4) + 1e-9
    assert found["right"] <= found["among"] <= 1
    assert found == runs.pairs_in_context(model(), 4, 5)


def test_a_model_that_copies_the_asked_value_is_always_right():
    made = model()

    class Copies(type(made)):
        def forward(self, ids, **options):
            output = super().forward(ids, **options)
            for row, logits in zip(ids, output.logits, strict=True):
                logits[-1, row[1 + (row[1:-2] == row[-2]).nonzero()[0, 0] + 2]] += 100
            return output

    made.__class__ = Copies
    found = runs.pairs_in_context(made, 4, 5)
    assert found["right"] == found["among"] == 1


def test_a_report_has_a_row_for_every_kv_head_from_the_keys_of_all_texts():
    made, ids = model(), torch.randint(26, (3, 7))
    reader = KeyReader()
    with torch.no_grad(), attach(made, reader):
        made(ids)
    rows = head_capacity_report(made, ids)
    assert [(row.layer, row.head) for row in rows] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    for row in rows:
        keys = torch.cat([text[row.head] for text in reader.keys[row.layer]])
        assert keys.shape == (21, 4)
        assert row.safe == pytest.approx(float(safe_associations(keys.double())))
        assert row.cross_talk * row.dimension == pytest.approx(1)
    (some, *_) = head_capacity_report(made, ids, torch.tensor([1, 4, 5]))
    keys = reader.keys[0][:, 0, [1, 4, 5]].flatten(0, 1).double()
    assert some.safe == pytest.approx(float(safe_associations(keys)))


def test_effects_are_shares_of_a_response():
    responses = {
        "blocked": [0.1],
        "control": [0.4],
        "shadowed": [0.5],
        "alone": [1.0],
        "extinguished": [0.0],
        "acquired": [0.8],
    }
    found = runs.indices(responses)
    assert found["blocking"] == [pytest.approx(0.75)]
    assert found["overshadowing"] == [0.5] and found["extinction"] == [1.0]


@pytest.mark.parametrize("name", list(runs.READERS))
def test_a_reader_is_trained_and_asked(name):
    found = runs.reader(name, SMALL)
    assert len(found["error"]) == len(found["responses"]["blocked"]) == 2
    assert all(math.isfinite(value) for value in found["losses"])
    assert found["losses"][0] != found["losses"][-1]


def test_hops_and_clean_up_agree_on_a_single_memory():
    found = runs.hops(64, 16, 2, 10)
    (one,) = runs.clean_up(16, (64,), 10)
    assert found["right"][0] == pytest.approx(one["accuracy"], abs=0.05)
    assert found["right"][1] < found["right"][0]
    assert all(
        vote["alone"] == pytest.approx(1 - one["accuracy"], abs=0.05)
        for vote in found["votes"].values()
    )


def test_a_rank_correlation_needs_points_and_has_an_interval():
    assert math.isnan(runs.rank_correlation([1.0, 2.0], [1.0, 2.0])["rho"])
    x = [float(i) for i in range(12)]
    fit = runs.rank_correlation(x, [v**3 for v in x], draws=200)
    assert fit["rho"] == 1 and fit["low"] == pytest.approx(1)
    noise = [3.0, 1.0, 4.0, 1.5, 9.0, 2.6, 5.0, 3.5, 8.0, 9.7, 9.3, 2.3]
    fit = runs.rank_correlation(x, noise, draws=200)
    assert fit["low"] < fit["rho"] < fit["high"]
