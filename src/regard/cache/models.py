"""The cache layers that a model needs.

Layers with plain or sliding-window attention become regard's; what else a hybrid model keeps (convolution and recurrent states,
sparse indexers) stays with transformers' own layer classes.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
)

from regard._errors import InputError
from regard.cache.layer import Layer


def make_layers(
    model: nn.Module, store: Any, slots: Mapping[str, float], evicts: bool
) -> tuple[list[Any], bool]:
    """A cache layer for each layer of the model, and whether some layers read the keys of others."""
    config: Any = getattr(model, "config", None)
    if config is None:
        config = next(part.config for part in model.modules() if isinstance(part, PreTrainedModel))
    text = config.get_text_config(decoder=True)
    kinds: list[Any] = list(DynamicCache(config=text).layers)
    layers: list[Any] = []
    for index, kind in enumerate(kinds):
        window = getattr(kind, "sliding_window", None)
        arguments = (index, store, slots, None if window is None else int(window), evicts)
        if type(kind) in (DynamicLayer, DynamicSlidingWindowLayer):
            layers.append(Layer(*arguments))
        elif type(kind) in (
            LinearAttentionAndFullAttentionLayer,
            LinearAttentionAndSlidingWindowAttentionLayer,
        ):
            layers.append(MixedLayer(len(kind.conv_states), *arguments))
        elif evicts and isinstance(kind, DynamicLayer):
            raise InputError(
                f"layer {index} of {type(model).__name__} chooses keys by their number ({type(kind).__name__}), so none may "
                "be dropped; regard.cache.Full works"
            )
        else:
            layers.append(kind)
    if evicts and not any(isinstance(layer, Layer) for layer in layers):
        raise InputError(f"{type(model).__name__} has no attention layer whose keys can be evicted")
    shares = any(type(layer).__name__ == "DummyLayer" for layer in layers)
    return layers, shares


class MixedLayer(LinearAttentionLayer, Layer):  # pyright: ignore[reportIncompatibleMethodOverride]
    """A layer with attention and a recurrent state side by side."""

    is_compileable = False  # type: ignore[assignment]

    def __init__(self, states: int, *arguments: Any) -> None:
        Layer.__init__(self, *arguments)
        LinearAttentionLayer.__init__(self, number_of_states=states)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        kind = Layer if len(args) == 2 else LinearAttentionLayer
        kind.lazy_initialization(self, *args, **kwargs)

    def reset(self) -> None:
        Layer.reset(self)
        LinearAttentionLayer.reset(self)

    def crop(self, tokens_to_remove: int) -> None:
        LinearAttentionLayer.crop(self, tokens_to_remove)
        Layer.crop(self, tokens_to_remove)

    def copy(self) -> Layer:
        twin: Any = Layer.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, dict) and name not in ("memory", "fills"):
                setattr(twin, name, copy.deepcopy(value))
        return twin

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        LinearAttentionLayer.reorder_cache(self, indices)  # type: ignore[arg-type]
        Layer.batch_select_indices(self, indices)

    @property
    def is_croppable(self) -> bool:
        return bool(LinearAttentionLayer.is_croppable.fget(self)) and not self.evicts  # type: ignore[attr-defined]

    @property
    def nbytes(self) -> int:
        states = [*self.conv_states.values(), *self.recurrent_states.values()]
        return Layer.nbytes.fget(self) + sum(  # type: ignore[attr-defined]
            state.nbytes for state in states if state is not None
        )
