"""Transforms of a model's weights: adapters to train, positions to stretch."""

from regard.weights.linear_adapters import (
    ADAPTER_POINTS,
    AdapterPoint,
    LinearAdapter,
    attach_linear_adapters,
    merge_linear_adapters,
)
from regard.weights.lora import lora
from regard.weights.merge_files import StoredWeights, merge_files
from regard.weights.merge_reports import (
    MaskStructure,
    curvature_rank_correlation,
    curvature_similarity,
    mask_density,
    mask_density_by_layer,
    mask_structure,
)
from regard.weights.merging import (
    capture_second_moments,
    compress_low_rank,
    compress_rank_one,
    estimate_fisher_diagonal,
    fast_fisher_graft,
    graft_masks,
    graft_threshold_of,
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
from regard.weights.moment_files import load_second_moments, save_second_moments
from regard.weights.rope import Interpolation, rope_interpolate
from regard.weights.sigma_reparam import convert_sigma_reparam, fuse_sigma_reparam
from regard.weights.sparse_gin import SelfLoopGIN, SparseGIN, sparse_gin

__all__ = [
    "ADAPTER_POINTS",
    "AdapterPoint",
    "Interpolation",
    "LinearAdapter",
    "MaskStructure",
    "QueryNormHeads",
    "RoutedHeads",
    "SelfLoopGIN",
    "SparseGIN",
    "StoredWeights",
    "attach_linear_adapters",
    "capture_second_moments",
    "compress_low_rank",
    "compress_rank_one",
    "convert_sigma_reparam",
    "curvature_rank_correlation",
    "curvature_similarity",
    "estimate_fisher_diagonal",
    "fast_fisher_graft",
    "fuse_sigma_reparam",
    "graft_masks",
    "graft_threshold_of",
    "load_second_moments",
    "lora",
    "mask_density",
    "mask_density_by_layer",
    "mask_structure",
    "merge_dare",
    "merge_files",
    "merge_linear",
    "merge_linear_adapters",
    "merge_ota",
    "merge_ties",
    "mixture_of_heads",
    "rope_interpolate",
    "save_second_moments",
    "sparse_gin",
    "spread_heads",
]
