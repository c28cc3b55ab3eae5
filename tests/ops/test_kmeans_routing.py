"""Routing by k-means: loops over tokens and clusters, dense attention, the k-means formulas, cost by counted products."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import layer_norm
from torch.utils.flop_counter import FlopCounterMode

from regard._errors import InputError
from regard.ops.kmeans_routing import (
    ClusterMemory,
    balanced_topk_routing,
    cluster_scores,
    cluster_sums,
    kmeans_ema_statistics,
    kmeans_ema_update,
    nearest_centroid,
    prefix_routed_attention,
    routed_attention,
    scatter_mean,
    smoothed_centroids,
)


def draw(
    *shape: int, seed: int = 0, clusters: int = 3, dim: int = 4
) -> tuple[Tensor, Tensor, Tensor]:
    """States that are query and key, values and scores."""
    generator = torch.Generator().manual_seed(seed)
    batch, heads, tokens = shape
    states = torch.randn(batch, heads, tokens, dim, generator=generator, dtype=torch.float64)
    value = torch.randn(batch, heads, tokens, 5, generator=generator, dtype=torch.float64)
    centroids = torch.randn(heads, clusters, dim, generator=generator, dtype=torch.float64)
    return states, value, cluster_scores(states, centroids)


def by_prefix(states: Tensor, value: Tensor, scores: Tensor, window: int, **more: Tensor) -> Tensor:
    memory = ClusterMemory.empty(states, value, scores, window)
    return prefix_routed_attention(states, states, value, scores, memory, scale=0.7, **more)[0]


def published(
    states: Tensor, value: Tensor, scores: Tensor, window: int, causal: bool = True
) -> Tensor:
    members = balanced_topk_routing(scores, window)
    return routed_attention(states, states, value, members, members, scale=0.7, causal=causal)


def published_loop(
    states: Tensor, value: Tensor, scores: Tensor, window: int, causal: bool = True
) -> Tensor:
    """One batch row and head at a time, one cluster at a time, one token at a time; of equal scores the newer stays."""
    output = torch.zeros_like(value)
    batch, heads, clusters, tokens = scores.shape
    for b in range(batch):
        for h in range(heads):
            found: list[list[Tensor]] = [[] for _ in range(tokens)]
            for c in range(clusters):
                order = sorted(range(tokens), key=lambda j: (-float(scores[b, h, c, j]), -j))
                members = order[:window]
                for i in members:
                    seen = [j for j in members if j <= i or not causal]
                    weights = (0.7 * states[b, h, seen] @ states[b, h, i]).softmax(0)
                    found[i].append(weights @ value[b, h, seen])
            for i, several in enumerate(found):
                if several:
                    output[b, h, i] = torch.stack(several).mean(0)
    return output


def prefix_loop(states: Tensor, value: Tensor, scores: Tensor, window: int) -> Tensor:
    """The published rule, applied anew after every token."""
    rows = [
        published_loop(states[:, :, : i + 1], value[:, :, : i + 1], scores[..., : i + 1], window)[
            :, :, -1
        ]
        for i in range(scores.shape[-1])
    ]
    return torch.stack(rows, 2)


@pytest.mark.parametrize("causal", [True, False])
def test_published_rule_by_loops(causal: bool) -> None:
    states, value, scores = draw(2, 2, 11)
    torch.testing.assert_close(
        published(states, value, scores, 4, causal),
        published_loop(states, value, scores, 4, causal),
    )


@pytest.mark.parametrize("window", [1, 3, 4, 20])
def test_prefix_rule_is_the_published_rule_after_every_token(window: int) -> None:
    states, value, scores = draw(2, 2, 14, seed=1)
    torch.testing.assert_close(
        by_prefix(states, value, scores, window), prefix_loop(states, value, scores, window)
    )


def test_scores_that_only_rise_or_tie() -> None:
    states, value, scores = draw(1, 1, 12)
    rising = torch.arange(12, dtype=torch.float64).expand_as(scores)
    for ranked in (rising, -rising, torch.zeros_like(scores), (scores * 2).round()):
        torch.testing.assert_close(
            by_prefix(states, value, ranked, 4), prefix_loop(states, value, ranked, 4)
        )


@pytest.mark.parametrize("rule", [by_prefix, published])
def test_one_cluster_of_all_tokens_is_dense_attention(rule) -> None:
    states, value, scores = draw(2, 3, 17, clusters=1)
    dense = torch.nn.functional.scaled_dot_product_attention(
        states, states, value, is_causal=True, scale=0.7
    )
    torch.testing.assert_close(rule(states, value, scores, 17), dense, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("rule", [by_prefix, published])
def test_apart_clusters_are_block_diagonal_attention(rule) -> None:
    _, value, _ = draw(1, 1, 12)
    kind = torch.tensor([0, 1, 2, 2, 1, 0, 0, 1, 2, 2, 1, 0])
    states = (
        torch.eye(3, dtype=torch.float64)[kind][None, None]
        + 0.1 * torch.randn(1, 1, 12, 3).double()
    )
    scores = cluster_scores(states, torch.eye(3, dtype=torch.float64)[None])
    same = (kind[:, None] == kind) & torch.ones(12, 12, dtype=torch.bool).tril()
    dense = torch.nn.functional.scaled_dot_product_attention(
        states, states, value, attn_mask=same, scale=0.7
    )
    found = rule(states, value, scores, 4)
    if rule is published:
        torch.testing.assert_close(found, dense)
    else:  # before a cluster is full it also takes tokens that are far from its centroid
        torch.testing.assert_close(found[:, :, -1], dense[:, :, -1])


def test_queries_before_all_keys_of_their_cluster_get_nothing() -> None:
    value = torch.ones(1, 1, 3, 1)
    states = torch.ones(1, 1, 3, 2)
    queries, keys = torch.tensor([[[[0, 2]]]]), torch.tensor([[[[1, 2]]]])
    found = routed_attention(states, states, value, queries, keys, scale=1.0)
    assert found.flatten().tolist() == [0, 0, 1]


def test_the_future_reaches_the_published_rule_alone() -> None:
    states, value, scores = draw(2, 2, 20)
    later = scores.clone()
    later[..., 12:] += 5
    assert torch.equal(
        by_prefix(states, value, later, 4)[:, :, :12],
        by_prefix(states, value, scores, 4)[:, :, :12],
    )
    leak = published(states, value, later, 4) - published(states, value, scores, 4)
    assert leak[:, :, :12].abs().max() > 0.1


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=5),
    st.integers(1, 7),
    st.booleans(),
    st.integers(0, 99),
)
def test_goes_on_from_a_memory(sizes: list[int], window: int, ties: bool, seed: int) -> None:
    states, value, scores = draw(2, 1, sum(sizes), seed=seed)
    scores = scores.round() if ties else scores
    memory, parts = ClusterMemory.empty(states, value, scores, window), []
    for s, v, score in zip(
        states.split(sizes, 2), value.split(sizes, 2), scores.split(sizes, 3), strict=True
    ):
        part, memory = prefix_routed_attention(s, s, v, score, memory, scale=0.7)
        parts.append(part)
        assert memory.score.shape[-1] == window
    torch.testing.assert_close(torch.cat(parts, 2), by_prefix(states, value, scores, window))


def test_padding_is_as_if_it_were_not_there() -> None:
    states, value, scores = draw(1, 2, 15)
    valid = torch.rand(1, 15) > 0.4
    found = by_prefix(states, value, scores + 9.0 * ~valid, 4, valid=valid)
    kept = valid[0]
    alone = by_prefix(states[:, :, kept], value[:, :, kept], scores[..., kept], 4)
    torch.testing.assert_close(found[:, :, kept], alone)
    members = balanced_topk_routing(scores + 9.0 * ~valid, 12, valid[:, None, None])
    assert set(members[0, 0, 0].tolist()) == {*torch.nonzero(kept)[:, 0].tolist(), 15}


def test_nothing_but_padding_gives_zeros() -> None:
    states, value, scores = draw(1, 1, 5)
    found = by_prefix(states, value, scores, 2, valid=torch.zeros(1, 5, dtype=torch.bool))
    assert found.abs().max() == 0


def test_gradients() -> None:
    states, value, scores = draw(1, 1, 7, dim=3)
    states.requires_grad_(), value.requires_grad_()
    for rule in (by_prefix, published):
        assert torch.autograd.gradcheck(
            lambda s, v, rule=rule: rule(s, v, scores, 3), (states, value)
        )


def test_scatter_mean_by_a_loop() -> None:
    index = torch.randint(0, 7, (2, 2, 3, 4))
    values = torch.randn(2, 2, 3, 4, 5, dtype=torch.float64)
    found = scatter_mean(values, index, 6)  # 6 is an empty slot
    for b in range(2):
        for h in range(2):
            for token in range(6):
                mine = values[b, h][index[b, h] == token]
                expected = mine.mean(0) if len(mine) else torch.zeros(5, dtype=torch.float64)
                torch.testing.assert_close(found[b, h, token], expected)


def test_the_largest_product_is_the_nearest_of_equally_long_centroids() -> None:
    states = layer_norm(torch.randn(2, 3, 50, 8), (8,))
    centroids = torch.nn.functional.normalize(torch.randn(3, 5, 8), dim=-1) * 2
    distance = torch.cdist(states, centroids[None].expand(2, -1, -1, -1))
    assert torch.equal(nearest_centroid(states, centroids), distance.argmin(-1))


def toy() -> tuple[Tensor, Tensor]:
    """Three tokens, two near centroid 0 and one near centroid 1."""
    centroids = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    return centroids, torch.tensor([[[[2.0, 0.0], [3.0, 1.0], [0.0, 5.0]]]])


def test_printed_update_on_toy_counts() -> None:
    centroids, states = toy()
    found = kmeans_ema_update(centroids, states, decay=0.9)
    torch.testing.assert_close(found, torch.tensor([[[0.9 + 0.5, 0.1], [0.0, 0.9 + 0.5]]]))
    keys = torch.tensor([[[[0.0, 7.0], [0.0, 0.0], [0.0, 0.0]]]])
    both = kmeans_ema_update(centroids, states, keys, decay=0.9)
    torch.testing.assert_close(both, torch.tensor([[[0.9 + 0.25, 0.05], [0.0, 0.9 + 0.25 + 0.35]]]))


def test_released_update_on_toy_counts() -> None:
    centroids, states = toy()
    counts = torch.ones(1, 2)
    counts, sums, moved = kmeans_ema_statistics(counts, centroids, states, decay=0.9, eps=0.0)
    torch.testing.assert_close(counts, torch.tensor([[0.9 + 0.2, 0.9 + 0.1]]))
    torch.testing.assert_close(sums, torch.tensor([[[0.9 + 0.5, 0.1], [0.0, 0.9 + 0.5]]]))
    torch.testing.assert_close(moved, sums / counts[..., None])
    ignored = kmeans_ema_statistics(
        torch.ones(1, 2), centroids, states, decay=0.9, valid=torch.tensor([[True, False, False]])
    )
    torch.testing.assert_close(ignored[0], torch.tensor([[0.9 + 0.1, 0.9]]))


def test_a_cluster_without_tokens_stays_finite() -> None:
    _, states = toy()
    counts, sums = torch.tensor([[3.0, 0.0]]), torch.tensor([[[1.0, 1.0], [0.0, 0.0]]])
    assert all(part.isfinite().all() for part in kmeans_ema_statistics(counts, sums, states))
    assert smoothed_centroids(counts, sums).isfinite().all()


def test_online_kmeans_finds_two_groups() -> None:
    centre = torch.tensor([[3.0, 0.0, 0.0], [0.0, 3.0, 0.0]])
    counts, sums = torch.ones(1, 2), torch.tensor([[[1.0, 0.8, 0.5], [0.8, 1.0, -0.5]]])
    for _ in range(60):
        states = centre[torch.randint(2, (1, 1, 64))] + 0.1 * torch.randn(1, 1, 64, 3)
        counts, sums, found = kmeans_ema_statistics(counts, sums, states, decay=0.8)
    distance = torch.cdist(found[0], centre).amin(0)
    assert distance.max() < 0.1
    assert cluster_sums(states, found)[0].sum() == 64


def products(tokens: int, clusters: int, rule) -> int:
    """Multiplications of routing and attention together, as counted by torch."""
    dim, window = 16, tokens // clusters
    states = layer_norm(torch.randn(1, 1, tokens, dim), (dim,))
    centroids = layer_norm(torch.randn(1, clusters, dim), (dim,))
    with FlopCounterMode(display=False) as counter:
        rule(states, states, cluster_scores(states, centroids), window)
    return counter.get_total_flops() // 2


@pytest.mark.parametrize(("rule", "most"), [(published, 1.51), (by_prefix, 1.65)])
def test_cost_grows_with_the_power_of_one_and_a_half(rule, most: float) -> None:
    sizes = [256, 1024, 4096]
    counts = [products(n, math.isqrt(n), rule) for n in sizes]
    slope = math.log(counts[-1] / counts[0]) / math.log(sizes[-1] / sizes[0])
    assert 1.4 < slope < most


def test_the_root_is_the_best_number_of_clusters() -> None:
    counts = {k: products(4096, k, published) for k in (8, 16, 32, 64, 128, 256, 512)}
    best = min(counts, key=lambda k: counts[k])
    assert best in (64, 128)  # n k d + 2 n^2 d / k is least at k = sqrt(2 n) = 90


def test_bad_window() -> None:
    with pytest.raises(InputError, match="window"):
        balanced_topk_routing(torch.zeros(1, 3), 0)
