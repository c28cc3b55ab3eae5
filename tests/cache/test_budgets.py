"""Budget rules on real caches: totals, shares, limits, cascades and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from regard._errors import InputError
from regard.cache import Cache
from regard.cache.budgets import (
    Ada,
    CakePreference,
    Calibrated,
    Global,
    Pyramid,
    Uniform,
    best_anywhere,
    divide,
)
from regard.cache.calibration import Calibration
from regard.cache.eviction import allowed
from regard.cache.scorers import CAKE, H2O, KeyNorm, SnapKV, Streaming

LAYERS, HEADS, TOKENS = 3, 2, 40


def profile(*shares: float) -> Calibration:
    """A profile of one fraction for 3 layers of 2 heads."""
    table = torch.tensor(shares).view(1, LAYERS, HEADS)
    fraction = round(float(table.mean()), 6)
    nested = tuple(tuple(map(tuple, layers)) for layers in table.tolist())
    return Calibration("tiny", "0" * 64, 1, 100, (fraction,), nested)


EVEN = profile(*[0.25] * 6)
RULES = {
    "uniform": lambda size: Uniform(size),
    "pyramid": lambda size: Pyramid(size),
    "ada": lambda size: Ada(size),
    "global": lambda size: Global(size),
    "cake": lambda size: CakePreference(size),
    "calibrated": lambda size: Calibrated(size, calibration=profile(0.9, 0.1, 0.2, 0.3, 0.0, 0.0)),
}


def lengths(cache: Cache) -> Tensor:
    return torch.stack([layer.lengths for layer in cache.held])  # [layers, batch, heads]


@pytest.mark.parametrize("size", [0.3, 12, "4KB"])
@pytest.mark.parametrize("name", RULES)
def test_spends_exactly_its_budget(name, size, model, batch):
    ids, mask = batch
    rule = RULES[name](size)
    with Cache(model, CAKE(window=4), rule, sinks=2) as cache:
        cache.prefill(ids, mask)
        assert cache.budget is not None
        room = allowed(cache.budget, cache.held[0], cache.held)
        total = lengths(cache).sum((0, 2))
        assert total.tolist() == (room * LAYERS * HEADS).tolist()
        if isinstance(size, float):
            assert room.tolist() == (mask.sum(-1) * size).round().tolist()


@pytest.mark.parametrize("name", RULES)
def test_keeps_sinks_and_drops_nothing_when_all_fits(name, model, batch):
    ids, mask = batch
    with Cache(model, CAKE(window=4), RULES[name](0.3), sinks=2) as cache:
        cache.prefill(ids, mask)
        for row in range(2):
            first = int(mask[row].argmax())
            for layer in range(LAYERS):
                for head in range(HEADS):
                    assert cache.kept(layer, head, row)[:2].tolist() == [first, first + 1]
    with Cache(model, CAKE(window=4), RULES[name](TOKENS)) as cache:
        cache.prefill(ids, mask)
        assert lengths(cache).tolist() == [[[n, n] for n in mask.sum(-1).tolist()]] * LAYERS


def test_a_cascade_keeps_what_one_selection_keeps(model, batch):
    ids, mask = batch
    for size in (8, 13, 20):
        rule = CakePreference(size)
        with (
            Cache(model, CAKE(window=4), rule) as cascade,
            Cache(model, CAKE(window=4), rule) as once,
        ):
            cascade.prefill(ids, mask)
            with once.paused():
                once.prefill(ids, mask)
            once.compress()
            for layer in range(LAYERS):
                for head in range(HEADS):
                    for row in range(2):
                        one, other = (c.kept(layer, head, row) for c in (cascade, once))
                        assert one.tolist() == other.tolist()


def test_a_cascade_never_holds_more_than_its_budget_and_a_layer(model):
    """While layer m runs, layers before it hold no more than the whole budget."""
    torch.manual_seed(2)
    ids = torch.randint(0, 64, (1, 60))
    held: list[int] = []

    class Watching(Cache):
        def _keep_budget(self, layer: Any, tokens: int) -> None:
            super()._keep_budget(layer, tokens)
            held.append(sum(int(one.lengths.sum()) for one in self.held if one.rows is not None))

    with Watching(model, CAKE(window=4), CakePreference(10)) as cache:
        cache.prefill(ids)
    assert len(held) == LAYERS
    assert max(held) <= 10 * LAYERS * HEADS


def test_cake_needs_its_statistics(model):
    cache = Cache(model, KeyNorm(), CakePreference(8))
    with cache, pytest.raises(InputError, match="dispersion and shift"):
        cache.prefill(torch.randint(0, 64, (1, 30)))


def test_cake_keeps_its_shares_while_decoding(model):
    ids = torch.randint(0, 64, (1, 40))
    with Cache(model, CAKE(window=4), CakePreference(10), every=1) as cache:
        cache.prefill(ids)
        before = lengths(cache)
        for token in range(6):
            cache.prefill(torch.tensor([[token]]))
        assert lengths(cache).tolist() == before.tolist()


def test_pyramid_falls_from_layer_to_layer(model):
    with Cache(model, SnapKV(window=4), Pyramid(12), sinks=2) as cache:
        cache.prefill(torch.randint(0, 64, (1, TOKENS)))
        # mean 6 beside 6 protected: least 0.3, most 11.7, the middle 6
        assert lengths(cache)[:, 0, 0].tolist() == [18, 12, 6] or lengths(cache).sum() == 72
        assert bool((lengths(cache)[:, 0, 0].diff() < 0).all())


def test_ada_gives_slots_to_the_head_that_scores(model):
    scores = torch.tensor([[[9.0, 8.0, 7.0, 6.0, 1.0], [5.0, 4.0, 3.0, 2.0, 0.0]]])
    assert best_anywhere([scores], torch.tensor([4]), torch.tensor([0]))[0].tolist() == [[4, 0]]
    assert best_anywhere([scores], torch.tensor([4]), torch.tensor([1]))[0].tolist() == [[3, 1]]


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 60), st.integers(0, 4), st.integers(0, 10_000))
def test_best_anywhere_is_the_top_of_all(total, least, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = [torch.randn(1, 2, 9, generator=generator) for _ in range(3)]
    scores[1][0, 0, :4] = -torch.inf  # holds less
    counts = best_anywhere(scores, torch.tensor([total]), torch.tensor([least]))
    held = torch.stack([(score > -torch.inf).sum(-1) for score in scores])
    found = torch.stack(counts)
    assert bool((found <= held).all())
    floor = torch.minimum(held, torch.tensor(least))
    if total >= int(floor.sum()):
        assert int(found.sum()) == min(total, int(held.sum()))
        assert bool((found >= floor).all())
    if not least:
        flat = torch.cat([score.flatten() for score in scores])
        bar = flat.sort(descending=True).values[: int(found.sum())]
        expected = [
            [int((head >= bar[-1]).sum()) if len(bar) else 0 for head in s[0]] for s in scores
        ]
        assert found[:, 0].tolist() == expected


def test_calibrated_follows_the_profile_with_a_floor(model):
    rule = Calibrated(0.25, calibration=profile(0.9, 0.1, 0.2, 0.3, 0.0, 0.0), least=2)
    with Cache(model, KeyNorm(), rule, sinks=2) as cache:
        cache.prefill(torch.randint(0, 64, (1, TOKENS)))
        slots = lengths(cache)[:, 0]
    assert slots.sum() == 60
    assert slots[2].tolist() == [2, 2]
    assert slots[0, 0] > slots[1, 1] > slots[1, 0] > slots[0, 1] > 2


def test_a_small_head_keeps_sinks_before_its_newest(model):
    """A calibrated head with room for four tokens keeps its two sinks and its two newest, not the window of eight."""
    rule = Calibrated(0.25, calibration=profile(1.0, 0.5, 0.0, 0.0, 0.0, 0.0), least=4)
    with Cache(model, SnapKV(window=8), rule, sinks=2) as cache:
        cache.prefill(torch.randint(0, 64, (1, TOKENS)))
        assert cache.kept(2, 1).tolist() == [0, 1, 38, 39]


def test_h2o_keeps_half_of_every_head_for_the_newest(model):
    with Cache(model, H2O(), Global(0.4), sinks=0) as cache:
        cache.prefill(torch.randint(0, 64, (1, TOKENS)))
        for layer in range(LAYERS):
            for head in range(HEADS):
                kept = cache.kept(layer, head).tolist()
                newest = len(kept) // 2
                assert kept[len(kept) - newest :] == list(range(TOKENS - newest, TOKENS))


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.floats(0, 50), min_size=6, max_size=6),
    st.integers(0, 300),
    st.integers(0, 10),
    st.integers(10, 60),
)
def test_divide_keeps_its_limits(wanted, total, least, most):
    slots = divide(torch.tensor(wanted, dtype=torch.float64).view(3, 2), total, least, most)
    assert int(slots.sum()) == min(total, 6 * most)
    assert int(slots.max()) <= most
    assert int(slots.min()) >= min(least, total // 6)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Uniform(0),
        lambda: Global(1.5),
        lambda: Ada("lots"),
        lambda: Uniform(-0.1),
        lambda: Uniform(True),
        lambda: Uniform("0MB"),
        lambda: Pyramid(0.2, beta=0.5),
        lambda: Ada(0.2, floor=2.0),
        lambda: CakePreference(0.2, tau=(0.0, 1.0)),
        lambda: Calibrated(0.2),
        lambda: Calibrated(0.2, calibration=EVEN, least=-1),
    ],
)
def test_refuses_nonsense(make):
    with pytest.raises(InputError):
        make()


def test_refuses_a_profile_of_another_shape(model):
    other = Calibration("other", "0" * 64, 1, 9, (0.5,), (((0.5,), (0.5,)),))
    cache = Cache(model, Streaming(), Calibrated(8, calibration=other))
    with cache, pytest.raises(InputError, match="2 layers with 1 KV heads"):
        cache.prefill(torch.randint(0, 64, (1, 30)))
