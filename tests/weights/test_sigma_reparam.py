"""Converting whole models, training them, and folding them back."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, ViTConfig, ViTForImageClassification

from regard._errors import InputError
from regard.nn import LanguageModel, LanguageModelConfig, SigmaReparamConv2d, SigmaReparamLinear
from regard.weights import convert_sigma_reparam, fuse_sigma_reparam


def llama(tied: bool = True) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).eval()


def ids(*shape: int) -> torch.Tensor:
    return torch.randint(40, shape, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("tied", [True, False])
def test_a_pretrained_model_computes_what_it_did(tied):
    model = llama(tied)
    before = model(ids(2, 12)).logits
    converted = convert_sigma_reparam(model)
    assert len(converted) == 2 * 7 + (not tied)
    assert ("lm_head" in converted) == (not tied)
    torch.testing.assert_close(model(ids(2, 12)).logits, before, atol=1e-5, rtol=1e-5)
    assert fuse_sigma_reparam(model) == converted
    torch.testing.assert_close(model(ids(2, 12)).logits, before, atol=1e-5, rtol=1e-5)
    assert all(not isinstance(m, SigmaReparamLinear) for m in model.modules())


def test_trained_and_folded_it_generates_the_same_and_its_gammas_learn():
    model = llama()
    convert_sigma_reparam(model)
    model.train()
    gammas = {n: p.detach().clone() for n, p in model.named_parameters() if n.endswith("gamma")}
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0)
    losses = []
    for _ in range(30):
        loss = model(ids(4, 16), labels=ids(4, 16)).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.5
    assert all(not torch.equal(dict(model.named_parameters())[n], g) for n, g in gammas.items())
    model.eval()
    logits, text = (
        model(ids(2, 9)).logits,
        model.generate(ids(1, 5), max_new_tokens=8, do_sample=False),
    )
    fuse_sigma_reparam(model)
    torch.testing.assert_close(model(ids(2, 9)).logits, logits, atol=1e-6, rtol=1e-6)
    assert torch.equal(model.generate(ids(1, 5), max_new_tokens=8, do_sample=False), text)


def test_folded_it_saves_and_loads_as_the_model_it_was(tmp_path):
    model = llama()
    convert_sigma_reparam(model, gamma="one")
    logits = model(ids(1, 6)).logits
    fuse_sigma_reparam(model)
    model.save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(ids(1, 6)).logits, logits, atol=1e-6, rtol=1e-6)


def test_every_norm_is_one_when_gamma_is():
    model = llama()
    convert_sigma_reparam(model, gamma="one")
    for module in model.modules():
        if isinstance(module, SigmaReparamLinear):
            norm = torch.linalg.svdvals(module.weight.detach())[0]
            assert float(norm) == pytest.approx(1, abs=1e-5)


def test_vision_models_with_their_patch_embedding():
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=16,
        patch_size=4,
        num_channels=1,
    )
    model, images = ViTForImageClassification(config).eval(), torch.randn(2, 1, 16, 16)
    before = model(images).logits
    convert_sigma_reparam(model)
    assert any(isinstance(m, SigmaReparamConv2d) for m in model.modules())
    torch.testing.assert_close(model(images).logits, before, atol=1e-5, rtol=1e-5)
    fuse_sigma_reparam(model)
    torch.testing.assert_close(model(images).logits, before, atol=1e-5, rtol=1e-5)


def test_only_what_is_chosen_and_norms_when_asked():
    model = llama()
    converted = convert_sigma_reparam(
        model, lambda path: path.endswith(("q_proj", "k_proj")), remove_norms=True
    )
    assert {path.rsplit(".", 1)[1] for path in converted} == {"q_proj", "k_proj"}
    assert not any("Norm" in type(m).__name__ for m in model.modules())
    assert bool(model(ids(1, 5)).logits.isfinite().all())


def test_regards_own_models():
    torch.manual_seed(0)
    model = LanguageModel(
        LanguageModelConfig(vocab_size=40, hidden_size=32, num_hidden_layers=2)
    ).eval()
    before = model(ids(2, 10)).logits
    convert_sigma_reparam(model)
    torch.testing.assert_close(model(ids(2, 10)).logits, before, atol=1e-5, rtol=1e-5)


def test_shared_layers_stay_shared_and_attention_modules_are_left_whole():
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.ReLU(), shared, nn.MultiheadAttention(4, 2))
    assert convert_sigma_reparam(model) == ["0", "2"]
    assert model[0] is model[2]
    assert type(model[3].out_proj).__name__ == "NonDynamicallyQuantizableLinear"
    assert fuse_sigma_reparam(model) == ["0", "2"]
    assert model[0] is model[2]


def test_nothing_to_do_is_said():
    with pytest.raises(InputError, match="include"):
        convert_sigma_reparam(llama(), lambda path: False)
    with pytest.raises(InputError, match="fold"):
        fuse_sigma_reparam(llama())
