"""CAKE's indicator: mean attention of the last queries, and how much it changes.

    score_j = mean_i A[i, j] + gamma Var_i A[i, j] over the last W queries i, pooled over keys, averaged over each group.

It also notes how spread out (dispersion) and how changeable (shift) each layer's attention is, from which
`regard.cache.budgets.CakePreference` divides the budget. In a decoding step the current query alone scores, without a variance.

Source: Qin et al. 2025, "CAKE: Cascading and Adaptive KV Cache Eviction with Layer Preferences", arXiv 2503.12491.
Cost: W query rows against the keys and their logarithms, 6 % of a prefill of 2048 tokens of SmolLM2.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from regard._errors import InputError
from regard.cache.layer import Layer
from regard.cache.scorers._slots import query_positions
from regard.cache.scorers.snapkv import SnapKV
from regard.engine import AttentionCall
from regard.ops.eviction import attention_dispersion, attention_shift, eviction_score


@dataclass(frozen=True)
class CAKE(SnapKV):
    """Mean and fluctuation of the attention of an observation window.

    Args:
        window, kernel: as for `SnapKV`.
        gamma: factor of the variance.
    """

    gamma: float = 200.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gamma < 0:
            raise InputError.of("gamma", given=self.gamma, expected="at least 0")

    def judge(
        self, weights: Float[Tensor, "batch heads rows keys"], layer: Layer
    ) -> Float[Tensor, "batch kv_heads keys"]:
        if weights.shape[2] > 1:
            layer.memory["dispersion"] = attention_dispersion(weights)
            layer.memory["shift"] = attention_shift(weights)
        return eviction_score(weights, layer.rows.heads, gamma=self.gamma, kernel=self.kernel)

    def _remember(self, call: AttentionCall, layer: Layer) -> None:
        if call.queries == 1 and "queries" in layer.memory:
            layer.memory["queries"] = call.query.clone()
            layer.memory["query_positions"] = query_positions(call, layer)
        else:
            super()._remember(call, layer)
