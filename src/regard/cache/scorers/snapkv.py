"""SnapKV: what the last queries of the prompt look at.

    score_j = mean over the last W queries i of A[i, j], pooled over neighbouring keys, averaged over the heads of a group.

The window itself is kept. Pooling keeps whole phrases rather than single tokens.

Source: Li et al. 2024, "SnapKV: LLM Knows What You are Looking for Before Generation", arXiv 2404.14469. The paper stops at the
prompt; where the cache evicts while decoding, the window goes on with the newest tokens.
Cost: W query rows against the keys, 2 % of a prefill of 2048 tokens of SmolLM2.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from regard._errors import InputError
from regard.cache.layer import Layer
from regard.cache.scorers._observing import Observing
from regard.ops.eviction import eviction_score


@dataclass(frozen=True)
class SnapKV(Observing):
    """Mean attention of an observation window.

    Args:
        window: queries of the window, which are also the tokens always kept.
        kernel: keys that are averaged over, odd; 1 for none.
    """

    window: int = 32
    kernel: int = 5

    def __post_init__(self) -> None:
        if self.window < 1:
            raise InputError.of("window", given=self.window, expected="a whole number >= 1")
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise InputError.of("kernel", given=self.kernel, expected="an odd number >= 1")

    def judge(
        self, weights: Float[Tensor, "batch heads rows keys"], layer: Layer
    ) -> Float[Tensor, "batch kv_heads keys"]:
        return eviction_score(weights, layer.rows.heads, gamma=0.0, kernel=self.kernel)
