"""Transforms of a model's weights: adapters to train, positions to stretch."""

from regard.weights.lora import lora
from regard.weights.mixture_of_heads import (
    QueryNormHeads,
    RoutedHeads,
    mixture_of_heads,
    spread_heads,
)
from regard.weights.rope import Interpolation, rope_interpolate

__all__ = [
    "Interpolation",
    "QueryNormHeads",
    "RoutedHeads",
    "lora",
    "mixture_of_heads",
    "rope_interpolate",
    "spread_heads",
]
