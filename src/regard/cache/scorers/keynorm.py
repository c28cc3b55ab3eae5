"""Key norm: keys of small norm are kept.

    score_j = - |k_j|

Source: Devoto et al. 2024, "A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression", arXiv 2406.11430.
Cost: one pass over the keys at each eviction; attention is not looked at.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from regard.cache.layer import Layer
from regard.cache.scorer import Scorer


@dataclass(frozen=True)
class KeyNorm(Scorer):
    """Minus the length of the key."""

    def score(self, layer: Layer) -> Float[Tensor, "batch kv_heads held"]:
        keys = layer.keys
        assert keys is not None
        return -keys.float().norm(dim=-1)
