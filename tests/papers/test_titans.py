"""What the Titans experiment measures with: its task gives nothing away, and its loop is the paper's recurrence."""

from __future__ import annotations

import torch

from regard.nn import LanguageModel, LanguageModelConfig
from regard.ops import FastWeights, fast_weight_scan
from regard.papers._titans_runs import (
    by_the_token,
    overwritten,
    recall_curve,
    silence,
    told,
    told_once,
)


def test_the_value_is_told_once_and_never_shown_again() -> None:
    samples = told_once(64, 6, values=8).draw(50, 0)
    asked = samples.labels >= 0
    assert (asked.sum(1) == 6).all()
    for ids, labels, chosen in zip(samples.ids, samples.labels, asked, strict=True):
        value = labels[chosen].unique()
        assert len(value) == 1
        (place,) = (ids >= 16).nonzero().flatten().tolist()
        assert ids[place] == value and ids[place - 1] == 1
        assert place < 16 and chosen.nonzero().min() > 32
        assert (ids[chosen.nonzero().flatten() - 1] == 2).all()


def test_the_loop_is_the_chunked_form() -> None:
    parts, initial = told(30, 4, batch=2, heads=2, double=True)
    chunked, _ = fast_weight_scan(memory=FastWeights.begin(initial, 2), chunk=8, **parts)
    torch.testing.assert_close(by_the_token(initial=initial, chunk=8, **parts), chunked)


def test_a_lone_pair_is_stored_whole() -> None:
    for depth in (1, 2):
        assert recall_curve([1], depth=depth, dim=8, rows=1)[0] > 0.999


def test_linear_attention_cannot_tell_first_from_last() -> None:
    first, last = overwritten({"depth": 1, "chunk": 10**6}, rows=32)
    assert abs(first - last) < 0.1
    first, last = overwritten({"depth": 1, "chunk": 1}, rows=32)
    assert last - first > 0.5


def test_silencing_takes_the_memory_out() -> None:
    config = LanguageModelConfig(
        vocab_size=20,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        mixers=[("memory_as_gate", {"window": 4})],
    )
    model = LanguageModel(config).eval()
    ids = torch.randint(20, (1, 40))
    other = ids.clone()
    other[:, 2] = (ids[:, 2] + 1) % 20
    assert not torch.equal(model(ids).logits[:, -1], model(other).logits[:, -1])
    silence(model)
    torch.testing.assert_close(model(ids).logits[:, -1], model(other).logits[:, -1])
