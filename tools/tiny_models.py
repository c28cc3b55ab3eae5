"""Tiny random-weight models of every architecture that transformers can build from a configuration.

`tiny_config(model_type)` takes a family's default configuration and shrinks whatever it declares: layers, widths, heads,
experts, vocabulary, images. Families that need a particular combination of numbers have an entry in `SETTINGS`.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

SMALL: dict[str, Any] = {
    **dict.fromkeys(
        ("vocab_size", "decoder_vocab_size", "vocab_size_per_layer_input", "unpadded_vocab_size"),
        99,
    ),
    **dict.fromkeys(
        ("hidden_size", "d_model", "n_embd", "emb_dim", "word_embed_proj_dim", "embedding_size"), 32
    ),
    **dict.fromkeys(
        ("input_embedding_size", "output_embedding_size", "projection_dim", "backbone_hidden_size"),
        32,
    ),
    **dict.fromkeys(
        (
            "depth",
            "num_global_layers",
            "num_hidden_layers",
            "num_layers",
            "n_layer",
            "n_layers",
            "encoder_layers",
            "decoder_layers",
        ),
        2,
    ),
    **dict.fromkeys(
        ("num_encoder_layers", "num_decoder_layers", "num_layers_per_stack", "num_blocks"), 2
    ),
    **dict.fromkeys(
        ("num_attention_heads", "num_heads", "n_head", "n_heads", "attention_heads"), 4
    ),
    **dict.fromkeys(
        ("encoder_attention_heads", "decoder_attention_heads", "num_encoder_attention_heads"), 4
    ),
    **dict.fromkeys(("num_decoder_attention_heads", "swa_num_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads"), 2),
    **dict.fromkeys(
        ("head_dim", "swa_head_dim", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), 8
    ),
    **dict.fromkeys(("dim_head", "d_head", "kv_channels", "attention_head_size", "d_kv"), 8),
    **dict.fromkeys(
        (
            "q_lora_rank",
            "kv_lora_rank",
            "o_lora_rank",
            "laurel_rank",
            "hc_lowrank",
            "gated_norm_rank",
        ),
        16,
    ),
    **dict.fromkeys(
        (
            "intermediate_size",
            "ffn_dim",
            "d_ff",
            "n_inner",
            "ffn_hidden_size",
            "dff",
            "dim_ff",
            "d_inner",
        ),
        48,
    ),
    **dict.fromkeys(
        ("encoder_ffn_dim", "decoder_ffn_dim", "intermediate_size_mlp", "dense_intermediate_size"),
        48,
    ),
    **dict.fromkeys(
        ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_target_positions"),
        128,
    ),
    **dict.fromkeys(("sliding_window", "sliding_window_size", "local_attention", "window_size"), 6),
    **dict.fromkeys(
        ("attention_chunk_size", "attention_window_size", "local_attention_window_len"), 8
    ),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(
        (
            "n_group",
            "topk_group",
            "n_shared_experts",
            "num_shared_experts",
            "moe_num_shared_experts",
        ),
        1,
    ),
    **dict.fromkeys(
        ("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 16
    ),
    **dict.fromkeys(("shared_intermediate_size", "shared_experts_intermediate_size"), 16),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "router_hidden_size"), 16),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers"), 1),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "n_mamba_heads"), 4),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim"), 16),
    **dict.fromkeys(
        ("mamba_d_state", "ssm_state_size", "state_size", "mamba_chunk_size", "chunk_size"), 8
    ),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads", "linear_num_heads"), 2),
    **dict.fromkeys(
        ("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim", "lru_width"), 16
    ),
    **dict.fromkeys(("index_head_dim",), 8),
    **dict.fromkeys(("index_n_heads",), 2),
    **dict.fromkeys(("index_topk",), 6),
    **dict.fromkeys(("image_size",), 16),
    **dict.fromkeys(("patch_size",), 4),
    "num_nextn_predict_layers": 0,
    "num_codebooks": 1,
    "encoder_hash_byte_group_vocab": 50,
    "index_block_size": 2,
    "index_topk_blocks": 1,
    **dict.fromkeys(("query_pre_attn_scalar", "hidden_size_per_layer_input", "rotary_dim"), 8),
}
"""What is written over a configuration's own number, when it declares one of that name."""

TOKENS = {
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "sep_token_id": 3,
    "decoder_start_token_id": 1,
}
TOKENS |= {"cls_token_id": 4, "unk_token_id": 5, "mask_token_id": 6}
PER_LAYER = ("layer_types", "mlp_layer_types", "layers_block_type", "indexer_types", "block_types")

