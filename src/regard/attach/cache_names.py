"""The names under which transformers models take a cache of keys and values and give it back, which differ between versions."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from regard._errors import InputError
from regard.attach.compat import is_transformers

NAMES = ("cache", "past_key_values")
"""The newest first: from 5.24 on "cache"."""


def cache_argument(model: nn.Module) -> str:
    """The name under which the model's `forward` takes a cache.

    Raises:
        InputError: no transformers model, or one without a KV cache.
    """
    if not is_transformers(model):
        raise InputError.of("model", given=type(model).__name__, expected="a transformers model")
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            for name in NAMES:
                if takes(part, name):
                    return name
    raise InputError(
        f"{type(model).__name__} has no KV cache: its forward takes no cache of keys and values"
    )


def given_cache(arguments: Mapping[str, Any]) -> Any:
    """The cache among a model's keyword arguments, None without one."""
    return next((arguments[name] for name in NAMES if arguments.get(name) is not None), None)


def returned_cache(output: Any) -> Any:
    """The cache of a model's output, None without one."""
    return next((output[name] for name in NAMES if name in output), None)


def takes(model: nn.Module, name: str) -> bool:
    """Whether the model's `forward` names this argument."""
    return name in _parameters(type(model))


@functools.cache
def _parameters(kind: type[nn.Module]) -> frozenset[str]:
    return frozenset(inspect.signature(kind.forward).parameters)
