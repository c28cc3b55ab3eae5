"""Expected attention: what a key will receive from future queries, from the mean and covariance of past ones.

Queries before position encoding are taken to be normal with mean m and covariance C. A query t steps ahead is rotated by R_t;
averaging the rotation over the next T positions gives R, and for a key k (already rotated to its own position)

    log E[exp(q . k * s)] ~ s (R m) . k + s^2/2 k^T (R C R^T) k,        s = 1 / sqrt(dim).

These are normalised by a softmax over the keys, averaged over the heads of a group, and multiplied by the norm of the value.

Source: Devoto et al. 2025, "Expected Attention: KV Cache Compression by Estimating Attention from Future Queries Distribution",
arXiv 2510.00636.
Cost: O(keys x dim^2) for each query head, once an eviction.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def expected_attention(
    key: Float[Tensor, "batch kv_heads keys dim"],
    mean: Float[Tensor, "batch heads dim"],
    covariance: Float[Tensor, "batch heads dim dim"] | None,
    held: Bool[Tensor, "batch kv_heads keys"],
    *,
    scaling: float,
) -> Float[Tensor, "batch kv_heads keys"]:
    """The share of attention that every held key is expected to receive, averaged over the heads of a group.

    Args:
        key: after position encoding.
        mean, covariance: of future queries, that is after the average rotation; no second-order term without a covariance.
        held: False at empty slots, which get 0 and take no share.
        scaling: factor on query . key.
    """
    kv_heads = key.shape[1]
    mean = mean.unflatten(1, (kv_heads, -1)).to(key)
    scores = scaling * mean @ key.transpose(-1, -2)  # [batch, kv_heads, group, keys]
    if covariance is not None:
        spread = covariance.unflatten(1, (kv_heads, -1)).to(key)
        for g in range(spread.shape[2]):
            curved = (key @ spread[:, :, g] * key).sum(-1)
            scores[:, :, g] += 0.5 * scaling**2 * curved
    scores = scores.masked_fill(~held[:, :, None], -math.inf)
    shares = torch.softmax(scores, -1).masked_fill(~held[:, :, None], 0)
    return shares.mean(2)


Moments = tuple[
    Float[Tensor, " batch"],
    Float[Tensor, "batch heads dim"],
    Float[Tensor, "batch heads dim second"],
]
"""Number of queries, their mean, and the sum of the outer products of their deviations from it."""


def query_moments(
    query: Float[Tensor, "batch heads rows dim"],
    valid: Bool[Tensor, "batch rows"],
    covariance: bool = True,
) -> Moments:
    """The moments of the valid rows; the outer products are empty (`[batch, heads, dim, 0]`) without `covariance`."""
    count = valid.sum(-1).to(query.dtype)
    shown = valid[:, None, :, None]
    total = torch.where(shown, query, 0).sum(2)
    mean = total / count.clamp_min(1)[:, None, None]
    if not covariance:
        return count, mean, query.new_zeros(*mean.shape, 0)
    apart = torch.where(shown, query - mean[:, :, None], 0)
    return count, mean, apart.transpose(-1, -2) @ apart


def merge_moments(one: Moments, other: Moments) -> Moments:
    """The moments of two sets of queries together (Chan et al. 1979)."""
    count = one[0] + other[0]
    part = (other[0] / count.clamp_min(1))[:, None, None]
    step = other[1] - one[1]
    mean = one[1] + part * step
    if not one[2].shape[-1]:
        return count, mean, one[2]
    apart = (one[0][:, None, None] * part * step)[..., None] * step[..., None, :]
    return count, mean, one[2] + other[2] + apart
