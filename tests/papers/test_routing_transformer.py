"""The pieces of the Routing Transformer's experiment."""

from __future__ import annotations

import pytest
import torch

from regard.nn.routing_attention import RoutingAttention, WholeTextRoutingAttention
from regard.papers._routing_transformer_runs import (
    ARMS,
    RandomClusters,
    Setting,
    build,
    deviation,
    far_pairs,
    leak,
    learned,
    maps_of,
    nats,
    slope,
    together,
)

SMALL = Setting(24, 6, 3, steps=1, width=16, heads=2)


def test_arms_differ_in_their_attention_alone() -> None:
    sizes = {}
    for arm in ARMS:
        torch.manual_seed(0)
        model = build(arm, 32, SMALL)
        ids = torch.randint(32, (2, 24))
        assert nats(model.eval(), ids).shape == (2,)
        sizes[arm] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sizes["routing"] == sizes["random"] == sizes["published"]
    assert sizes["full"] == sizes["local"] >= sizes["routing"]


def test_random_clusters_have_the_size_of_others() -> None:
    torch.manual_seed(0)
    mixer = RandomClusters(16, 2, clusters=3, window=6).eval()
    seen = (mixer.maps(torch.randn(2, 24, 16))[:, 1] > 0).sum(-1)
    assert 1 <= int(seen.max()) <= 18
    model = build("random", 32, SMALL).eval()
    assert [tuple(one.shape) for one in maps_of(model, torch.randint(32, (2, 24)))] == [
        (2, 2, 24, 24)
    ] * SMALL.layers


def test_the_leak_is_of_the_published_rule() -> None:
    assert leak(RoutingAttention, 0, tokens=32) == 0
    assert leak(WholeTextRoutingAttention, 0, tokens=32) > 0.1


def test_far_pairs_ask_for_the_value_of_each_key_once() -> None:
    task = far_pairs(length=20, pairs=4)
    samples = task.draw(50, 0)
    for ids, labels in zip(samples.ids.tolist(), samples.labels.tolist(), strict=True):
        value = dict(
            divmod(token - 9, 4) for token in ids[:4]
        )  # 0 fills, 4 keys, 4 values, 16 pairs
        assert set(value) == {0, 1, 2, 3} and not any(ids[4:12])
        questions, answers = ids[12::2], ids[13::2]
        assert [5 + value[key - 1] for key in questions] == answers
        assert sorted(questions) == [1, 2, 3, 4]
        assert labels[13::2] == answers and set(labels[:12] + labels[12::2]) == {-100}
    assert int(samples.ids.max()) < task.vocabulary == 25


def test_slope_of_a_power() -> None:
    assert slope([2, 4, 8], [8, 64, 512]) == pytest.approx(3)


def test_pairs_that_share_a_cluster() -> None:
    query = torch.tensor([[[[3.0, 2.0, 0.0], [0.0, 0.0, 1.0]]]])
    key = torch.tensor([[[[0.0, 5.0, 4.0], [9.0, 0.0, 0.0]]]])
    found = together([query, key], 1, 3)[0, 0]
    assert found.tolist() == [[False, True, False], [False, False, False], [True, False, False]]


def test_clusters_of_groups_are_found() -> None:
    generator = torch.Generator().manual_seed(0)
    states = 4 * torch.eye(4)[torch.arange(400) % 4] + 0.1 * torch.randn(
        400, 4, generator=generator
    )
    found = learned(states[None, None], 12, generator)[0]
    assert torch.cdist(4 * torch.eye(4), found).amin(1).max() < 0.5


def test_the_module_equals_what_it_must() -> None:
    assert deviation() < 1e-9
