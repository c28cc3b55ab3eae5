"""Routing by k-means: every cluster takes the tokens nearest to its centroid, and tokens attend inside their clusters.

    n(x)  = argmax_c mu_c . x                        x is layer-normed, so the largest product is the nearest centroid
    S_c   = the w tokens with the largest mu_c . x   every cluster takes equally many
    o_ic  = sum_{j in S_c, j <= i} softmax_j(scale q_i . k_j) v_j          for i in S_c
    o_i   = mean over the clusters that took i; 0 when none did

Which tokens S_c holds is a competition over the whole text, so a later token can push an earlier one out: under the published
rule (`balanced_topk_routing`, `routed_attention`) the future changes the past although no token attends forward. The prefix
rule (`prefix_routed_attention`) lets token i see S_c as it stands when the text ends at i. That is the published rule applied
anew after every token, as in step-by-step decoding, and it needs to remember w tokens a cluster and no more.

Cost with k clusters, n tokens, size d: n k d multiplications to route and 2 k w^2 d inside clusters (k = n / w: least at
k ~ sqrt(n), O(n^1.5 d)); the prefix rule takes up to 2 (1 + ln(n / w)) times the second part for scores in random order.
Source: Roy et al. 2020, Routing Transformer (arXiv 2003.05997).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from regard._errors import at_least_one
from regard.ops.dynamic_mask import running_top_k, true_places


def balanced_topk_routing(
    scores: Float[Tensor, "*rows clusters tokens"],
    window: int,
    valid: Bool[Tensor, "*#rows #clusters tokens"] | None = None,
) -> Int[Tensor, "*rows clusters slots"]:
    """The `window` best tokens of every cluster, in order of position: the published membership.

    Slots that no valid token fills hold the number of tokens. Cost: one selection of `window` of n for each cluster.

    Raises:
        InputError: a window below 1.

    >>> balanced_topk_routing(torch.tensor([[3.0, 1.0, 2.0], [0.0, 5.0, 4.0]]), 2)
    tensor([[0, 2],
            [1, 2]])
    """
    at_least_one(window=window)
    tokens = scores.shape[-1]
    if valid is not None:
        scores = scores.masked_fill(~valid, -torch.inf)
    best, index = scores.topk(min(window, tokens), dim=-1)
    return index.masked_fill(best == -torch.inf, tokens).sort(-1).values


def routed_attention(
    query: Float[Tensor, "batch heads tokens dim"],
    key: Float[Tensor, "batch heads keys dim"],
    value: Float[Tensor, "batch heads keys value_dim"],
    queries: Int[Tensor, "batch heads clusters query_slots"],
    keys: Int[Tensor, "batch heads clusters key_slots"],
    *,
    scale: float,
    causal: bool = True,
) -> Float[Tensor, "batch heads tokens value_dim"]:
    """Softmax attention inside clusters, averaged over the clusters that took a token.

    Args:
        queries: the tokens of each cluster, from `balanced_topk_routing`.
        keys: the same for keys; `queries` again where the two share their states.
        causal: whether a query sees only keys up to its own position.

    Cost: 2 clusters x query_slots x key_slots x d multiplications. A token in no cluster, or before all keys of its clusters,
    gets 0.
    """
    tokens = query.shape[2]
    hidden = (keys == key.shape[2])[..., None, :]
    if causal:
        hidden = hidden | (keys[..., None, :] > queries[..., :, None])
    scores = scale * take(query, queries) @ take(key, keys).transpose(-1, -2)
    weights = scores.masked_fill(hidden, torch.finfo(scores.dtype).min).softmax(-1)
    blind = hidden.all(-1).expand(queries.shape)
    return scatter_mean(weights @ take(value, keys), queries.masked_fill(blind, tokens), tokens)


class ClusterMemory(NamedTuple):
    """What the prefix rule remembers: the tokens that each cluster holds, oldest first; score -inf marks an empty slot."""

    key: Float[Tensor, "batch heads clusters window dim"]
    value: Float[Tensor, "batch heads clusters window value_dim"]
    score: Float[Tensor, "batch heads clusters window"]

    @classmethod
    def empty(cls, key: Tensor, value: Tensor, scores: Tensor, window: int) -> ClusterMemory:
        """No tokens yet, for keys, values and scores like these."""
        shape = (*scores.shape[:3], window)
        return cls(
            key.new_zeros(*shape, key.shape[-1]),
            value.new_zeros(*shape, value.shape[-1]),
            scores.new_full(shape, -torch.inf),
        )


def prefix_routed_attention(
    query: Float[Tensor, "batch heads tokens dim"],
    key: Float[Tensor, "batch heads tokens dim"],
    value: Float[Tensor, "batch heads tokens value_dim"],
    scores: Float[Tensor, "batch heads clusters tokens"],
    memory: ClusterMemory,
    *,
    scale: float,
    valid: Bool[Tensor, "batch tokens"] | None = None,
) -> tuple[Float[Tensor, "batch heads tokens value_dim"], ClusterMemory]:
    """Causal routing: token i attends in cluster c when it is among the `window` best of tokens 0 .. i, to the others of them.

    Args:
        scores: mu_c . x of every token; they decide membership and carry no gradient.
        memory: of the tokens before these (`ClusterMemory.empty` at the start); its size is the window.

    Returns:
        The head outputs, and the memory after these tokens.

    Of equal scores the newer one stays.

    Cost: with J tokens that join a cluster, at most 4 J window d multiplications for it. Scores in random order give
    J ~ window (1 + ln(n / window)); scores that only rise give J = n.
    """
    tokens, window = query.shape[2], memory.score.shape[-1]
    scores = scores.detach()
    if valid is not None:
        scores = scores.masked_fill(~valid[:, None, None], -torch.inf)
    ranked = torch.cat(
        [memory.score, scores], dim=-1
    )  # places: the memory's slots, then the tokens
    ends = running_top_k(ranked, window)
    place = torch.arange(ranked.shape[-1], device=scores.device).expand_as(ends)
    joined = ((ends > place) & (ranked > -torch.inf))[..., window:]
    index = true_places(joined)
    if not index.shape[-1]:
        return torch.zeros_like(value), memory
    held, slots, outputs = memory, place[..., :window], []
    for now in index.split(window, dim=-1):
        filled = now < tokens
        own = place.gather(
            -1, window + now.clamp(max=tokens - 1)
        )  # an empty slot stands for the end of the text
        pool = ClusterMemory(
            torch.cat([held.key, take(key, now)], dim=-2),
            torch.cat([held.value, take(value, now)], dim=-2),
            torch.cat(
                [held.score, ranked.gather(-1, own).masked_fill(~filled, -torch.inf)], dim=-1
            ),
        )
        slots = torch.cat([slots, own], dim=-1)
        there = (slots[..., None, :] <= own[..., None]) & (
            own[..., None] < ends.gather(-1, slots)[..., None, :]
        )
        there = there & (pool.score > -torch.inf).unsqueeze(-2)
        products = scale * take(query, now) @ pool.key.transpose(-1, -2)
        weights = products.masked_fill(~there, torch.finfo(products.dtype).min).softmax(-1)
        outputs.append(weights @ pool.value)
        kept = true_places(there[..., -1, :], window)
        held, slots = _keep(pool, kept), slots.gather(-1, kept.clamp(max=slots.shape[-1] - 1))
    return scatter_mean(torch.cat(outputs, dim=-2), index, tokens), held


def scatter_mean(
    values: Float[Tensor, "batch heads clusters slots dim"],
    index: Int[Tensor, "batch heads clusters slots"],
    tokens: int,
) -> Float[Tensor, "batch heads tokens dim"]:
    """Every token's mean over the slots that hold it; 0 without one. Slots with index `tokens` are left out.

    >>> index = torch.tensor([[[[0, 1], [1, 3]]]])
    >>> scatter_mean(torch.tensor([1.0, 2.0, 4.0, 9.0]).view(1, 1, 2, 2, 1), index, 3).flatten()
    tensor([1., 3., 0.])
    """
    batch, heads, _, _, dim = values.shape
    place = index.flatten(2)
    sums = values.new_zeros(batch, heads, tokens + 1, dim)
    sums = sums.scatter_add(2, place[..., None].expand(*place.shape, dim), values.flatten(2, 3))
    counts = values.new_zeros(batch, heads, tokens + 1)
    counts = counts.scatter_add(2, place, values.new_ones(place.shape))
    return sums[:, :, :tokens] / counts[:, :, :tokens, None].clamp_min(1)


def kmeans_ema_update(
    centroids: Float[Tensor, "heads clusters dim"],
    *states: Float[Tensor, "batch heads tokens dim"],
    decay: float = 0.999,
    valid: Bool[Tensor, "batch tokens"] | None = None,
) -> Float[Tensor, "heads clusters dim"]:
    """Online k-means as the paper prints it: `mu_c <- decay mu_c + (1 - decay) / m * sum over n(x) = c of x`.

    `states` are queries and keys (m = 2), or queries alone where keys are the same (m = 1). The sum is no mean: centroids of
    large clusters grow long. Cost: n k d multiplications for each of the `states`.
    """
    total = torch.stack([cluster_sums(one, centroids, valid)[1] for one in states]).sum(0)
    return decay * centroids + (1 - decay) / len(states) * total


def kmeans_ema_statistics(
    counts: Float[Tensor, "heads clusters"],
    sums: Float[Tensor, "heads clusters dim"],
    states: Float[Tensor, "batch heads tokens dim"],
    *,
    decay: float = 0.999,
    eps: float = 1e-5,
    valid: Bool[Tensor, "batch tokens"] | None = None,
) -> tuple[
    Float[Tensor, "heads clusters"],
    Float[Tensor, "heads clusters dim"],
    Float[Tensor, "heads clusters dim"],
]:
    """Online k-means as the authors' release does it, on moving counts N and sums M; returns N, M and the centroids.

        N_c <- decay N_c + (1 - decay) count_c;   M_c <- decay M_c + (1 - decay) sum_c
        mu_c = M_c / ((N_c + eps) / (n + k eps) n),   n = sum_c N_c

    The smoothing keeps a cluster that takes nothing from dividing by 0. Assignment is by the centroids before the update.
    Cost: n k d multiplications.
    """
    count, total = cluster_sums(states, smoothed_centroids(counts, sums, eps), valid)
    counts = decay * counts + (1 - decay) * count
    sums = decay * sums + (1 - decay) * total
    return counts, sums, smoothed_centroids(counts, sums, eps)


def smoothed_centroids(
    counts: Float[Tensor, "heads clusters"],
    sums: Float[Tensor, "heads clusters dim"],
    eps: float = 1e-5,
) -> Float[Tensor, "heads clusters dim"]:
    """`M_c / N_c` with Laplace smoothing of the counts."""
    whole = counts.sum(-1, keepdim=True)
    return sums / ((counts + eps) / (whole + counts.shape[-1] * eps) * whole)[..., None]


def cluster_sums(
    states: Float[Tensor, "batch heads tokens dim"],
    centroids: Float[Tensor, "heads clusters dim"],
    valid: Bool[Tensor, "batch tokens"] | None = None,
) -> tuple[Float[Tensor, "heads clusters"], Float[Tensor, "heads clusters dim"]]:
    """How many states have each centroid as their nearest (by inner product), and their sum."""
    own = torch.nn.functional.one_hot(nearest_centroid(states, centroids), centroids.shape[1])
    own = own.to(states.dtype)
    if valid is not None:
        own = own * valid[:, None, :, None].to(states.dtype)
    return own.sum((0, 2)), torch.einsum("bhnk,bhnd->hkd", own, states)


def nearest_centroid(
    states: Float[Tensor, "batch heads tokens dim"], centroids: Float[Tensor, "heads clusters dim"]
) -> Int[Tensor, "batch heads tokens"]:
    """`argmax_c mu_c . x`: the nearest centroid where all centroids are equally long."""
    return cluster_scores(states, centroids).argmax(2)


def cluster_scores(
    states: Float[Tensor, "batch heads tokens dim"], centroids: Float[Tensor, "heads clusters dim"]
) -> Float[Tensor, "batch heads clusters tokens"]:
    """`mu_c . x` of every centroid and token."""
    return centroids @ states.transpose(-1, -2)


def take(
    states: Float[Tensor, "batch heads tokens dim"],
    index: Int[Tensor, "batch heads clusters slots"],
) -> Float[Tensor, "batch heads clusters slots dim"]:
    """The states of the tokens in every cluster; an empty slot (index `tokens`) repeats the last token."""
    place = index.clamp(max=states.shape[2] - 1).flatten(2)[..., None]
    return states.gather(2, place.expand(*place.shape[:3], states.shape[3])).unflatten(
        2, index.shape[2:]
    )


def _keep(pool: ClusterMemory, kept: Tensor) -> ClusterMemory:
    """The slots of `kept` alone, empty where it names none."""
    count = pool.score.shape[-1]
    place = kept.clamp(max=count - 1)
    rows = place[..., None]
    return ClusterMemory(
        pool.key.gather(-2, rows.expand(*place.shape, pool.key.shape[-1])),
        pool.value.gather(-2, rows.expand(*place.shape, pool.value.shape[-1])),
        pool.score.gather(-1, place).masked_fill(kept == count, -torch.inf),
    )
