"""Routing attention as a module: its maps, its centroids, and how far the published membership looks ahead."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import layer_norm, scaled_dot_product_attention

from regard._errors import InputError
from regard.nn.projections import merge_heads, split_heads
from regard.nn.routing_attention import RoutingAttention, WholeTextRoutingAttention


def make(kind: type[RoutingAttention] = RoutingAttention, **options: object) -> RoutingAttention:
    torch.manual_seed(0)
    return kind(32, 4, **{"clusters": 3, "window": 6, **options}).double().eval()  # type: ignore[arg-type]


def hidden(tokens: int = 30, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, tokens, 32, dtype=torch.float64, generator=generator)


def test_one_cluster_of_everything_is_dense_attention_on_normed_queries() -> None:
    mixer, states = make(clusters=1, window=30, local_heads=0), hidden()
    query = layer_norm(split_heads(mixer.q_proj(states), 4), (8,))
    value = split_heads(mixer.v_proj(states), 4)
    dense = scaled_dot_product_attention(query, query, value, is_causal=True)
    torch.testing.assert_close(mixer(states), mixer.o_proj(merge_heads(dense)))


@pytest.mark.parametrize("kind", [RoutingAttention, WholeTextRoutingAttention])
def test_maps_are_the_attention(kind: type[RoutingAttention]) -> None:
    mixer, states = make(kind), hidden()
    maps = mixer.maps(states)
    value = split_heads(mixer.v_proj(states), 4)
    torch.testing.assert_close(mixer.o_proj(merge_heads(maps @ value)), mixer(states))
    assert maps.triu(1).abs().max() == 0
    sums = maps.sum(-1)
    torch.testing.assert_close(sums, sums.round())
    assert bool((sums[:, :2] > 0.5).all()), "local heads always see something"
    assert 0 < float(sums[:, 2:].mean()) < 1, "some tokens are in no cluster"


def test_published_membership_looks_ahead_and_the_prefix_rule_does_not() -> None:
    states = hidden(40)
    other = states.clone()
    other[:, 30:] *= -3
    change = {
        kind: float((make(kind)(other) - make(kind)(states))[:, :30].abs().max())
        for kind in (RoutingAttention, WholeTextRoutingAttention)
    }
    assert change[RoutingAttention] < 1e-12
    assert change[WholeTextRoutingAttention] > 1e-2


def test_published_membership_step_by_step_is_the_prefix_rule() -> None:
    states, memory = hidden(), {}
    steps = [make(WholeTextRoutingAttention)(one, state=memory) for one in states.split(1, 1)]
    torch.testing.assert_close(torch.cat(steps, 1), make()(states))


def test_training_moves_centroids_to_the_tokens() -> None:
    mixer = make(decay=0.8).train()
    before = mixer.centroids.clone()
    for seed in range(40):
        mixer(hidden(seed=seed))
    query = layer_norm(split_heads(mixer.q_proj(hidden()), 4)[:, 2:], (8,))

    def distance(centroids: torch.Tensor) -> torch.Tensor:
        return torch.cdist(query, centroids[None].expand(2, -1, -1, -1)).amin(-1).mean()

    assert distance(mixer.centroids) < distance(before)
    torch.testing.assert_close(mixer.occupancy.sum(-1), torch.ones(2, dtype=torch.float64))


def test_commitment_is_the_squared_distance_to_the_nearest_centroid() -> None:
    mixer, states = make(commitment=0.5, decay=1.0).train(), hidden()
    query = layer_norm(split_heads(mixer.q_proj(states), 4)[:, 2:], (8,))
    own = torch.einsum("bhnd,hkd->bhnk", query, mixer.centroids).argmax(-1)
    target = torch.stack([mixer.centroids[h][own[:, h]] for h in range(2)], 1)
    mixer(states)
    torch.testing.assert_close(mixer.losses["commitment"], 0.5 * (query - target).square().mean())
    mixer.eval()(states)
    assert mixer.losses == {}


def test_padding_does_not_move_centroids() -> None:
    one, other = make(decay=0.5).train(), make(decay=0.5).train()
    states = hidden()
    valid = (torch.arange(30) < 20).expand(2, 30)
    one(torch.where(valid[..., None], states, 50.0), valid=valid)
    other(states[:, :20])
    torch.testing.assert_close(one.centroids, other.centroids)
    torch.testing.assert_close(one.losses["commitment"], other.losses["commitment"])


def test_a_state_keeps_its_size() -> None:
    state: dict[str, torch.Tensor] = {}
    sizes = []
    for part in hidden(40).split(10, 1):
        make()(part, state=state)
        sizes.append(sum(tensor.nbytes for tensor in state.values()))
    assert len(set(sizes)) == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [({"clusters": 0}, "clusters"), ({"window": 0}, "window"), ({"local_heads": 4}, "local_heads")],
)
def test_bad_options(options: dict[str, int], said: str) -> None:
    with pytest.raises(InputError, match=said):
        make(**options)
