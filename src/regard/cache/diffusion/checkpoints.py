"""Masked-diffusion checkpoints from a directory, without running the code that comes with them.

LLaDA (`model_type` "llada") stores Llama's weights under OLMo's names, Dream ("Dream") Qwen2's under Qwen2's own: both are
read into transformers' native classes. Any other directory that `regard.load` opens works when its blocks are Llama's.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regard._errors import ModelError
from regard.cache.diffusion.transformers_model import TransformersDenoiser, adapt

LLADA_NAMES = {
    "attn_norm": "input_layernorm",
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "attn_out": "self_attn.o_proj",
    "ff_norm": "post_attention_layernorm",
    "ff_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "ff_out": "mlp.down_proj",
}
LLADA_OUTER = {
    "model.transformer.wte.weight": "model.embed_tokens.weight",
    "model.transformer.ln_f.weight": "model.norm.weight",
    "model.transformer.ff_out.weight": "lm_head.weight",
}
_BLOCK = re.compile(r"model\.transformer\.blocks\.(\d+)\.(\w+)\.(weight|bias)")


def load_denoiser(
    directory: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device | None = None,
    mask_token_id: int | None = None,
) -> TransformersDenoiser:
    """A LLaDA, Dream or Llama-like masked-diffusion model from a local directory with `config.json` and safetensors.

    Raises:
        ModelError: files are missing, the weights do not fit, or the block layout is another one.
        InputError: no mask token is known, or the model attends block by block.

    Cost: the weights in memory once.
    """
    folder = Path(directory).expanduser()
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} has no config.json; give the directory of a checkpoint")
    config = json.loads((folder / "config.json").read_text())
    kind = config.get("model_type", "")
    if kind.lower() in _NATIVE:
        build, shift = _NATIVE[kind.lower()]
        try:
            model = build(folder, config, dtype)
        except KeyError as error:
            raise ModelError(f"{folder}/config.json of a {kind} model has no {error}") from error
    else:
        from regard.pretrained import load

        model, shift = load(folder, dtype=dtype), 0
        for key in ("mask_token_id", "block_size", "block_length", "bd_size"):
            if config.get(key) is not None:
                setattr(model.config, key, config[key])
    model = model.to(device).eval() if device is not None else model.eval()
    mask = mask_token_id if mask_token_id is not None else config.get("mask_token_id")
    return adapt(model, mask_token_id=mask, eos_token_id=config.get("eos_token_id"), shift=shift)


def _llada(folder: Path, config: dict[str, Any], dtype: torch.dtype) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    tied = bool(config.get("weight_tying", False))
    native = LlamaConfig(
        vocab_size=config.get("embedding_size") or config["vocab_size"],
        hidden_size=config["d_model"],
        intermediate_size=config["mlp_hidden_size"],
        num_hidden_layers=config["n_layers"],
        num_attention_heads=config["n_heads"],
        num_key_value_heads=config.get("n_kv_heads") or config["n_heads"],
        max_position_embeddings=config.get("max_sequence_length", 4096),
        rms_norm_eps=config.get("rms_norm_eps", 1e-5),
        rope_parameters={"rope_type": "default", "rope_theta": config.get("rope_theta", 500000.0)},
        tie_word_embeddings=tied,
    )
    weights = {_llama_name(name): tensor for name, tensor in _weights(folder).items()}
    return _fill(LlamaForCausalLM, native, weights, dtype, folder)


def _llama_name(name: str) -> str:
    if (block := _BLOCK.fullmatch(name)) and block[2] in LLADA_NAMES:
        return f"model.layers.{block[1]}.{LLADA_NAMES[block[2]]}.{block[3]}"
    return LLADA_OUTER.get(name, name)


def _dream(folder: Path, config: dict[str, Any], dtype: torch.dtype) -> Any:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    names = (
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "hidden_act"),
        *("num_attention_heads", "num_key_value_heads", "max_position_embeddings"),
        *("rms_norm_eps", "tie_word_embeddings", "block_size", "block_length", "bd_size"),
    )
    native = Qwen2Config(
        rope_parameters={"rope_type": "default", "rope_theta": config.get("rope_theta", 1e6)},
        **{name: config[name] for name in names if config.get(name) is not None},
    )
    return _fill(Qwen2ForCausalLM, native, _weights(folder), dtype, folder)


def _weights(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelError(f"{folder} has no .safetensors weights; pickled ones are not read")
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def _fill(
    kind: Any, config: Any, weights: dict[str, Tensor], dtype: torch.dtype, folder: Path
) -> Any:
    """A native model that takes over the tensors themselves (no second copy)."""
    with torch.device("meta"):
        model = kind(config)
    weights = {name: tensor.to(dtype) for name, tensor in weights.items()}
    if config.tie_word_embeddings:
        weights.setdefault("lm_head.weight", weights["model.embed_tokens.weight"])
    try:
        model.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        raise ModelError(f"the weights in {folder} do not fit its config.json: {error}") from error
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model


_NATIVE = {"llada": (_llada, 0), "dream": (_dream, 1)}
