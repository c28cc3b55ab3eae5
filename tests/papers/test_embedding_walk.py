"""The parts of the experiment on a tiny decoder, against whole sequences read one by one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import regard
from regard._errors import InputError
from regard.labs.embedding_walk import SelfWeights, parameterless_logits
from regard.papers import _embedding_walk_runs as runs
from regard.papers.embedding_walk import sign


class Bytes:
    """A tokenizer of bytes, for one line or several."""

    is_fast = False

    def __call__(self, lines, add_special_tokens=False, return_tensors=None, **_):
        if isinstance(lines, str):
            ids = list(lines.encode()[:400])
            return {"input_ids": torch.tensor([ids]) if return_tensors else ids}
        return {"input_ids": [list(line.encode()) for line in lines]}

    def decode(self, ids):
        return bytes(ids).decode("latin1")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        tie_word_embeddings=True,
    )
    made = LlamaForCausalLM(config).eval()
    for parameter in made.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    made.tokenizer = Bytes()
    return made


def test_items_are_sentences_with_their_own_ending_and_three_others():
    made, endings = runs.items(40, seed=2)
    again, _ = runs.items(40, seed=2)
    assert made == again and len(endings) == 40
    for own, item in enumerate(made):
        assert item.endings[item.answer] == own
        assert len({endings[i] for i in item.endings}) == 4
        words = len(item.context.split()) + len(endings[own].split())
        assert len(item.context.split()) == round(0.6 * words) and 16 <= words <= 28
        assert endings[own].startswith(" ")
    assert len({item.answer for item in made}) == 4
    with pytest.raises(InputError, match="at most"):
        runs.items(10**5, seed=0)


def test_a_bag_of_words_finds_shared_words():
    endings = [" red house", " blue sky over it", " green", " tall trees"]
    item = runs.Item("the sky is blue and", (0, 1, 2, 3), 1)
    assert runs.bag_of_words([item], endings) == [True]
    assert runs.bag_of_words([runs.Item("the sky is blue and", (0, 1, 2, 3), 0)], endings) == [
        False
    ]


def test_similarity_chooses_the_largest_product_of_means(model):
    made, endings = runs.items(5, seed=0)
    kept = runs.Cell(2, "identity", "mean", "none", drop_first=False)
    found = runs.choices_by_similarity(model, made, endings, [0, 2], [kept])
    assert len(found) == 2 * 2 * 5 + 1

    def mean(text, layer, first):
        with torch.no_grad():
            ids = torch.tensor([list(text.encode())])
            hidden = model(ids, output_hidden_states=True).hidden_states[layer][0]
        return hidden[first:].mean(0)

    for cell, layer, first in ((str(kept), 2, 0), ("2 mean none", 2, 1), ("E mean none", 0, 1)):
        for item, right in zip(made, found[cell], strict=True):
            text = mean(item.context, layer, first)
            scores = [float(text @ mean(endings[i], layer, first)) for i in item.endings]
            assert right == (int(np.argmax(scores)) == item.answer)


def test_generation_behind_input_embeddings_is_ordinary_scoring(model):
    made, endings = runs.items(5, seed=0)
    made = made[:3]
    found = runs.choices_by_generation(model, made, endings, batch=2)
    assert set(found) == {"cross", "embedding mean", "top mean", "top all", "bare"}
    assert all(len(rows) == 3 for rows in found.values())
    for item, right in zip(made, found["cross"], strict=True):
        scores = []
        for i in item.endings:
            text, tail = list(item.context.encode()), list(endings[i].encode())
            with torch.no_grad():
                odds = model(torch.tensor([text + tail])).logits[0].log_softmax(-1)
            scores.append(sum(float(odds[len(text) - 1 + n, w]) for n, w in enumerate(tail)))
        assert right == (int(np.argmax(scores)) == item.answer)


def test_the_bare_score_sums_every_token_of_the_ending():
    generator = torch.Generator().manual_seed(0)
    front, table, output = (torch.randn(n, 4, generator=generator) for n in (3, 9, 9))
    tokens = torch.tensor([2, 5, 7])
    whole = parameterless_logits(torch.cat([front, table[tokens]])[None], output)[0]
    odds = whole.log_softmax(-1)
    wanted = sum(float(odds[2 + i, t]) for i, t in enumerate(tokens.tolist()))
    assert float(runs.bare_score(front, table, output, tokens)) == pytest.approx(wanted, abs=1e-5)


def test_walks_leave_the_first_token_out(model):
    found = runs.walks(model, 3, 10, seed=0)
    assert found["gap"] < 1e-5
    assert len(found["arrival"]) == 3 * 9 and max(found["arrival"]) <= 3
    assert len(found["attention"]) == 3 and len(found["turning"]) == 2
    assert all(one > 0 for one in found["order"]) and min(found["tortuosity"]) >= 1


def test_replaced_attention_is_that_of_a_model_with_such_weights(model):
    found = runs.replaced_attention(model, 2, 12, [0, 2], [0.5], seed=0)
    ids = runs.cut(model, runs.texts.prose(16 * 2 * 12 + 2000, seed=0), 12)[:2]
    with torch.no_grad():
        clean = [float(model(row[None], labels=row[None]).loss) for row in ids]
        with regard.attach(model, SelfWeights()):
            alone = [float(model(row[None], labels=row[None]).loss) for row in ids]
    np.testing.assert_allclose(found["clean"], clean, atol=1e-5)
    np.testing.assert_allclose(found["all"]["self only"], alone, atol=1e-5)
    assert len(found["by layer"]) == 2 and len(found["mixed"][0]) == 2
    assert found["by layer"][0] != found["by layer"][1]


def test_verdicts_of_intervals_and_bands():
    assert sign((0.1, 2.0)) is True and sign((-2.0, -0.1)) is False and sign((-1.0, 1.0)) is None
    low, high = runs.chance_band(500)
    guesses = (np.random.default_rng(0).random((4000, 500)) < 0.25).mean(1)
    assert ((guesses >= low) & (guesses <= high)).mean() == pytest.approx(0.95, abs=0.02)
    middle, (below, above) = runs.share([True] * 30 + [False] * 70)
    assert middle == 0.3 and 0.18 < below < 0.3 < above < 0.42
    found = {"a": [True, False, False], "b": [False, True, True], "c, first kept": [True] * 3}
    assert runs.best_cell(found, 1) == "a" and runs.best_cell(found, 3) == "b"
