"""Pure functions of tensors: no parameters, no model, differentiable where their mathematics is."""

from regard.ops.atconv import (
    KernelRedundancy,
    attentive_conv2d,
    kernel_redundancy,
    lateral_inhibition,
    run_pool,
)
from regard.ops.attention_scan import (
    Attended,
    attention_scan,
    attention_scan_step,
    merge_attention,
)
from regard.ops.attention_statistics import (
    attention_rows,
    received_attention,
    sampled_rows,
    strongest_attention,
)
from regard.ops.budgets import allocate_layer_budgets, pyramid_budgets
from regard.ops.delta_rule import delta_rule
from regard.ops.dynamic_mask import (
    dynamic_mask,
    dynamic_mask_attention,
    lifetimes,
    running_top_k,
    value_importance,
    value_importance_linear,
)
from regard.ops.entropy_bound import entropy_lower_bound, extremal_scores, score_norm
from regard.ops.entropy_regularisation import (
    attention_entropy,
    causal_ceiling,
    entropic_overload,
    head_entropy_penalty,
    row_entropy_penalty,
)
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
from regard.ops.head_gates import (
    chosen_heads,
    head_gates,
    load_balance_loss,
    query_norm_logits,
    routed_gates,
    straight_through_gates,
)
from regard.ops.kmeans_routing import (
    ClusterMemory,
    balanced_topk_routing,
    kmeans_ema_statistics,
    kmeans_ema_update,
    prefix_routed_attention,
    routed_attention,
    scatter_mean,
)
from regard.ops.linear_attention import causal_linear_attention, linear_attention
from regard.ops.position_softmax import position_softmax, self_gate
from regard.ops.taylor_attention import TaylorState, separate_taylor_attention, taylor_attention

__all__ = [
    "Attended",
    "ClusterMemory",
    "FastWeights",
    "KernelRedundancy",
    "TaylorState",
    "allocate_layer_budgets",
    "attention_dispersion",
    "attention_entropy",
    "attention_rows",
    "attention_scan",
    "attention_scan_step",
    "attention_shift",
    "attentive_conv2d",
    "balanced_topk_routing",
    "causal_ceiling",
    "causal_flow_attention",
    "causal_linear_attention",
    "chosen_heads",
    "conserved_flows",
    "delta_rule",
    "dynamic_mask",
    "dynamic_mask_attention",
    "entropic_overload",
    "entropy_lower_bound",
    "eviction_score",
    "expected_attention",
    "extremal_scores",
    "fast_weight_scan",
    "flow_attention",
    "flow_attention_step",
    "head_entropy_penalty",
    "head_gates",
    "inner_gradient",
    "kernel_redundancy",
    "kmeans_ema_statistics",
    "kmeans_ema_update",
    "lateral_inhibition",
    "layer_preference",
    "lifetimes",
    "linear_attention",
    "load_balance_loss",
    "merge_attention",
    "position_softmax",
    "prefix_routed_attention",
    "pyramid_budgets",
    "query_norm_logits",
    "read_memory",
    "received_attention",
    "routed_attention",
    "routed_gates",
    "row_entropy_penalty",
    "run_pool",
    "running_top_k",
    "sampled_rows",
    "scatter_mean",
    "score_norm",
    "self_gate",
    "separate_taylor_attention",
    "soft_clamp",
    "straight_through_gates",
    "strongest_attention",
    "taylor_attention",
    "value_importance",
    "value_importance_linear",
]
