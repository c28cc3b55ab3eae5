"""The ways of getting attention statistics that are compared; each is a function of (model, ids) that keeps only statistics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Method = Callable[[Any, Tensor], Any]


def plain(model: Any, ids: Tensor) -> None:
    """The forward pass as it is: fused attention, no statistics."""
    model(input_ids=ids, use_cache=False, logits_to_keep=1)


def attached(model: Any, ids: Tensor) -> None:
    """A session with no method in it."""
    import regard

    with regard.attach(model):
        plain(model, ids)


def exact(model: Any, ids: Tensor, rows: float | None = None) -> None:
    """Everything a report reads, from every query row."""
    import regard
    from regard.report.reading import report_instruments

    with regard.attach(model, *report_instruments(), rows=rows):
        plain(model, ids)


def sampled(model: Any, ids: Tensor) -> None:
    """Everything a report reads, from one query row in 16."""
    exact(model, ids, rows=1 / 16)


def reduce_map(weights: Tensor) -> tuple[Tensor, ...]:
    """The usual statistics of one layer's full map `[batch, heads, queries, keys]`: entropy, first key, distance, columns."""
    rows = torch.arange(weights.shape[-1], dtype=weights.dtype, device=weights.device)
    return (
        torch.special.entr(weights).sum(-1),
        weights[..., 0],
        rows - weights @ rows,
        weights.sum(-2),
    )


def eager(model: Any, ids: Tensor) -> None:
    """transformers with `output_attentions=True`: the maps of all layers, then the statistics."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        found = model(input_ids=ids, use_cache=False, logits_to_keep=1, output_attentions=True)
        for weights in found.attentions:
            reduce_map(weights)
    finally:
        model.set_attn_implementation(before)


def transformer_lens(bridge: Any, ids: Tensor) -> None:
    """TransformerLens: `run_with_cache` of every pattern, then the statistics."""
    _, cache = bridge.run_with_cache(
        ids, return_type=None, names_filter=lambda name: name.endswith("hook_pattern")
    )
    for weights in cache.values():
        reduce_map(weights)


def nnsight(traced: Any, ids: Tensor) -> None:
    """nnsight: save the attention weights of every layer from one trace, then the statistics."""
    saved = []
    with traced.trace(ids):
        for layer in traced.model.layers:
            saved.append(layer.self_attn.output[1].save())
    for weights in saved:
        reduce_map(weights if isinstance(weights, Tensor) else weights.value)


METHODS: dict[str, Method] = {
    "plain": plain,
    "attached": attached,
    "exact": exact,
    "sampled": sampled,
    "eager": eager,
    "transformer_lens": transformer_lens,
    "nnsight": nnsight,
}


def prepare(name: str, path: str) -> Any:
    """The model as the method wants it, from a directory of safetensors."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if name in ("transformer_lens", "nnsight"):
        model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").eval()
        tokenizer = AutoTokenizer.from_pretrained(path)
        if name == "transformer_lens":
            from transformer_lens.model_bridge import TransformerBridge

            return TransformerBridge.boot_transformers(path, hf_model=model, tokenizer=tokenizer)
        from nnsight import LanguageModel

        return LanguageModel(model, tokenizer=tokenizer)
    return AutoModelForCausalLM.from_pretrained(path).eval()
