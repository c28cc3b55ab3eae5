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
from regard.ops.decayed_attention import decayed_linear_attention
from regard.ops.delta_rule import delta_rule
from regard.ops.dynamic_mask import (
    dynamic_mask,
    dynamic_mask_attention,
    lifetimes,
    running_top_k,
    value_importance,
    value_importance_linear,
)
from regard.ops.dynamical_system import (
    DynamicalSystem,
    equivalent_normalisers,
    gated_system,
    memory_horizon,
    selective_system,
    separable_system,
    state_products,
    system_scan,
    transfer_matrix,
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
from regard.ops.expert_routing import expert_balance, expert_gates, expert_mixture
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
from regard.ops.graph_attention import (
    AttentionGraph,
    attention_graph,
    gin_aggregate,
    neighbour_max,
    pna_aggregate,
    process_adjacency,
    self_loops,
    shared_attention,
    sparse_attention_graph,
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
from regard.ops.linear_recurrence import linear_recurrence
from regard.ops.position_softmax import position_softmax, self_gate
from regard.ops.product_keys import ProductKeys, product_key_search
from regard.ops.selective_scan import selective_scan
from regard.ops.softmax_expansion import (
    exponential_features,
    feature_count,
    truncated_exponential,
)
from regard.ops.taylor_attention import TaylorState, separate_taylor_attention, taylor_attention

__all__ = [
    "Attended",
    "AttentionGraph",
    "ClusterMemory",
    "DynamicalSystem",
    "FastWeights",
    "ProductKeys",
    "KernelRedundancy",
    "TaylorState",
    "allocate_layer_budgets",
    "attention_dispersion",
    "attention_entropy",
    "attention_graph",
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
    "decayed_linear_attention",
    "delta_rule",
    "dynamic_mask",
    "dynamic_mask_attention",
    "entropic_overload",
    "entropy_lower_bound",
    "equivalent_normalisers",
    "eviction_score",
    "expected_attention",
    "expert_balance",
    "expert_gates",
    "expert_mixture",
    "exponential_features",
    "extremal_scores",
    "fast_weight_scan",
    "feature_count",
    "flow_attention",
    "flow_attention_step",
    "gated_system",
    "gin_aggregate",
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
    "linear_recurrence",
    "load_balance_loss",
    "memory_horizon",
    "merge_attention",
    "neighbour_max",
    "pna_aggregate",
    "position_softmax",
    "prefix_routed_attention",
    "product_key_search",
    "process_adjacency",
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
    "selective_scan",
    "selective_system",
    "self_gate",
    "self_loops",
    "separable_system",
    "separate_taylor_attention",
    "shared_attention",
    "soft_clamp",
    "sparse_attention_graph",
    "state_products",
    "straight_through_gates",
    "strongest_attention",
    "system_scan",
    "taylor_attention",
    "transfer_matrix",
    "truncated_exponential",
    "value_importance",
    "value_importance_linear",
]