PARTS = {
    **dict.fromkeys(
        ("emu3", "llama4", "qwen3_5", "qwen3_5_moe", "qwen4_exp", "dots3_note"), "text_config"
    ),
    **dict.fromkeys(("musicgen", "musicgen_melody"), "decoder"),
}
"""Composite configurations of which the causal language model takes a part."""

ATTENTION_LAST = {"layer_types": ["linear_attention", "full_attention"]}

SETTINGS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "bailing_hybrid": {
        "num_key_value_heads": 4,
        "head_dim": 8,
        "partial_rotary_factor": 1.0,
        "num_expert_group": 1,
        "n_group": 1,
    },
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            kind: {"rope_theta": 1e4, "rope_type": "default"}
            for kind in ("sliding_attention", "full_attention")
        },
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {"num_experts_per_tok": 2, "topk_method": "greedy"},
    "dots1": {
        "layer_types": ["sliding_attention", "full_attention"],
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
        "sliding_window": 6,
    },
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": {
        "layers": 4,
        "num_kv_shared_layers": 1,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": ATTENTION_LAST,
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "hrm_text": {"num_hidden_layers": 2, "num_layers_per_stack": None},
    "mamba2": {"head_dim": 16, "n_groups": 2},
    "ministral": {"head_dim": 8},
    "nemotron": {"head_dim": 8, "num_key_value_heads": 2},
    "nemotron_h": {
        "n_groups": 2,
        "layers": 4,
        "layers_block_type": ["linear_attention", "full_attention", "moe", "mlp"],
    },
    "qwen4_exp_text": {
        "ngram_vocab_size_base": 100,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "xmod": {"default_language": "en_XX"},
    "doge": {"keep_window_size": 6},
    "minimax_m3_vl_text": {
        "layer_types": ["full_attention", "minimax_m3_sparse"],
        "index_n_heads": 2,
    },
    "mt5": {"decoder_start_token_id": 0},
    "t5": {"decoder_start_token_id": 0},
    "esm": {
        "vocab_size": 99,
        "pad_token_id": 0,
        "mask_token_id": 6,
        "position_embedding_type": "rotary",
    },
    "albert": {"layers": 3, "num_hidden_groups": 1, "inner_group_num": 1},
    "gemma3": {
        "image_token_index": 98,
        "mm_tokens_per_image": 4,
        "boi_token_index": 97,
        "eoi_token_index": 96,
    },
    "llava": {"image_token_index": 98, "image_seq_length": 16},
    "wav2vec2": {
        "conv_dim": (16,) * 7,
        "num_conv_pos_embeddings": 8,
        "num_conv_pos_embedding_groups": 2,
    },
    "whisper": {"max_source_positions": 12, "num_mel_bins": 8},
    "zamba": {"layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zaya": {"num_experts_per_tok": 1},
}


def shrink(config: PreTrainedConfig, layers: int) -> dict[str, Any]:
    """The keyword arguments that make a small configuration of the same class."""
    given: dict[str, Any] = {}
    declared = vars(config)
    for name, value in declared.items():
        if isinstance(value, PreTrainedConfig):
            given[name] = type(value)(**shrink(value, layers))
        elif name in TOKENS and value is not None:
            given[name] = TOKENS[name]
        elif name in PER_LAYER and isinstance(value, list):
            kinds = list(dict.fromkeys(value))
            given[name] = [kinds[i % len(kinds)] for i in range(layers)]
        elif name in SMALL and isinstance(value, int | float) and not isinstance(value, bool):
            given[name] = layers if SMALL[name] == 2 and "layer" in name else SMALL[name]
    if "kv_lora_rank" in declared and "num_key_value_heads" in given:
        given["num_key_value_heads"] = given["num_attention_heads"]
    return given


def tiny_config(model_type: str, **more: Any) -> PreTrainedConfig:
    """A small configuration of a family, with `SETTINGS[model_type]` and `more` written over it."""
    kind = CONFIG_MAPPING[model_type]
    settings = dict(SETTINGS.get(model_type, {}))
    layers = settings.pop("layers", 2)
    start = kind(**settings.pop("start", {}))
    return kind(**{**shrink(start, layers), **settings, **more})


def randomise(model: nn.Module, seed: int) -> nn.Module:
    """Weights drawn anew with a spread that makes attention uneven (fresh models attend almost uniformly)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.copy_(
                    torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5
                )
            else:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model.eval()


def build(model_type: str, head: str | None = None, **more: Any) -> nn.Module:
    """An untrained tiny model of a family: its causal language model, or the class named by `head`."""
    kind = getattr(transformers, head or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type])
    config = tiny_config(model_type, **more)
    part = None if head else PARTS.get(model_type)
    return kind(getattr(config, part) if part else config).eval()
