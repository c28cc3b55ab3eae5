"""transformers decoders (Llama, Qwen2, Qwen3, Mistral) run as masked-diffusion models: bidirectional, layer by layer, row by row.

LLaDA has Llama's blocks and Dream has Qwen2's, so their checkpoints run on the native classes (`load_denoiser`). A wrapped
model is proved equal before it is used: on random tokens, the blocks run one by one must give the logits of the model's own
forward under a mask that hides nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from regard._errors import InputError, ModelError
from regard.attach.session import dispatch
from regard.engine import AttentionCall

BLOCK_CAUSAL = ("block_size", "block_length", "bd_size")
"""Configuration entries of models that attend block by block (SDAR, LLaDA2, Fast-dLLM v2)."""

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


class TransformersBlock:
    """One decoder layer of a transformers model in three parts; attention runs through the engine."""

    def __init__(self, layer: Any, rotary: Any) -> None:
        self.layer, self.rotary = layer, rotary

    def project(self, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        attention = self.layer.self_attn
        states = self.layer.input_layernorm(hidden)
        shape = (*states.shape[:2], -1, attention.head_dim)
        query = attention.q_proj(states).view(shape)
        key = attention.k_proj(states).view(shape)
        value = attention.v_proj(states).view(shape).transpose(1, 2)
        if hasattr(attention, "q_norm"):
            query, key = attention.q_norm(query), attention.k_norm(key)
        cos, sin = (part[:, None] for part in self.rotary(states, positions))
        return _turn(query.transpose(1, 2), cos, sin), _turn(key.transpose(1, 2), cos, sin), value

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        attention = self.layer.self_attn
        call = AttentionCall.make(query, key, value, causal=False, module=attention)
        return dispatch(attention, call)

    def finish(self, hidden: Tensor, attended: Tensor) -> Tensor:
        layer = self.layer
        hidden = hidden + layer.self_attn.o_proj(attended.transpose(1, 2).flatten(2))
        return hidden + layer.mlp(layer.post_attention_layernorm(hidden))


class TransformersDenoiser:
    """A transformers model as a `Denoiser`; made by `adapt`.

    Attributes:
        model: the transformers model; `regard.attach(denoiser.model, ...)` sees every step of a generation.
    """

    def __init__(
        self, model: Any, mask_token_id: int, eos_token_id: int | None, shift: int
    ) -> None:
        self.model = model
        self.mask_token_id, self.eos_token_id, self.shift = mask_token_id, eos_token_id, shift
        body = model.model
        self.blocks = [TransformersBlock(layer, body.rotary_emb) for layer in body.layers]

    def embed(self, tokens: Tensor) -> Tensor:
        return self.model.model.embed_tokens(tokens)

    def logits(self, hidden: Tensor) -> Tensor:
        return self.model.lm_head(self.model.model.norm(hidden))

    def __call__(self, tokens: Tensor) -> Tensor:
        """Logits of every row, all rows seeing all; row `p - shift` predicts position p."""
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        hidden = self.embed(tokens)
        for block in self.blocks:
            hidden = block.finish(hidden, block.attend(*block.project(hidden, positions)))
        return self.logits(hidden)


def adapt(
    model: nn.Module,
    *,
    mask_token_id: int | None = None,
    eos_token_id: int | None = None,
    shift: int = 0,
) -> TransformersDenoiser:
    """Wraps a transformers decoder with Llama's block layout for `regard.cache.diffusion.generate`.

    Args:
        model: a `...ForCausalLM` with `model.layers[i].self_attn.{q,k,v,o}_proj`, two norms a layer and rotary positions.
        mask_token_id: the mask token; the configuration's when None.
        eos_token_id: the end of sequence; the configuration's when None.
        shift: 1 when row p - 1 predicts position p (Dream).

    Raises:
        InputError: no mask token is known, or the model attends block by block.
        ModelError: another block layout, or a forward that differs from the blocks run one by one.

    Cost: two forwards of 16 tokens.
    """
    config: Any = model.config
    name = type(model).__name__
    causal = next(
        (getattr(config, key) for key in BLOCK_CAUSAL if getattr(config, key, None)), None
    )
    if causal:
        raise InputError(
            f"{name} attends block by block (blocks of {causal} tokens): the keys and values of finished blocks never change, an "
            "ordinary KV cache holds them exactly, and a cache for diffusion models would only add steps"
        )
    mask = mask_token_id if mask_token_id is not None else getattr(config, "mask_token_id", None)
    if mask is None:
        raise InputError(
            f"{name} has no mask_token_id in its configuration; pass mask_token_id=..."
        )
    end = eos_token_id if eos_token_id is not None else getattr(config, "eos_token_id", None)
    end = end[0] if isinstance(end, list) else end
    try:
        denoiser = TransformersDenoiser(model, int(mask), end, shift)
        difference = _difference(denoiser)
    except (AttributeError, TypeError) as error:
        raise ModelError(
            f"{name} does not have Llama's block layout ({error}); Llama, Qwen2, Qwen3 and Mistral have it"
        ) from error
    if not difference <= _TOLERANCE.get(next(model.parameters()).dtype, 1e-3):
        raise ModelError(
            f"{name} run block by block differs from its own bidirectional forward by {difference:.2g} (relative), so its "
            "layers hold something that the adapter does not run"
        )
    return denoiser


@torch.no_grad()
def _difference(denoiser: TransformersDenoiser) -> float:
    """The largest difference of logits between blocks and model on 16 random tokens, relative to the largest logit."""
    model = denoiser.model
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, model.config.vocab_size, (1, 16), generator=generator).to(device)
    nothing = torch.zeros(1, 1, 16, 16, dtype=next(model.parameters()).dtype, device=device)
    expected = model(tokens, attention_mask=nothing, use_cache=False).logits.float()
    found = denoiser(tokens).float()
    return float((found - expected).abs().max() / expected.abs().max())


def _turn(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = states.chunk(2, dim=-1)
    return states * cos + torch.cat([-second, first], dim=-1) * sin
