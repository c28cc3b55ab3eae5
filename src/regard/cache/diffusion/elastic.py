"""Elastic-Cache: refresh the cache when attention has moved, from the layer on where it moved (arXiv 2510.14973).

Keys and values of a masked-diffusion model drift as masks become tokens, more in deep layers than in shallow ones. In each
layer one token is followed: of the tokens already decided, the one that the window of active masks M attends to most,

    alpha_k = sum over heads h and masks q in M of S_h[q, k],      t = argmax of alpha over decided k.

In the next step its attention row is computed twice, from the cached states and from the fresh ones (the same token both
times), and compared over the keys:

    sigma = mean over heads of cos(S_old[t, :], S_new[t, :]).

Where sigma < gamma, all deeper layers recompute every row in this very step; the layers above go on reusing. Masks far from
the window are never recomputed in between. A layer of reuse costs `window + tracked + decided tokens` rows instead of all.

The reduction axis is the keys', as the paper defines the similarity. A large gamma does not make the method exact: layer 0
always reuses, and the rows that a restored layer starts from are the cached ones.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import cosine_similarity

from regard._errors import InputError
from regard.cache.diffusion.policy import DiffusionCache


def attention_similarity(
    old: Float[Tensor, "batch heads tracked keys"], new: Float[Tensor, "batch heads tracked keys"]
) -> Float[Tensor, " batch"]:
    """Cosine of two attention rows over the keys, mean over heads and tracked tokens, in float32."""
    return cosine_similarity(old.float(), new.float(), dim=-1).mean((1, 2))


@dataclass(frozen=True)
class ElasticCache(DiffusionCache):
    """Attention-aware refresh.

    Attributes:
        gamma: similarity below which deeper layers are refreshed; 0 never refreshes (similarities are positive).
        track: tokens followed in each layer.

    Example:
        >>> ElasticCache(gamma=0.9, window=16)
        ElasticCache(window=16, gamma=0.9, track=1)
    """

    gamma: float = 0.9
    track: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.gamma <= 1:
            raise InputError.of(
                "gamma",
                given=self.gamma,
                expected="in [0, 1]",
                fix="no gamma makes the cache exact; use NoCache to recompute everything",
            )
        if self.track < 1:
            raise InputError.of("track", given=self.track, expected="a whole number >= 1")

    @property
    def tracked(self) -> int:
        return self.track

    def changed(
        self,
        old: Float[Tensor, "batch heads tracked keys"],
        new: Float[Tensor, "batch heads tracked keys"],
    ) -> tuple[Float[Tensor, " batch"], Bool[Tensor, " batch"]]:
        sigma = attention_similarity(old, new)
        return sigma, sigma < self.gamma
