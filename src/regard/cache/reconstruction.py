"""How much each key is needed to repeat the text: KVzip's reconstruction score.

The model has read the text. It is then asked to repeat it, in chunks, and given the chunk as if it were its answer:

    "Repeat the previous context exactly." + chunk,     peak_j = max over the queries i of that input, and the heads of a group,
                                                                 of softmax_j(q_i . k_j)

over the first tokens of the text, the chunk's own keys and the input itself (what came between is left out, as the authors do).
A key that repetition needs is looked at hard by some token at least once.

Source: Kim et al. 2025, "KVzip: Query-Agnostic KV Cache Compression with Context Reconstruction", arXiv 2505.23416.
Cost: one more forward pass over the text against its own cache, and a pass of statistics: about 1.5 prefills more at 2048 tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from regard._errors import InputError, ModelError
from regard.attach import attach
from regard.engine import AttentionCall, Method
from regard.ops.attention_statistics import strongest_attention

FIRST = "\n\nRepeat the previous context exactly."
LATER = "\n\nRepeat the part of the previous context exactly, starting with"
OVERLAP = 8
"""Tokens of the chunk before that a later chunk's request quotes."""


class Peaks(Method):
    """Reads the replay of one chunk: the largest attention on each of its keys, for every layer."""

    reads_only = True

    def __init__(self, sinks: int) -> None:
        self.sinks = sinks
        self.span: tuple[int, int] = (0, 0)
        self.length = 0
        self.found: dict[int, Tensor] = {}

    def after(self, call: AttentionCall) -> None:
        start, end = self.span
        total = self.length + call.queries
        slots = torch.arange(total - call.keys, total, device=call.key.device)  # their positions
        leading = (slots < self.sinks) & (slots < start)
        own = (slots >= start) & (slots < end)
        used = (leading | own | (slots >= self.length)).nonzero().flatten()
        places = slots[used]
        peaks = strongest_attention(
            call.query,
            call.key[:, :, used],
            slots[-call.queries :].expand(len(call.key), -1),
            places.expand(*call.key.shape[:2], -1),
            scaling=call.scaling,
            softcap=call.softcap,
            window=getattr(call.module, "sliding_window", None),
        )
        found = peaks.new_zeros(call.kv_heads, end - start)
        held = places[(places >= start) & (places < end)]
        found[:, held - start] = peaks[0][:, (places >= start) & (places < end)]
        self.found[call.site.layer] = found


@torch.no_grad()
def reconstruct(
    model: Any,
    ids: Int[Tensor, "1 tokens"],
    *,
    tokenizer: Any = None,
    chunk: int = 2048,
    chunks: int | None = None,
    sinks: int = 4,
    cache: Any = None,
) -> Float[Tensor, "layers kv_heads tokens"]:
    """The largest attention on every key while the text is repeated.

    Args:
        model: a decoder.
        ids: the text.
        tokenizer: when it is not the model's own.
        chunk: tokens repeated at a time.
        chunks: replay only this many chunks, evenly spread; keys of the others score 0. None replays all.
        sinks: first keys of the text that every chunk may look at, too.
        cache: a cache that has read `ids` and holds all of it, given back as it was; None reads the text first.

    Raises:
        InputError: more than one row, or a `chunk` under 16.
        ModelError: the model ran no attention with a cache.
    """
    from transformers import DynamicCache

    from regard.attach.cache_names import cache_argument
    from regard.pretrained import tokenizer_of

    if len(ids) != 1:
        raise InputError(f"reconstruction replays one text at a time, got a batch of {len(ids)}")
    if chunk < 16:
        raise InputError.of("chunk", given=chunk, expected="at least 16 tokens")
    tokenizer = tokenizer_of(model, tokenizer)
    cache = DynamicCache(config=model.config) if cache is None else cache
    given = {cache_argument(model): cache, "use_cache": True, "logits_to_keep": 1}
    if not cache.get_seq_length():
        model(input_ids=ids, **given)
    length, suffix = ids.shape[1], _reply_prefix(tokenizer)
    spans = [(start, min(start + chunk, length)) for start in range(0, length, chunk)]
    if chunks is not None and chunks < len(spans):
        spans = [spans[i] for i in torch.linspace(0, len(spans) - 1, chunks).round().int().tolist()]
    method = Peaks(sinks)
    method.length = length
    out: Tensor | None = None
    with attach(model, method):
        for start, end in spans:
            request = _tokens(tokenizer, LATER if start else FIRST).to(ids)
            quoted = ids[:, max(0, start - OVERLAP) : start]
            replay = torch.cat([request, quoted, suffix.to(ids), ids[:, start:end]], 1)
            method.span, method.found = (start, end), {}
            try:
                model(input_ids=replay, **given)
            finally:
                cache.crop(length - cache.get_seq_length())
            if not method.found:
                raise ModelError(f"{type(model).__name__} ran no attention that can be read")
            peaks = torch.stack([method.found[layer] for layer in sorted(method.found)])
            if out is None:
                out = peaks.new_zeros(*peaks.shape[:2], length)
            out[..., start:end] = peaks
    assert out is not None
    return out


def _tokens(tokenizer: Any, text: str) -> Tensor:
    return tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"].long()


def _reply_prefix(tokenizer: Any) -> Tensor:
    """What a chat template puts between a user's message and the reply; a line break without one."""
    text = "\n"
    if getattr(tokenizer, "chat_template", None):
        mark = "\x00text\x00"
        rendered = tokenizer.apply_chat_template(
            [{"role": "user", "content": mark}], tokenize=False, add_generation_prompt=True
        )
        text = rendered.split(mark)[1]
    return _tokens(tokenizer, text)
