"""The test bed: a transformers model whose layers name their mixers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import regard
from regard._errors import InputError
from regard.instruments import Entropy
from regard.nn import MIXERS, DeconstructedLanguageModel, LanguageModel, LanguageModelConfig

LISTS = [[name] for name in sorted(MIXERS)] + [["softmax", ["sliding", {"window": 4}]]]

GIVEN_QK = {"random_qk", "fixed_text_qk", "static_qk"}
"""Mixers that need a model which gives them what queries and keys are made of."""


def build(mixers: list[object], **more: object) -> LanguageModel:
    torch.manual_seed(0)
    kind = LanguageModel
    if set(map(str, mixers)) & GIVEN_QK:
        kind, more = DeconstructedLanguageModel, {"fixed_text": list(range(40)), **more}
    return kind(
        LanguageModelConfig(
            vocab_size=50, hidden_size=32, num_hidden_layers=2, mixers=mixers, **more
        )
    ).eval()  # type: ignore[arg-type]


@pytest.fixture(params=LISTS, ids=str)
def model(request: pytest.FixtureRequest) -> LanguageModel:
    return build(request.param)


def ids(*shape: int) -> torch.Tensor:
    return torch.randint(50, shape, generator=torch.Generator().manual_seed(2))


def test_generates_what_it_would_without_a_memory(model: LanguageModel) -> None:
    prompt = ids(2, 9)
    found = model.generate(prompt, max_new_tokens=12, do_sample=False)
    plain = prompt
    for _ in range(12):
        plain = torch.cat([plain, model(plain).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(found, plain)


def test_generates_under_left_padding(model: LanguageModel) -> None:
    text, mask = ids(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    found = model.generate(text, attention_mask=mask, max_new_tokens=6, do_sample=False)
    alone = model.generate(text[:1, 4:], max_new_tokens=6, do_sample=False)
    assert torch.equal(found[0, 9:], alone[0, 5:])


def test_searches_with_beams(model: LanguageModel) -> None:
    settings = {"max_new_tokens": 5, "num_beams": 3, "do_sample": False}
    with_memory = model.generate(ids(2, 7), **settings)
    without = model.generate(ids(2, 7), use_cache=False, **settings)
    assert torch.equal(with_memory, without)


def test_saves_and_loads(model: LanguageModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    again = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(again(ids(1, 8)).logits, model(ids(1, 8)).logits)


def test_learns_a_sequence(model: LanguageModel) -> None:
    text = ids(4, 16)
    model.train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.01)
    losses = []
    for _ in range(40):
        loss = model(text, labels=text).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


def test_hybrid_is_a_list() -> None:
    model = build(["softmax", ["sliding", {"window": 4}]])
    assert [mixer.window for mixer in model.mixers] == [None, 4]  # type: ignore[attr-defined]


def test_instruments_attach() -> None:
    model, entropy = build(["softmax"]), Entropy()
    plain = model(ids(1, 12)).logits
    with regard.attach(model, entropy):
        assert torch.allclose(model(ids(1, 12)).logits, plain, atol=1e-5)
    assert entropy.compute() is not None


def test_bad_input() -> None:
    with pytest.raises(InputError, match="mixers"):
        LanguageModelConfig(mixers=[])
    with pytest.raises(InputError, match="hidden_size"):
        LanguageModelConfig(hidden_size=0)
    with pytest.raises(InputError, match="1 or more tokens"):
        build(["softmax"])(torch.zeros(1, 0, dtype=torch.long))
