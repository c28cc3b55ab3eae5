"""KVzip's score: how hard a key is looked at while the text is repeated.

    score_j = max over the queries of the replay and the heads of a group of their attention on key j

The replay is a second reading of the text, which `regard.cache.KVzip` makes (`regard.cache.reconstruction`); the score is
handed over as a slot.

Source: Kim et al. 2025, "KVzip: Query-Agnostic KV Cache Compression with Context Reconstruction", arXiv 2505.23416.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from regard.cache.layer import Layer
from regard.cache.scorer import Scorer


@dataclass(frozen=True)
class KVzip(Scorer):
    """The largest attention during the replay; tokens that came after it score lowest."""

    slots: ClassVar[Mapping[str, float]] = {"peak": 0.0}

    def score(self, layer: Layer) -> Float[Tensor, "batch kv_heads held"]:
        return layer.slots["peak"]
