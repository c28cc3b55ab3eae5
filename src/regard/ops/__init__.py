"""Pure functions of tensors: no parameters, no model, differentiable where their mathematics is."""

from regard.ops.attention_statistics import (
    attention_rows,
    received_attention,
    sampled_rows,
    strongest_attention,
)
from regard.ops.budgets import allocate_layer_budgets, pyramid_budgets
from regard.ops.eviction import (
    attention_dispersion,
    attention_shift,
    eviction_score,
    layer_preference,
)
from regard.ops.expected_attention import expected_attention

__all__ = [
    "allocate_layer_budgets",
    "attention_dispersion",
    "attention_rows",
    "attention_shift",
    "eviction_score",
    "expected_attention",
    "layer_preference",
    "pyramid_budgets",
    "received_attention",
    "sampled_rows",
    "strongest_attention",
]
