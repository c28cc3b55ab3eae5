"""A tiny decoder whose attention is far from uniform, padded batches, and its dense float64 maps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor


@dataclass
class Dense:
    """One text of a batch, padding taken out: maps, keys and values of each layer in float64."""

    maps: list[Tensor]  # [heads, tokens, tokens]
    keys: list[Tensor]  # [kv_heads, tokens, dim]
    values: list[Tensor]
    queries: list[Tensor]  # before position encoding, scaled, [heads, tokens, dim]


@pytest.fixture(scope="module")
def model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.35,
        max_position_embeddings=512,
    )
    return LlamaForCausalLM(config).eval().double()


@pytest.fixture(params=["plain", "left", "right"])
def batch(request: pytest.FixtureRequest) -> tuple[Tensor, Tensor]:
    """Token ids and padding mask of two texts."""
    torch.manual_seed(6)
    ids = torch.randint(0, 64, (2, 40))
    mask = torch.ones(2, 40, dtype=torch.long)
    if request.param == "left":
        mask[1, :11] = 0
    if request.param == "right":
        mask[0, -9:] = 0
    return ids, mask


def dense(model: Any, ids: Tensor, mask: Tensor) -> list[Dense]:
    """Every text alone, without padding, through eager attention."""
    from transformers import DynamicCache

    found = []
    for row, own in zip(ids, mask.bool(), strict=True):
        cache: Any = DynamicCache(config=model.config)
        seen: list[Tensor] = []
        hooks = [
            layer.self_attn.q_proj.register_forward_hook(lambda m, i, o, s=seen: s.append(o))
            for layer in model.model.layers
        ]
        before = model.config._attn_implementation
        model.set_attn_implementation("eager")
        try:
            with torch.no_grad():
                out = model(row[own][None], past_key_values=cache, output_attentions=True)
        finally:
            model.set_attn_implementation(before)
            for hook in hooks:
                hook.remove()
        dim = model.config.head_dim
        queries = [q[0].unflatten(-1, (-1, dim)).transpose(0, 1) * dim**-0.5 for q in seen]
        found.append(
            Dense(
                [a[0] for a in out.attentions],
                [layer.keys[0] for layer in cache.layers],
                [layer.values[0] for layer in cache.layers],
                queries,
            )
        )
    return found
