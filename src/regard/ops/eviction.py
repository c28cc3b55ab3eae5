"""CAKE's reading of an observation window: how spread out and how changeable attention is, and which keys to keep.

With P the attention of the last W queries of a prompt on the keys before them (rows not renormalised),

    dispersion = - sum over heads, queries i and keys j of P[i, j] log P[i, j],
    shift      =   sum over heads and keys j of Var_i P[i, j],
    preference = dispersion^(1/tau1) * shift^(1/tau2),
    score_j    = mean_i A[i, j] + gamma * Var_i A[i, j], average-pooled over j, then averaged over the heads of a group.

The first three say how much of the cache a layer deserves, the last which keys inside it. Variances are unbiased (1 / (W - 1)).

Source: Qin et al. 2025, "CAKE: Cascading and Adaptive KV Cache Eviction with Layer Preferences", arXiv 2503.12491. Pooling and
the group's mean are SnapKV's (arXiv 2404.14469). Sums run over one sample, where the released code sums over the batch: one
prompt does not change what another keeps.

Cost: a few passes over rows x keys numbers.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def attention_dispersion(
    weights: Float[Tensor, "batch heads rows keys"],
) -> Float[Tensor, " batch"]:
    """Spatial dispersion in nats: the entropy terms `-P log(P + 1e-10)`, summed over heads, rows and keys.

    >>> round(float(attention_dispersion(torch.full((1, 2, 3, 4), 0.25))), 4)  # 2 heads x 3 rows x log 4
    8.3178
    """
    return -(weights * torch.log(weights + 1e-10)).sum((1, 2, 3))


def attention_shift(weights: Float[Tensor, "batch heads rows keys"]) -> Float[Tensor, " batch"]:
    """Temporal shift: the variance of a key's weight over the rows, summed over heads and keys; 0 for a single row.

    >>> attention_shift(torch.eye(2).view(1, 1, 2, 2))
    tensor([1.])
    """
    if weights.shape[2] < 2:
        return weights.new_zeros(len(weights))
    return weights.var(2).sum((1, 2))


def layer_preference(
    dispersion: Float[Tensor, "..."], shift: Float[Tensor, "..."], tau: tuple[float, float]
) -> Float[Tensor, "..."]:
    """`dispersion^(1/tau1) * shift^(1/tau2)` in float64: a large tau flattens, a small one sharpens."""
    return dispersion.double().clamp_min(0) ** (1 / tau[0]) * shift.double() ** (1 / tau[1])


def eviction_score(
    weights: Float[Tensor, "batch heads rows keys"],
    kv_heads: int,
    *,
    gamma: float = 200.0,
    kernel: int = 5,
) -> Float[Tensor, "batch kv_heads keys"]:
    """CAKE's eviction indicator: mean plus `gamma` times variance over the rows, pooled, averaged over each group.

    With `gamma` 0 it is SnapKV's score.
    """
    score = weights.mean(2)
    if gamma and weights.shape[2] > 1:
        score = score + gamma * weights.var(2)
    return group_mean(pool_keys(score, kernel), kv_heads)


def pool_keys(
    score: Float[Tensor, "batch heads keys"], kernel: int
) -> Float[Tensor, "batch heads keys"]:
    """Average over `kernel` neighbouring keys; beyond the ends there are zeros, which count.

    >>> pool_keys(torch.tensor([[[3.0, 0.0, 0.0, 6.0]]]), 3)
    tensor([[[1., 1., 2., 2.]]])
    """
    if kernel == 1:
        return score
    return torch.nn.functional.avg_pool1d(score, kernel, stride=1, padding=kernel // 2)


def group_mean(
    score: Float[Tensor, "batch heads keys"], kv_heads: int
) -> Float[Tensor, "batch kv_heads keys"]:
    """The mean over the query heads that share a KV head."""
    return score.unflatten(1, (kv_heads, -1)).mean(2)
