"""Every pattern against its definition, pair by pair, and the masked dense attention of that definition."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from regard._errors import InputError
from regard.engine import AttentionCall, BlockSparseMask, CausalMask, Pipeline, Site, attend, waves
from regard.sparse import (
    Dilated,
    LongNet,
    Pattern,
    Power,
    Sliding,
    SlidingTokens,
    Strided,
    TopKBlocks,
)
from regard.sparse.top_k_blocks import block_means, top_blocks

Definition = Callable[[int, int, int, int], bool]
"""Whether the query at a token sees an earlier key or itself: `(query, key, block, head)`."""


def power(q: int, k: int, b: int, head: int) -> bool:
    d = q // b - k // b
    return bin(d).count("1") <= 1 or d < 3 or k // b < 1


def longnet(q: int, k: int, b: int, head: int) -> bool:
    q, k = q // b, k // b
    if q == k:
        return True
    return any(
        q // w == k // w and q % r == head % r and k % r == head % r
        for w, r in ((2, 1), (6, 2), (12, 3))
    )


PATTERNS: dict[str, tuple[Callable[[int], Pattern], Definition]] = {
    "power": (lambda b: Power(window=3, block=b), power),
    "sliding": (
        lambda b: Sliding(window=2, sinks=1, block=b),
        lambda q, k, b, h: q // b - k // b < 2 or k // b < 1,
    ),
    "tokens": (
        lambda b: SlidingTokens(window=7, sinks=3, block=b),
        lambda q, k, b, h: q - k < 7 or k < 3,
    ),
    "dilated": (
        lambda b: Dilated(window=3, dilation=2, sinks=0, block=b),
        lambda q, k, b, h: q // b - k // b in (0, 2, 4),
    ),
    "strided": (
        lambda b: Strided(window=2, stride=3, sinks=1, block=b),
        lambda q, k, b, h: q // b - k // b < 2 or (q // b - k // b) % 3 == 0 or k // b < 1,
    ),
    "longnet": (
        lambda b: LongNet(segments=(2, 6, 12), dilations=(1, 2, 3), block=b),
        longnet,
    ),
}


def shown(definition: Definition, block: int, heads: int, queries: int, keys: int) -> Tensor:
    offset = keys - queries
    seen = torch.zeros(1, heads, queries, keys, dtype=torch.bool)
    for head in range(heads):
        for row in range(queries):
            for key in range(row + offset + 1):
                seen[0, head, row, key] = definition(row + offset, key, block, head)
    return seen


def draw(heads: int, groups: int, queries: int, keys: int, batch: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(queries + 100 * keys)
    shapes = ((batch, heads, queries, 8), (batch, groups, keys, 8), (batch, groups, keys, 8))
    return [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]


@pytest.fixture(params=["tiles", "chosen"])
def computed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "tiles":
        monkeypatch.setattr("regard.engine.block_sparse.cheaper_dense", lambda call, plan: False)


@pytest.mark.usefixtures("computed")
@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize(
    ("queries", "keys", "block"), [(48, 48, 4), (45, 45, 4), (13, 50, 8), (1, 33, 4), (9, 9, 16)]
)
def test_equals_masked_dense_attention(name: str, queries: int, keys: int, block: int) -> None:
    make, definition = PATTERNS[name]
    q, k, v = draw(6, 2, queries, keys)
    call = AttentionCall(
        q, k, v, CausalMask(keys, keys - queries), 0.4, query_offset=keys - queries
    )
    output = attend(call, Pipeline([make(block)]))
    seen = shown(definition, block, 6, queries, keys)
    expected = scaled_dot_product_attention(q, k, v, seen, scale=0.4, enable_gqa=True)
    torch.testing.assert_close(output, expected, atol=1e-12, rtol=0)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(sorted(PATTERNS)), st.integers(1, 60), st.integers(0, 40), st.integers(1, 20)
)
def test_any_length(name: str, queries: int, before: int, block: int) -> None:
    make, definition = PATTERNS[name]
    keys = queries + before
    mask = make(block).mask(queries, keys, 1)
    assert isinstance(mask, BlockSparseMask)
    q, k, v = draw(1, 1, queries, keys)
    output = waves.attend(q, k, v, mask.plan(queries), 0.4)
    seen = shown(definition, block, 1, queries, keys)
    expected = scaled_dot_product_attention(q, k, v, seen, scale=0.4)
    torch.testing.assert_close(output, expected, atol=1e-10, rtol=0)


def test_decoding_sees_what_the_last_row_of_a_prefill_sees() -> None:
    for make, _ in PATTERNS.values():
        pattern = make(4)
        whole = pattern.lists(41, 41)
        for keys in range(1, 42):
            assert pattern.lists(1, keys) == [whole[(keys - 1) // 4]]
        assert pattern.lists(1, 41) == [whole[-1]]
        assert pattern.lists(41, 41)[3:5] == pattern.lists(20, 20)[3:5]  # earlier rows never change


def test_budget_of_the_paper() -> None:
    """32K in blocks of 256: the last query block sees ten of 128 key blocks, as a window of nine and a sink do."""
    assert Power(block=256).lists(32768, 32768)[-1] == [
        0,
        63,
        95,
        111,
        119,
        123,
        124,
        125,
        126,
        127,
    ]
    assert len(Sliding(window=9, sinks=1, block=256).lists(32768, 32768)[-1]) == 10


def test_heads_of_longnet_are_shifted() -> None:
    pattern = LongNet(segments=(8,), dilations=(2,), block=1)
    assert pattern.of_head(0, 4).lists(8, 8)[6] == [0, 2, 4, 6]
    assert pattern.of_head(1, 4).lists(8, 8)[7] == [1, 3, 5, 7]
    assert pattern.of_head(2, 4) is pattern
    assert pattern.of_head(3, 4) is pattern.of_head(1, 4)
    assert LongNet(segments=(8,), dilations=(2,), shift=0).of_head(1, 4).lists(1024, 1024)[7] == [7]


def test_top_blocks_are_those_of_the_largest_mean_product() -> None:
    q, k, v = draw(4, 2, 90, 90)
    pattern = TopKBlocks(count=2, window=1, sinks=1, block=8)
    call = AttentionCall(q, k, v, CausalMask(90), 0.4)
    output = attend(call, Pipeline([pattern]))
    seen = torch.zeros(1, 4, 90, 90, dtype=torch.bool)
    for head in range(4):
        group = head // 2
        for i in range(12):
            rows = slice(8 * i, min(8 * i + 8, 90))
            mean = q[0, 2 * group : 2 * group + 2, rows].mean((0, 1))
            scores = {j: float(k[0, group, 8 * j : 8 * j + 8].mean(0) @ mean) for j in range(1, i)}
            best = sorted(scores, key=lambda j: -scores[j])[:2]
            for j in {0, i, *best}:
                seen[0, head, rows, 8 * j : 8 * j + 8] = True
    seen &= torch.ones(90, 90, dtype=torch.bool).tril()
    expected = scaled_dot_product_attention(q, k, v, seen, scale=0.4, enable_gqa=True)
    torch.testing.assert_close(output, expected, atol=1e-10, rtol=0)
    assert len({tuple(seen[0, h].flatten().tolist()) for h in range(4)}) == 2  # KV heads differ


@pytest.mark.parametrize("keys", [23, 24, 25, 32])
def test_top_blocks_choose_only_where_something_is_left_out(keys: int) -> None:
    q, k, v = draw(4, 2, keys, keys)
    call = AttentionCall(q, k, v, CausalMask(keys), 0.4)
    mask = TopKBlocks(count=2, window=1, sinks=0, block=8).choose(call)
    assert isinstance(mask, CausalMask) == (keys <= 24)
    plain = scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.4, enable_gqa=True)
    output = attend(call, Pipeline([TopKBlocks(count=2, window=1, sinks=0, block=8)]))
    assert torch.allclose(output, plain, atol=1e-10) == (keys <= 24)


def test_top_blocks_while_decoding_use_the_blocks_of_the_cache() -> None:
    q, k, _ = draw(2, 2, 5, 37)
    means = block_means(q[0], 8, 32)
    assert means.shape == (2, 1, 8)
    torch.testing.assert_close(means[:, 0], q[0].mean(1))
    torch.testing.assert_close(block_means(q[0], 8, 30)[:, 0], q[0][:, :2].mean(1))
    found = top_blocks(means, block_means(k[0], 8), count=1, window=1, sinks=1)
    assert found.shape == (2, 1, 5) and found.sum(-1).tolist() == [[3], [3]]
    assert found[..., 0].all() and found[..., 4].all()


def test_only_some_layers_and_heads_follow() -> None:
    q, k, v = draw(6, 2, 40, 40)

    def run(pattern: Pattern, layer: int = 0) -> Tensor:
        return attend(AttentionCall(q, k, v, CausalMask(40), 0.4, Site(layer)), Pipeline([pattern]))

    dense = scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.4, enable_gqa=True)
    sparse = run(Sliding(window=1, sinks=1, block=4))
    assert (dense - sparse).abs().max() > 0.1
    for layers in ([1, 3], lambda layer: layer % 2 == 1):
        pattern = Sliding(window=1, sinks=1, block=4, layers=layers)
        torch.testing.assert_close(run(pattern, 3), sparse, atol=1e-12, rtol=0)
        torch.testing.assert_close(run(pattern, 2), dense, atol=1e-12, rtol=0)
    for heads in ([1, 2, 5], {0: [1, 2, 5], 1: [0]}):
        mixed = run(Sliding(window=1, sinks=1, block=4, heads=heads))
        torch.testing.assert_close(mixed[:, [1, 2, 5]], sparse[:, [1, 2, 5]], atol=1e-12, rtol=0)
        torch.testing.assert_close(mixed[:, [0, 3, 4]], dense[:, [0, 3, 4]], atol=1e-12, rtol=0)
    by_head = LongNet(segments=(2, 8), dilations=(1, 2), block=4)
    some = LongNet(segments=(2, 8), dilations=(1, 2), block=4, heads=[1, 2])
    torch.testing.assert_close(run(some)[:, 1:3], run(by_head)[:, 1:3], atol=1e-12, rtol=0)
    torch.testing.assert_close(run(some)[:, 3:], dense[:, 3:], atol=1e-12, rtol=0)


def test_short_calls_may_stay_dense() -> None:
    q, k, v = draw(2, 2, 40, 40)
    dense = scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.4)

    def run(least: int) -> Tensor:
        pattern = Sliding(window=1, sinks=0, block=4, dense_below=least)
        return attend(AttentionCall(q, k, v, CausalMask(40), 0.4), Pipeline([pattern]))

    torch.testing.assert_close(run(41), dense, atol=1e-12, rtol=0)
    assert (run(40) - dense).abs().max() > 0.1
    with pytest.raises(InputError, match="dense_below must be a number of keys, got -1"):
        Sliding(dense_below=-1)


def test_bad_settings_are_named() -> None:
    with pytest.raises(InputError, match="block must be a number of tokens, 1 or more, got 0"):
        Power(block=0)
    with pytest.raises(InputError, match="window must be"):
        Sliding(window=0)
    with pytest.raises(InputError, match="sinks must be"):
        Power(sinks=-1)
    with pytest.raises(InputError, match="stride must be 1 or more, got 0"):
        Strided(stride=0)
    with pytest.raises(InputError, match="as many dilations as segments"):
        LongNet(segments=(2, 4), dilations=(1,))
    with pytest.raises(InputError, match="count must be"):
        TopKBlocks(count=-1)
    q, k, v = draw(2, 2, 8, 8)
    with pytest.raises(InputError, match=r"heads of L0 must be 0\.\.1, got 7"):
        attend(AttentionCall(q, k, v, CausalMask(8), 0.4), Pipeline([Power(heads=[7])]))
    with pytest.raises(NotImplementedError, match="Pattern must define blocks"):
        Pattern().lists(8, 8)
