"""Interpolated positions against fractional positions, and the way back."""

from __future__ import annotations

import pytest
import torch
from transformers import BertConfig, BertModel, LlamaForCausalLM

from fixtures_models import tiny_llama
from regard._errors import InputError, ModelError
from regard.weights import rope_interpolate

TOKENS = torch.arange(40).view(1, 40)


def test_positions_are_divided():
    model = tiny_llama()
    rotary, states = model.model.rotary_emb, torch.zeros(1)
    positions = torch.arange(40.0)[None]
    cos, sin = rotary(states, positions / 4)
    with rope_interpolate(model, 4):
        for found, expected in zip(rotary(states, positions), (cos, sin), strict=True):
            torch.testing.assert_close(found, expected)


def test_distances_that_stay_equal_give_equal_logits():
    """A model of positions 0, 4, 8, ... interpolated by 4 is the model of positions 0, 1, 2, ..."""
    model = tiny_llama()
    plain = model(TOKENS).logits
    with rope_interpolate(model, 4):
        spread = model(TOKENS, position_ids=4 * TOKENS).logits
        near = model(TOKENS).logits
    torch.testing.assert_close(spread, plain, atol=1e-5, rtol=1e-5)
    assert float((near - plain).abs().max()) > 1e-3


def test_everything_is_put_back_also_after_an_error():
    model = tiny_llama()
    plain, config = model(TOKENS).logits, model.config.to_dict()
    with pytest.raises(ZeroDivisionError), rope_interpolate(model, 4):
        raise ZeroDivisionError
    assert torch.equal(model(TOKENS).logits, plain)
    assert model.config.to_dict() == config


def test_factors_multiply_and_undo_in_reverse():
    model = tiny_llama()
    plain = model.model.rotary_emb.inv_freq.clone()
    two = rope_interpolate(model, 2)
    with rope_interpolate(model, 3):
        torch.testing.assert_close(model.model.rotary_emb.inv_freq, plain / 6)
        assert model.config.rope_parameters["factor"] == 6
    torch.testing.assert_close(model.model.rotary_emb.inv_freq, plain / 2)
    two.undo()
    two.undo()
    assert torch.equal(model.model.rotary_emb.inv_freq, plain)


def test_a_saved_model_is_loaded_with_the_same_positions(tmp_path):
    model = tiny_llama()
    with rope_interpolate(model, 4):
        expected = model(TOKENS).logits
        model.save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path).eval()
    assert again.config.max_position_embeddings == 1024
    torch.testing.assert_close(again(TOKENS).logits, expected)


def test_what_cannot_be_interpolated_is_refused():
    with pytest.raises(InputError, match="factor must be a number above 0, got 0"):
        rope_interpolate(tiny_llama(), 0.0)
    config = BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    with pytest.raises(ModelError, match="BertModel has no rotary embedding"):
        rope_interpolate(BertModel(config), 2.0)
    model = tiny_llama()
    model.model.rotary_emb.rope_type = "yarn"
    with pytest.raises(InputError, match="got rope_type 'yarn'"):
        rope_interpolate(model, 2.0)
