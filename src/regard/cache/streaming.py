"""StreamingLLM as caches: the first tokens and the newest, at the positions of the text or at those of the cache.

Source: Xiao et al. 2023, "Efficient Streaming Language Models with Attention Sinks", arXiv 2309.17453.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from regard._errors import InputError
from regard.attach import compat
from regard.cache import scorers
from regard.cache.budget import Budget
from regard.cache.cache import Cache
from regard.cache.layer import Layer
from regard.cache.rotary import Rotary


class Streaming(Cache):
    """Sinks and the newest tokens, with the positions they had in the text (the usual shortcut).

    >>> import regard
    >>> model = regard.load("smollm2")  # doctest: +SKIP
    >>> cache = Streaming(model, budget=256, every=1)  # doctest: +SKIP
    """

    def __init__(
        self, model: nn.Module, budget: Budget | float | int | str, **options: Any
    ) -> None:
        super().__init__(model, scorers.Streaming(), budget, **options)


class StreamingExact(Cache):
    """Sinks and the newest tokens, with positions counted in the cache, as the paper has them.

    With C tokens held, the paper gives them the positions 0 .. C - 1. Rotary attention sees differences of positions only, so the
    same is had by leaving queries and new keys where the text has them and moving the older keys up: after each eviction every
    kept key is rotated on by the number of tokens that were dropped behind it. Distances never exceed the budget, however
    long the stream.

    Raises:
        InputError: a model without rotary positions, or with ones that cannot be reached from outside.

    Cost: rotating the keys that moved; with sinks and a window that is the sinks alone.
    """

    def __init__(
        self, model: nn.Module, budget: Budget | float | int | str, **options: Any
    ) -> None:
        super().__init__(model, scorers.StreamingExact(), budget, **options)
        self._attentions: dict[Any, nn.Module] = {
            module.layer_idx: module
            for module in model.modules()
            if hasattr(module, "layer_idx") and compat.is_hookable(module)
        }
        for layer in self.held:
            if layer.index not in self._attentions:
                raise InputError(
                    f"{type(model).__name__} does not say which attention is layer {layer.index}"
                )
            if not Rotary.of(self._attentions[layer.index], layer.index).rotates:
                raise InputError(
                    f"{type(model).__name__} has no rotary positions to count anew; use regard.cache.Streaming"
                )

    def _evict(self, layers: Sequence[Layer], decoding: bool) -> None:
        super()._evict(layers, decoding)
        for layer in layers:
            if not layer.contiguous:
                close_gaps(layer, Rotary.of(self._attentions[layer.index], layer.index))


@torch.no_grad()
def close_gaps(layer: Layer, rotary: Rotary) -> None:
    """Rotates every held key to the place it has in the cache, the newest staying where it is."""
    held = layer.rows.held
    behind = torch.arange(held - 1, -1, -1, device=layer.device)
    moved = layer.slots["moved"]
    aim = (layer.seen - 1 - behind) - layer.positions
    step = torch.where(layer.valid, (aim - moved).round().long(), 0)
    columns = (step != 0).any(0).any(0).nonzero().flatten()
    if not len(columns):
        return
    keys = layer.keys
    assert keys is not None
    keys = keys.clone()
    keys[:, :, columns] = _moved(keys[:, :, columns], step[..., columns], rotary)
    layer.rows.write("key", keys)
    layer.slots["moved"] = moved + step


def _moved(keys: Tensor, step: Tensor, rotary: Rotary) -> Tensor:
    """Keys rotated on by `step` `[batch, kv_heads, keys]` positions, each head by its own."""
    flat = keys.flatten(0, 1)[:, None]
    turned = rotary.turn(flat, step.flatten(0, 1)) / rotary.factor
    return turned[:, 0].view_as(keys).to(keys.dtype)
