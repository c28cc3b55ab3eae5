"""Which model a plan was made for: its shape, so that a mismatch can be named, and a digest of its weights."""

from __future__ import annotations

from typing import Any

from torch import nn

from regard._errors import InputError
from regard.cache.calibration import fingerprint as digest


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """`model_class, layers, heads, kv_heads, vocabulary, weights` of a transformers model.

    Raises:
        InputError: a model without a transformers config.

    Cost: milliseconds; a few hundred numbers of each weight are read.
    """
    config: Any = getattr(model, "config", None)
    if config is None:
        raise InputError(
            f"a plan needs a transformers model with a config, got {type(model).__name__}"
        )
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    heads = getattr(text, "num_attention_heads", None)
    return {
        "model_class": type(model).__name__,
        "layers": getattr(text, "num_hidden_layers", None),
        "heads": heads,
        "kv_heads": getattr(text, "num_key_value_heads", None) or heads,
        "vocabulary": getattr(text, "vocab_size", None),
        "weights": digest(model),
    }


def difference(expected: dict[str, Any], found: dict[str, Any]) -> str:
    """The first thing in which two fingerprints differ, in words; empty when they agree.

    >>> difference({"layers": 30, "weights": "a"}, {"layers": 24, "weights": "b"})
    'layers 30, not 24'
    """
    for name, value in expected.items():
        if found.get(name) != value:
            if name == "weights":
                return "the same architecture with other weights"
            return f"{name.replace('_', ' ')} {value}, not {found.get(name)}"
    return ""
