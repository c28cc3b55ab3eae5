"""One eviction: the scorer ranks, the rule counts, and every head keeps the best of what it holds.

Sinks come before everything, then the newest tokens, then the scores; padding comes last.
Cost: one scoring and one sort of the held slots, and a copy of what is kept.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from regard._errors import InputError
from regard.cache.budget import Budget, Room, tokens_of
from regard.cache.layer import Layer
from regard.cache.scorer import Scorer


def evict(
    layers: Sequence[Layer],
    scorer: Scorer,
    budget: Budget,
    sinks: int,
    model: Sequence[Layer],
    decoding: bool,
) -> None:
    """Brings `layers` (of all the layers `model`) within the budget; nothing happens while a text is shorter than it."""
    layers = [layer for layer in layers if layer.rows is not None and layer.rows.held]
    if not layers:
        return
    tokens = allowed(budget, layers[-1], model)
    if bool((tokens >= layers[-1].real).all()):
        return
    # half of a small budget at most goes to sinks, and the window has what is left
    first = torch.clamp(tokens // 2, max=sinks)
    newest = torch.clamp(tokens - first, max=scorer.window)
    scores, protected = [], []
    for layer in layers:
        scores.append(shielded(scorer.score(layer), layer, first, newest))
        wanted = (first + newest).to(layer.lengths)[:, None]
        protected.append(torch.minimum(wanted.expand_as(layer.lengths), layer.lengths))
    counts = budget.counts(scores, Room(tokens, layers, len(model), protected, decoding))
    least = first[:, None].clamp(min=1)
    for layer, score, count in zip(layers, scores, counts, strict=True):
        count = torch.minimum(torch.maximum(count.cpu(), least), layer.lengths)
        recent = torch.maximum((count * scorer.recent).long(), newest[:, None])
        layer.keep(best(graded(score, layer, first[:, None], recent), count.to(score.device)))


def allowed(budget: Budget, layer: Layer, model: Sequence[Layer]) -> Int[Tensor, "batch"]:
    """Slots per KV head that the budget's size allows on average, for each row."""
    used = [one for one in model if one.rows is not None]
    whole = sum(one.rows.heads * one.slot_bytes for one in used)
    # layers that have not run yet are taken to be like those that have
    return tokens_of(budget.size, layer.real, whole * len(model) // len(used))


def shielded(
    scores: Float[Tensor, "batch kv_heads held"],
    layer: Layer,
    first: Int[Tensor, "batch"],
    newest: Int[Tensor, "batch"],
) -> Float[Tensor, "batch kv_heads held"]:
    """+inf at the first and the newest slots of every row, -inf where nothing is held."""
    held = layer.rows.held
    if scores.shape != (layer.rows.batch, layer.rows.heads, held):
        raise InputError(
            f"a scorer must give one number for each held slot, {(layer.rows.batch, layer.rows.heads, held)}, "
            f"got {tuple(scores.shape)}"
        )
    slots = torch.arange(held)
    start = held - layer.lengths[..., None]
    shield = (slots < start + first[:, None, None]) | (slots >= held - newest[:, None, None])
    scores = scores.float().masked_fill(shield.to(scores.device), float("inf"))
    return scores.masked_fill(~layer.rows.filled, float("-inf"))


def graded(
    scores: Float[Tensor, "batch kv_heads held"],
    layer: Layer,
    first: Int[Tensor, "batch 1"],
    recent: Int[Tensor, "batch kv_heads"],
) -> Float[Tensor, "batch kv_heads held"]:
    """Scores with the first slots above all, then the newest, newer above older: a head that may keep fewer than these two keeps
    its sinks, then its newest."""
    held = layer.rows.held
    slots = torch.arange(held)
    sinks = slots < held - layer.lengths[..., None] + first[..., None]
    newest = (slots >= held - recent[..., None]).to(scores.device) & layer.rows.filled
    graded = scores.double().clamp(max=1e300)
    graded = torch.where(newest, 1e301 * (1 + slots.to(graded)), graded)
    graded = graded.masked_fill(sinks.to(scores.device), float("inf"))
    return graded.masked_fill(~layer.rows.filled, float("-inf"))


def best(
    scores: Float[Tensor, "batch kv_heads held"], counts: Int[Tensor, "batch kv_heads"]
) -> Bool[Tensor, "batch kv_heads held"]:
    """The `counts` highest slots of every head; of equal scores the earlier slot.

    >>> best(torch.tensor([[[0.1, 0.3, 0.2]]]), torch.tensor([[2]]))
    tensor([[[False,  True,  True]]])
    """
    order = torch.sort(scores, dim=-1, descending=True, stable=True).indices
    ranks = torch.empty_like(order).scatter_(
        -1, order, torch.arange(scores.shape[-1], device=scores.device).expand_as(order)
    )
    return ranks < counts[..., None]
