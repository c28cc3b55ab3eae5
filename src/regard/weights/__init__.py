"""Transforms of a model's weights: adapters to train, positions to stretch."""

from regard.weights.lora import lora
from regard.weights.rope import Interpolation, rope_interpolate

__all__ = ["Interpolation", "lora", "rope_interpolate"]
