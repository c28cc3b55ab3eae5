from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

VOCAB = 64


def tiny_llama(dtype: torch.dtype = torch.float64, **changes: object) -> LlamaForCausalLM:
    """3 layers, 6 query heads on 2 KV heads; weights large enough for heads to matter."""
    torch.manual_seed(1)
    settings = {
        "vocab_size": VOCAB,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "initializer_range": 0.2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": None,
    }
    return LlamaForCausalLM(LlamaConfig(**{**settings, **changes})).to(dtype).eval()


@pytest.fixture
def model() -> LlamaForCausalLM:
    return tiny_llama()


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(2, VOCAB, (2, 20), generator=torch.Generator().manual_seed(3))
