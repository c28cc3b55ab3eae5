"""Vision transformers: which heads matter, how far they look, and what patterns they make.

>>> from regard.instruments.vision import ViTAnalyzer  # ViTAnalyzer(model, images, labels).report("heads.html")
"""

from __future__ import annotations

from regard.instruments.vision.analyzer import PatternView, ViTAnalyzer
from regard.instruments.vision.importance import (
    METRICS,
    Importance,
    MeanOutput,
    Predictions,
    Prune,
    area,
    changes,
    head_importance,
    js_divergence,
    predict,
    pruning_curve,
)
from regard.instruments.vision.maps import GridAttention
from regard.instruments.vision.naming import (
    NAMES,
    content_dependence,
    dependence,
    name_head,
    offset_moments,
    row_entropy,
)
from regard.instruments.vision.patterns import (
    Clusters,
    PatternEncoder,
    Patterns,
    cluster,
    fit_patterns,
    layout,
    pca_error,
    relative_map,
    tiled_map,
)
from regard.instruments.vision.strength import Hops, hop_distance, hop_profile

__all__ = [
    "METRICS",
    "NAMES",
    "Clusters",
    "GridAttention",
    "Hops",
    "Importance",
    "MeanOutput",
    "PatternEncoder",
    "PatternView",
    "Patterns",
    "Predictions",
    "Prune",
    "ViTAnalyzer",
    "area",
    "changes",
    "cluster",
    "content_dependence",
    "dependence",
    "fit_patterns",
    "head_importance",
    "hop_distance",
    "hop_profile",
    "js_divergence",
    "layout",
    "name_head",
    "offset_moments",
    "pca_error",
    "predict",
    "pruning_curve",
    "relative_map",
    "row_entropy",
    "tiled_map",
]
