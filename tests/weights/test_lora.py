"""The adapters against LoRA's formula, and what is trained, saved and given back."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from fixtures_models import tiny_llama
from regard._errors import InputError
from regard.weights import lora

TOKENS = torch.arange(40).view(2, 20)


def trained(model):
    """Three steps, so that every adapter and copy is off its start."""
    chosen = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(chosen, 1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("tied", [False, True])
def test_adapters_embeddings_and_norms_are_trained_and_nothing_else(tied):
    base = tiny_llama()
    base.config.tie_word_embeddings = tied
    if tied:
        base.tie_weights()
    adapted = lora(base, r=4)
    names = {n for n, p in adapted.named_parameters() if p.requires_grad}
    assert all("lora_" in n or "embed_tokens" in n or "norm" in n for n in names)
    assert sum("lora_A" in n for n in names) == 2 * 4  # layers x projections
    assert sum("norm" in n for n in names) == 5
    assert all(p.shape[0] == 4 for n, p in adapted.named_parameters() if "lora_A" in n)
    frozen = {n: p.clone() for n, p in adapted.named_parameters() if not p.requires_grad}
    trained(adapted)
    moved = dict(adapted.named_parameters())
    assert all(torch.equal(moved[n], p) for n, p in frozen.items())


def test_a_projection_is_the_formula():
    adapted = trained(lora(tiny_llama(), r=3, alpha=12))
    layer = adapted.base_model.model.model.layers[1].self_attn.k_proj
    states = torch.randn(5, 64)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    expected = states @ layer.base_layer.weight.T + 12 / 3 * states @ a.T @ b.T
    assert bool((b != 0).any())
    torch.testing.assert_close(layer(states), expected)


def test_the_untouched_model_stays_and_the_trained_one_is_saved(tmp_path):
    from peft import PeftModel

    base = tiny_llama()
    plain = base(TOKENS).logits
    adapted = lora(base)
    assert torch.equal(adapted(TOKENS).logits, plain)  # B is zero
    after = trained(adapted)(TOKENS).logits
    assert float((after - plain).abs().max()) > 1e-2
    with adapted.disable_adapter():
        assert torch.equal(adapted(TOKENS).logits, plain)
    adapted.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").is_file()
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    torch.testing.assert_close(again(TOKENS).logits, after)
    torch.testing.assert_close(again.merge_and_unload()(TOKENS).logits, after, atol=1e-5, rtol=1e-5)


def test_without_extra_only_the_adapters_are_trained():
    adapted = lora(tiny_llama(), r=2, extra=())
    names = [n for n, p in adapted.named_parameters() if p.requires_grad]
    assert names and all("lora_" in n for n in names)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"targets": ("c_attn",)}, r"got 'c_attn'; it has .*q_proj"),
        ({"targets": ()}, "targets must be at least one name"),
        ({"extra": ("position",)}, r"got 'position'; it has .*embed_tokens"),
        ({"r": 0}, "r must be a rank of at least 1, got 0"),
    ],
)
def test_names_that_fit_nothing_are_refused(settings, said):
    with pytest.raises(InputError, match=said):
        lora(tiny_llama(), **settings)


def test_without_peft_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"needs the package peft.*pip install 'regard\[train\]'"):
        lora(tiny_llama())
