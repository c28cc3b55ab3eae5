"""What a key-value budget keeps, and what forgetting the rest costs: `regard.cache.H2O` on the text itself.

One prefill with a full cache that H2O watches; branches of it are cut to each budget, and what they hold is read from
`cache.kept(layer, head)`. For the cost, the same with the first three quarters of the text as context: the loss of the tokens
after it with each cut cache is compared with the loss under the full one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from regard.attach.cache_names import cache_argument
from regard.cache import Cache, scorers
from regard.cache.budgets import Uniform
from regard.report.schema import Budget, BudgetLevel

FRACTIONS = (0.1, 0.2, 0.5)
EXACT_BELOW = 4096
"""Tokens up to which H2O sees every query row; above, one in 8."""
MEASURED = 1024
"""Tokens of the text on which the cost is measured."""


def budget(
    model: nn.Module,
    ids: Tensor,
    mass: Float[np.ndarray, "layers heads tokens"],
    *,
    measured: bool = True,
) -> Budget:
    """The page's budget panel.

    Args:
        model: a decoder that takes a cache.
        ids: `[1, tokens]`.
        mass: attention that each key received from each head, summed over queries.

    Raises:
        InputError, AttachError: a model whose cache cannot forget.
    """
    levels = []
    with torch.inference_mode(), watched(model, ids) as cache:
        for fraction in FRACTIONS:
            with cut(cache, fraction) as held:
                kept = kept_positions(held, len(mass), ids.shape[1])
            levels.append(BudgetLevel(fraction, kept.mean(1), retained(mass, kept)))
    if measured and ids.shape[1] >= 128:
        _measure(model, ids[:, :MEASURED], levels)
    return Budget("H2O, the same budget for every KV head", levels, _bytes(model))


@contextmanager
def watched(model: nn.Module, ids: Tensor) -> Iterator[Cache]:
    """A cache that has read the text and kept everything, with H2O's scores of it."""
    scorer = scorers.H2O() if ids.shape[1] <= EXACT_BELOW else scorers.H2O(sample=8)
    with Cache(model, scorer, Uniform(1.0)) as cache:
        with cache.paused():
            cache.prefill(ids)
        yield cache


@contextmanager
def cut(cache: Cache, fraction: float) -> Iterator[Cache]:
    """A branch cut to a fraction of the tokens, which forgets nothing more."""
    with cache.branch() as twin:
        twin.budget = Uniform(fraction)
        twin.compress()
        twin.scorer = twin.budget = None
        yield twin


def kept_positions(
    cache: Cache, layers: int, tokens: int
) -> Bool[np.ndarray, "layers kv_heads tokens"]:
    """What each KV head of a cache still holds; nothing in a layer that holds no keys of its own."""
    heads = max(layer.rows.heads for layer in cache.held if layer.rows is not None)
    kept = np.zeros((layers, heads, tokens), dtype=bool)
    for layer in cache.held:
        for head in range(heads):
            kept[layer.index, head, cache.kept(layer.index, head).numpy()] = True
    return kept


def retained(
    mass: Float[np.ndarray, "layers heads tokens"],
    kept: Bool[np.ndarray, "layers kv_heads tokens"],
) -> Float[np.ndarray, " layers"]:
    """Share of each layer's attention that falls on positions its heads keep; NaN for a layer that holds no keys."""
    grouped = kept.repeat(mass.shape[1] // kept.shape[1], axis=1)
    total = np.where(kept.any((1, 2)), mass.sum((1, 2)), np.nan)
    return (mass * grouped).sum((1, 2)) / total


def _bytes(model: nn.Module) -> int | None:
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    heads = getattr(text, "num_key_value_heads", None) or getattr(text, "num_attention_heads", None)
    layers, width = getattr(text, "num_hidden_layers", None), getattr(text, "head_dim", None)
    if width is None and heads and getattr(text, "hidden_size", None):
        width = text.hidden_size // text.num_attention_heads
    if not (heads and layers and width):
        return None
    return 2 * layers * heads * width * next(model.parameters()).element_size()


def _losses(model: nn.Module, cache: Cache, rest: Tensor) -> Tensor:
    """Loss of each token of `rest` but the first, read on top of a cache, nats."""
    logits = model(rest[:, :-1], **{cache_argument(model): cache}).logits[0].float()
    return torch.nn.functional.cross_entropy(logits, rest[0, 1:], reduction="none")


def _measure(model: nn.Module, ids: Tensor, levels: list[BudgetLevel]) -> None:
    prefix = ids.shape[1] * 3 // 4
    rest = ids[:, prefix:]
    with torch.inference_mode(), watched(model, ids[:, :prefix]) as cache:
        with cut(cache, 1.0) as everything:
            plain = _losses(model, everything, rest)
        for level in levels:
            with cut(cache, level.fraction) as held:
                change = _losses(model, held, rest) - plain
            level.delta = float(change.mean())
            parts = torch.stack([part.mean() for part in change.split(16)])
            draws = torch.Generator().manual_seed(0)
            picks = torch.randint(len(parts), (2000, len(parts)), generator=draws)
            level.low, level.high = (
                parts[picks].mean(1).quantile(torch.tensor([0.025, 0.975])).tolist()
            )
