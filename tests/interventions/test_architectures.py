"""Zeroing a head equals zeros in its columns of the output projection, whatever the architecture."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as t
from torch import Tensor, nn

import regard
from regard.attach import anatomy

TEXT: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "initializer_range": 0.2, "pad_token_id": 0,
}  # fmt: skip
GROUPED = {**TEXT, "num_key_value_heads": 2, "head_dim": 8}
IMAGE: dict[str, Any] = {
    "image_size": 8, "patch_size": 4, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "initializer_range": 0.2,
}  # fmt: skip
IDS = {"input_ids": torch.arange(2, 20).view(2, 9)}
PIXELS = {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 8 * 8).view(2, 3, 8, 8)}

FAMILIES: dict[str, tuple[Callable[[], nn.Module], dict[str, Tensor], str]] = {
    "mistral": (lambda: t.MistralForCausalLM(t.MistralConfig(**GROUPED, sliding_window=4)), IDS, ""),
    "qwen3": (lambda: t.Qwen3ForCausalLM(t.Qwen3Config(**GROUPED)), IDS, ""),
    "gemma2": (lambda: t.Gemma2ForCausalLM(t.Gemma2Config(**GROUPED)), IDS, ""),
    "gpt-neox": (lambda: t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**TEXT)), IDS, ""),
    "gpt2": (
        lambda: t.GPT2LMHeadModel(t.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, initializer_range=0.2)),
        IDS,
        "",
    ),
    "gpt-oss": (
        lambda: t.GptOssForCausalLM(t.GptOssConfig(**GROUPED, num_local_experts=2, num_experts_per_tok=1)),
        IDS,
        "",
    ),
    "bert": (lambda: t.BertForMaskedLM(t.BertConfig(**TEXT)), IDS, ""),
    "vit": (lambda: t.ViTForImageClassification(t.ViTConfig(**IMAGE)), PIXELS, ""),
    "t5-encoder": (
        lambda: t.T5ForConditionalGeneration(t.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)),
        {**IDS, "decoder_input_ids": IDS["input_ids"] + 3},
        "encoder",
    ),
}  # fmt: skip


def output(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_zeroing_equals_zero_columns(family):
    make, inputs, stack = FAMILIES[family]
    torch.manual_seed(0)
    model = make().eval()
    edited = copy.deepcopy(model)
    block = next(s for s in anatomy(edited) if s.name == stack).blocks[1]
    assert block.output_projection is not None
    weight = block.output_projection.weight
    (weight.data.T if hasattr(block.output_projection, "nf") else weight.data)[:, 16:24] = 0
    with regard.ablate(model, f"{stack}.L1H2" if stack else "L1H2"):
        ablated = output(model, inputs)
    torch.testing.assert_close(ablated, output(edited, inputs), atol=1e-5, rtol=1e-5)
    assert (ablated - output(model, inputs)).abs().max() > 1e-4
