"""Transforms of a model's weights: adapters to train, positions to stretch."""

from regard.weights.linear_adapters import (
    ADAPTER_POINTS,
    AdapterPoint,
    LinearAdapter,
    attach_linear_adapters,
    merge_linear_adapters,
)
from regard.weights.lora import lora
from regard.weights.merging import (
    capture_second_moments,
    compress_rank_one,
    curvature_similarity,
    estimate_fisher_diagonal,
    fast_fisher_graft,
    mask_density,
    merge_dare,
    merge_linear,
    merge_ota,
    merge_ties,
)
from regard.weights.mixture_of_heads import (
    QueryNormHeads,
    RoutedHeads,
    mixture_of_heads,
    spread_heads,
)
from regard.weights.rope import Interpolation, rope_interpolate
from regard.weights.sigma_reparam import convert_sigma_reparam, fuse_sigma_reparam
from regard.weights.sparse_gin import SelfLoopGIN, SparseGIN, sparse_gin

__all__ = [
    "ADAPTER_POINTS",
    "AdapterPoint",
    "Interpolation",
    "LinearAdapter",
    "QueryNormHeads",
    "RoutedHeads",
    "SelfLoopGIN",
    "SparseGIN",
    "attach_linear_adapters",
    "capture_second_moments",
    "compress_rank_one",
    "convert_sigma_reparam",
    "curvature_similarity",
    "estimate_fisher_diagonal",
    "fast_fisher_graft",
    "fuse_sigma_reparam",
    "lora",
    "mask_density",
    "merge_dare",
    "merge_linear",
    "merge_linear_adapters",
    "merge_ota",
    "merge_ties",
    "mixture_of_heads",
    "rope_interpolate",
    "sparse_gin",
    "spread_heads",
]
