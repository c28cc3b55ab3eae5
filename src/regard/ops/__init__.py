"""Pure functions of tensors: no parameters, no model, differentiable where their mathematics is."""

from regard.ops.attention_scan import Attended, attention_scan, attention_scan_step, merge_attention
from regard.ops.attention_statistics import (
    attention_rows,
    received_attention,
    sampled_rows,
    strongest_attention,
)
from regard.ops.budgets import allocate_layer_budgets, pyramid_budgets
from regard.ops.delta_rule import delta_rule
from regard.ops.eviction import (
    attention_dispersion,
    attention_shift,
    eviction_score,
    layer_preference,
)
from regard.ops.expected_attention import expected_attention
from regard.ops.fast_weights import (
    FastWeights,
    fast_weight_scan,
    inner_gradient,
    read_memory,
    soft_clamp,
)
from regard.ops.flow_attention import (
    causal_flow_attention,
    conserved_flows,
    flow_attention,
    flow_attention_step,
)
from regard.ops.linear_attention import causal_linear_attention, linear_attention

__all__ = [
    "Attended",
    "FastWeights",
    "allocate_layer_budgets",
    "attention_dispersion",
    "attention_rows",
    "attention_scan",
    "attention_scan_step",
    "attention_shift",
    "causal_flow_attention",
    "causal_linear_attention",
    "conserved_flows",
    "delta_rule",
    "eviction_score",
    "expected_attention",
    "flow_attention",
    "flow_attention_step",
    "fast_weight_scan",
    "inner_gradient",
    "layer_preference",
    "linear_attention",
    "merge_attention",
    "pyramid_budgets",
    "read_memory",
    "received_attention",
    "sampled_rows",
    "soft_clamp",
    "strongest_attention",
]
