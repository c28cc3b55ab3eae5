"""What a key-value budget would keep, and what forgetting the rest costs, measured.

Keys are ranked by the attention they received, layer by layer (the H2O score with a uniform budget over layers). For the cost,
the first part of the text is the cache: its keys are ranked by what its own queries paid them, the unkept ones are hidden from
every later token, and the loss of the later tokens is compared with the untouched model.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from regard.attach import Session
from regard.engine import Block, Method
from regard.instruments.observe import model_inputs
from regard.instruments.sinks import Sinks
from regard.report.schema import Budget, BudgetLevel

FRACTIONS = (0.1, 0.2, 0.5)


class ForgetKeys(Method):
    """Hides the unkept keys of a prefix from every query after it. `kept`: for each layer `[prefix]`, True = kept."""

    def __init__(self, kept: dict[int, Tensor]) -> None:
        self.kept = kept

    def scores(self, block: Block) -> Tensor | None:
        site = block.site
        if site.stack or site.kind != "self" or site.layer not in self.kept:
            return None
        kept = self.kept[site.layer]
        later = block.positions >= len(kept)
        if not bool(later.any()):
            return None
        lo, hi = block.keys.start, min(block.keys.stop, len(kept))
        if hi <= lo:
            return None
        hidden = later[:, None] & ~kept[lo:hi]
        hidden = torch.nn.functional.pad(hidden, (0, block.keys.stop - hi))
        return block.scores.masked_fill(hidden, torch.finfo(block.scores.dtype).min)


def kept_by_mass(mass: np.ndarray, fraction: float) -> np.ndarray:
    """`[layers, tokens]` True for the `fraction` of the keys with the largest mass in each layer."""
    count = max(1, round(fraction * mass.shape[1]))
    kept = np.zeros(mass.shape, dtype=bool)
    np.put_along_axis(kept, np.argsort(-mass, axis=1)[:, :count], True, axis=1)
    return kept


def budget(model: nn.Module, ids: Tensor, mass: np.ndarray, *, measured: bool = True) -> Budget:
    """The page's budget panel. `mass` `[layers, tokens]`: attention received by each key, summed over heads and queries."""
    levels = []
    for fraction in FRACTIONS:
        kept = kept_by_mass(mass, fraction)
        levels.append(BudgetLevel(fraction, kept, (mass * kept).sum(1) / mass.sum(1)))
    if measured and ids.shape[1] >= 128:
        _measure(model, ids[:, :1024], levels)
    return Budget("received mass (H2O score, same budget in every layer)", levels, _bytes(model))


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


def _losses(model: nn.Module, ids: Tensor, prefix: int, *methods: Method) -> Tensor:
    """Loss of each token after the first `prefix` + 1, nats."""
    inputs = model_inputs(model, ids, logits=ids.shape[1] - prefix)
    with torch.inference_mode(), Session(model, *methods):
        logits = model(**inputs).logits[0, -(ids.shape[1] - prefix) : -1].float()
    return torch.nn.functional.cross_entropy(logits, ids[0, prefix + 1 :], reduction="none")


def _measure(model: nn.Module, ids: Tensor, levels: list[BudgetLevel]) -> None:
    prefix = ids.shape[1] * 3 // 4
    sinks = Sinks()
    with torch.inference_mode(), Session(model, sinks):
        model(**model_inputs(model, ids[:, :prefix]))
    mass = sinks.mass().tensor()[..., :prefix].nansum(1).numpy()
    plain = _losses(model, ids, prefix)
    for level in levels:
        kept = kept_by_mass(mass, level.fraction)
        forget = ForgetKeys({layer: torch.from_numpy(row) for layer, row in enumerate(kept)})
        change = _losses(model, ids, prefix, forget) - plain
        level.delta = float(change.mean())
        parts = torch.stack([part.mean() for part in change.split(16)])
        picks = torch.randint(
            len(parts), (2000, len(parts)), generator=torch.Generator().manual_seed(0)
        )
        level.low, level.high = parts[picks].mean(1).quantile(torch.tensor([0.025, 0.975])).tolist()
