"""Tiny eager models, and every number of the instruments written down the plain way on full float64 maps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from regard.engine import AttentionCall, Pipeline, attend
from regard.instruments.base import Instrument

WINDOWS = {"mistral": 6}
"""Sliding windows of the tiny models."""


def tiny(family: str, head: str | None = None, **more: Any) -> Any:
    """A random-weight model that runs `eager`, in float64 where its kernels have it; uneven attention."""
    import tiny_models

    model = tiny_models.build(family, head, attn_implementation="eager", **more)
    model = tiny_models.randomise(model, 0)
    return model if family == "gpt_oss" else model.double()


def token_batch(batch: int = 2, tokens: int = 24, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(10, 90, (batch, tokens), generator=generator)


def eager_maps(model: Any, **inputs: Any) -> dict[tuple[str, int], Tensor]:
    """The model's own attention maps by site, `[batch, heads, queries, keys]`."""
    with torch.no_grad():
        output = model(**inputs, output_attentions=True)
    names = {"encoder_attentions": "encoder", "cross_attentions": "cross"}
    names |= {"decoder_attentions": "", "attentions": ""}
    return {
        (stack, layer): maps.double()
        for name, stack in names.items()
        for layer, maps in enumerate(getattr(output, name, None) or ())
    }


def visible(tokens: int, window: int | None = None) -> Tensor:
    """`[tokens, tokens]`: causal, within a sliding window where there is one."""
    apart = torch.arange(tokens)[:, None] - torch.arange(tokens)[None, :]
    return (apart >= 0) & (apart < (window or tokens))


def entropy_rows(maps: Tensor) -> Tensor:
    """`[..., queries]`, what is missing to 1 (a learned sink) counted as one more key."""
    rest = (1 - maps.sum(-1, keepdim=True)).clamp_min(0)
    whole = torch.cat([maps, torch.where(rest > 1e-5, rest, 0)], -1)
    return -(whole * whole.clamp_min(1e-300).log()).sum(-1)


def distance_rows(maps: Tensor) -> Tensor:
    queries, keys = maps.shape[-2:]
    apart = (torch.arange(queries)[:, None] - torch.arange(keys)[None, :]).abs()
    return (maps * apart).sum(-1)


def waad(maps: Tensor, window: int = 10) -> Tensor:
    result = torch.zeros(maps.shape[:-1], dtype=maps.dtype)
    for t in range(maps.shape[-2]):
        for s in range(t + 1):
            result[..., t] += maps[..., t, s] * min(t - s, window)
    return result


def fai(
    maps: Tensor,
    lo: int = 10,
    hi: int | None = None,
    from_query: int = 0,
    seen: Tensor | None = None,
) -> Tensor:
    """`[..., keys]`; `seen` `[queries, keys]` leaves out queries that cannot see the key."""
    tokens = maps.shape[-1]
    seen = visible(tokens) if seen is None else seen
    result = torch.zeros(*maps.shape[:-2], tokens, dtype=maps.dtype)
    for s in range(tokens):
        far = tokens if hi is None else s + hi + 1
        looking = [t for t in range(max(s + lo, from_query), min(far, tokens)) if seen[t, s]]
        if looking:
            result[..., s] = maps[..., looking, s].mean(-1)
    return result


def importance(maps: Tensor, seen: Tensor) -> Tensor:
    """Column means over the rows that see the key, `[..., keys]`."""
    return maps.sum(-2) / seen.sum(0)


def observe_call(
    instrument: Instrument, call: AttentionCall, rows: float | None = None, seed: int = 0
) -> Instrument:
    generator = torch.Generator().manual_seed(seed)
    attend(call, Pipeline([instrument]), fraction=rows, generator=generator)
    return instrument


def fixed_map(weights: Tensor) -> AttentionCall:
    """A call whose softmax is `weights` `[heads, tokens, tokens]` (rows sum to 1, hidden pairs 0)."""
    heads, tokens, _ = weights.shape
    scores = weights.double().clamp_min(1e-200).log()[None]
    nothing = torch.zeros(1, heads, tokens, 4, dtype=torch.float64)
    return AttentionCall.make(nothing, nothing, nothing, bias=scores)


def uniform(heads: int, tokens: int, batch: int = 1) -> AttentionCall:
    nothing = torch.zeros(batch, heads, tokens, 4, dtype=torch.float64)
    return AttentionCall.make(nothing, nothing, nothing)


def random_call(
    batch: int = 2, heads: int = 3, tokens: int = 64, seed: int = 0, **rest: Any
) -> AttentionCall:
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, heads, tokens, 6)
    query, key, value = (
        torch.randn(shape, generator=generator, dtype=torch.float64) * 1.5 for _ in range(3)
    )
    return AttentionCall.make(query, key, value, **rest)


def full_maps(call: AttentionCall) -> Tensor:
    """`[batch, heads, tokens, tokens]` of a causal call without extras."""
    scores = torch.einsum("bhqd,bhkd->bhqk", call.query, call.key).double() * call.scaling
    hidden = ~visible(call.queries)
    return torch.softmax(scores.masked_fill(hidden, -torch.inf), -1)
