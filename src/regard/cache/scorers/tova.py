"""TOVA: what the newest query looks at, the same for all heads of a layer.

    score_j = mean over all heads of A[last query, j]

Source: Oren et al. 2024, "Transformers are Multi-State RNNs", arXiv 2401.06104.
Cost: one query row a call.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from regard.cache.layer import Layer
from regard.cache.scorers._observing import Observing


@dataclass(frozen=True)
class TOVA(Observing):
    """Attention of the newest query, averaged over all heads."""

    window: int = 1

    @property
    def rows(self) -> int:
        return 1

    def judge(
        self, weights: Float[Tensor, "batch heads rows keys"], layer: Layer
    ) -> Float[Tensor, "batch kv_heads keys"]:
        return weights[:, :, -1].mean(1, keepdim=True).expand(-1, layer.rows.heads, -1)
