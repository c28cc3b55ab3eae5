"""Adapters that vanish into the layers they were trained beside."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from fixtures_models import tiny_vision
from regard._errors import InputError
from regard.nn import VideoClassifier
from regard.weights import (
    AdapterPoint,
    LinearAdapter,
    attach_linear_adapters,
    merge_linear_adapters,
)
from regard.weights.linear_adapters import AdaptedLinear


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def trained(adapters: list[LinearAdapter]) -> None:
    """As if: every number of the adapters is drawn anew."""
    torch.manual_seed(1)
    for adapter in adapters:
        for parameter in adapter.parameters():
            parameter.data.normal_(0, 0.2)


def test_an_adapter_is_its_formula_and_its_matrix():
    torch.manual_seed(0)
    adapter = LinearAdapter(8, 3, scale=0.5).double()
    trained([adapter])
    z = torch.randn(5, 8, dtype=torch.float64)
    w1, b1, w2, b2 = (adapter.down.weight, adapter.down.bias, adapter.up.weight, adapter.up.bias)
    torch.testing.assert_close(adapter(z), z + 0.5 * ((z @ w1.T + b1) @ w2.T + b2))
    matrix, shift = adapter.matrix()
    torch.testing.assert_close(adapter(z), z @ matrix.T + shift)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("after", [True, False])
def test_a_layer_merges_on_both_sides(bias, before, after):
    torch.manual_seed(0)
    layer = AdaptedLinear(
        nn.Linear(6, 10, bias=bias),
        LinearAdapter(6, scale=0.5, dropout=0.5) if before else None,
        LinearAdapter(10, scale=1) if after else None,
    ).double()
    trained([a for a in (layer.before, layer.after) if a is not None])
    merged, z = layer.eval().merge(), torch.randn(4, 6, dtype=torch.float64)
    torch.testing.assert_close(merged(z), layer(z), rtol=0, atol=1e-12)
    assert torch.equal(layer.weight, merged.weight)
    assert (merged.bias is not None) == (bias or before or after)


@pytest.mark.parametrize("kind", ["clip", "vit"])
def test_a_video_model_merges_to_the_size_of_the_image_model(kind):
    tower = tiny_vision(kind)
    names = [name for name, _ in tower.named_parameters()]
    model = VideoClassifier(tower, 4, 3, {0: -1, 1: 1}).eval()
    clips = torch.randn(2, 4, 1, 8, 8)
    before = model(clips)
    adapters = attach_linear_adapters(tower, scale=0.5, dropout=0.1)
    assert len(adapters) == 2 * 4
    model.eval()
    assert torch.equal(model(clips), before)
    trained(adapters)
    adapted = model(clips)
    assert (adapted - before).abs().max() > 1e-3
    assert len(merge_linear_adapters(tower)) == 2 * 6
    torch.testing.assert_close(model(clips), adapted, rtol=0, atol=1e-5)
    assert [name for name, _ in tower.named_parameters()] == names


def test_a_language_model_takes_them_too():
    model, ids = llama(), torch.randint(60, (2, 7))
    before = model(ids).logits
    adapters = attach_linear_adapters(model)
    model.eval()
    assert len(adapters) == 8
    assert torch.equal(model(ids).logits, before)
    trained(adapters)
    adapted = model(ids).logits
    merge_linear_adapters(model)
    torch.testing.assert_close(model(ids).logits, adapted, rtol=1e-4, atol=1e-4)
    assert model.model.layers[0].self_attn.q_proj.bias is not None


def test_only_adapters_learn_and_siblings_share_one():
    model = llama()
    adapters = attach_linear_adapters(model, dropout=0.1)
    learning = {id(p) for p in model.parameters() if p.requires_grad}
    assert learning == {id(p) for adapter in adapters for p in adapter.parameters()}
    attention = model.model.layers[0].self_attn
    assert attention.q_proj.before is attention.k_proj.before is attention.v_proj.before
    trained(adapters)
    model.train()(torch.randint(60, (2, 7))).logits.square().sum().backward()
    for adapter in adapters:
        for parameter in adapter.parameters():
            assert parameter.grad is not None and parameter.grad.abs().max() > 0


def test_dropout_acts_in_training_alone():
    torch.manual_seed(0)
    adapter, z = LinearAdapter(8, dropout=0.5), torch.randn(3, 8)
    trained([adapter])
    assert not torch.equal(adapter.train()(z), adapter(z))
    assert torch.equal(adapter.eval()(z), adapter(z))


def test_a_trained_state_can_be_saved_and_merged_elsewhere():
    one, two = tiny_vision("clip"), tiny_vision("clip")
    trained(attach_linear_adapters(one, scale=0.5))
    attach_linear_adapters(two, scale=0.5)
    two.load_state_dict(copy.deepcopy(one.state_dict()))
    merge_linear_adapters(one)
    merge_linear_adapters(two)
    images = torch.randn(2, 1, 8, 8)
    assert torch.equal(
        one(pixel_values=images).last_hidden_state, two(pixel_values=images).last_hidden_state
    )


def test_what_does_not_fit_is_named():
    model = tiny_vision("clip")
    with pytest.raises(InputError, match="no linear layer called query"):
        attach_linear_adapters(model, [AdapterPoint("before", ("query",))])
    with pytest.raises(InputError, match="no linear adapters"):
        merge_linear_adapters(model)
    attach_linear_adapters(model)
    with pytest.raises(InputError, match="already"):
        attach_linear_adapters(model)
    unlike = nn.ModuleDict({"a": nn.Linear(4, 2), "b": nn.Linear(3, 2)})
    with pytest.raises(InputError, match="a, b share an adapter but read 4 and 3"):
        attach_linear_adapters(unlike, [AdapterPoint("before", ("a", "b"))])
    with pytest.raises(InputError, match="rank"):
        LinearAdapter(8, 0)
