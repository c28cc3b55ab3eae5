"""Block-sparse attention is masked dense attention: any pattern, offset, dtype, gradients, and both ways of computing it."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from regard.engine import AttentionCall, BlockSparseMask, Pipeline, attend, block_sparse, waves
from regard.engine.block_sparse import from_lists


def visible(mask: BlockSparseMask, queries: int) -> Tensor:
    """The definition, pair by pair."""
    seen = torch.zeros(queries, mask.keys, dtype=torch.bool)
    for row in range(queries):
        slot = row + mask.offset
        named = mask.blocks[slot // mask.size - mask.offset // mask.size].tolist()
        for key in range(mask.keys):
            inside = key // mask.key_size in named and (not mask.causal or key <= slot)
            if inside and mask.rule is not None:
                inside = bool(mask.rule(torch.tensor(slot), torch.tensor(key)))
            seen[row, key] = inside
    return seen


def tensors(
    batch: int, heads: int, groups: int, queries: int, keys: int, dim: int, seed: int, **rest
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((batch, heads, queries, dim), (batch, groups, keys, dim), (batch, groups, keys, dim))
    rest = {"dtype": torch.float64, **rest}
    q, k, v = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    return tuple(t.to(rest["dtype"]).requires_grad_() for t in (q, k, v))


def random_lists(
    queries: int, offset: int, size: int, key_size: int, keys: int, causal: bool, seed: int
) -> list[list[int]]:
    draw = random.Random(seed)
    lists = []
    for block in range(offset // size, (offset + queries - 1) // size + 1):
        first = max(offset, block * size)
        last = (min((block + 1) * size, offset + queries) - 1) if causal else keys - 1
        count = last // key_size + 1
        named = [k for k in range(count) if draw.random() < 0.4]
        safe = first // key_size if causal else 0  # every query must see something
        lists.append([*named, safe if not causal else draw.randint(0, safe)])
    return lists


cases = st.fixed_dictionaries(
    {
        "batch": st.integers(1, 2),
        "groups": st.integers(1, 3),
        "group": st.integers(1, 3),
        "queries": st.integers(1, 50),
        "offset": st.integers(0, 21),
        "size": st.integers(1, 12),
        "tokens": st.booleans(),
        "causal": st.booleans(),
        "seed": st.integers(0, 10**6),
    }
)


BACKWARDS = {  # tiles whose first keys come in falling steps of one block
    "batch": 1,
    "groups": 1,
    "group": 1,
    "queries": 5,
    "offset": 5,
    "size": 2,
    "tokens": False,
    "causal": True,
    "seed": 5506,
}


@settings(max_examples=120, deadline=None)
@example(BACKWARDS, 40)
@given(cases, st.sampled_from([1, 40, 1 << 18]))
def test_tiles_are_masked_dense_attention_with_its_gradients(case: dict, wave: int) -> None:
    queries, offset, size = case["queries"], case["offset"], case["size"]
    keys, key_size = queries + offset, 1 if case["tokens"] else size
    lists = random_lists(queries, offset, size, key_size, keys, case["causal"], case["seed"])
    mask = from_lists(lists, size, keys, causal=case["causal"], offset=offset, key_size=key_size)
    q, k, v = tensors(
        case["batch"],
        case["groups"] * case["group"],
        case["groups"],
        queries,
        keys,
        8,
        case["seed"],
    )
    seen = visible(mask, queries)
    assert seen.any(-1).all()
    expected = scaled_dot_product_attention(q, k, v, seen, scale=0.4, enable_gqa=True)
    held, waves.WAVE = waves.WAVE, wave
    try:
        output = waves.attend(q, k, v, mask.plan(queries), 0.4)
        weight = torch.randn_like(expected)
        found = torch.autograd.grad(output, (q, k, v), weight)
    finally:
        waves.WAVE = held
    torch.testing.assert_close(output, expected, atol=1e-10, rtol=0)
    for one, other in zip(found, torch.autograd.grad(expected, (q, k, v), weight), strict=True):
        torch.testing.assert_close(one, other, atol=1e-9, rtol=0)


@settings(max_examples=40, deadline=None)
@given(cases, st.integers(1, 9), st.integers(0, 5))
def test_a_rule_hides_single_keys(case: dict, window: int, sinks: int) -> None:
    queries, offset, size = case["queries"], case["offset"], case["size"]
    keys = queries + offset
    blocks = range(offset // size, (keys - 1) // size + 1)
    lists = [list(range(block + 1)) for block in blocks]
    rule = lambda q, k: (q - k < window) | (k < sinks)  # noqa: E731
    mask = from_lists(lists, size, keys, offset=offset, rule=rule)
    q, k, v = tensors(1, case["groups"] * case["group"], case["groups"], queries, keys, 8, 1)
    seen = visible(mask, queries)
    expected = scaled_dot_product_attention(q, k, v, seen, scale=0.4, enable_gqa=True)
    output = waves.attend(q, k, v, mask.plan(queries), 0.4)
    torch.testing.assert_close(output, expected, atol=1e-10, rtol=0)
    weight = torch.randn_like(expected)
    for one, other in zip(
        torch.autograd.grad(output, (q, k, v), weight),
        torch.autograd.grad(expected, (q, k, v), weight),
        strict=True,
    ):
        torch.testing.assert_close(one, other, atol=1e-9, rtol=0)
    window_of = mask.window(torch.arange(queries))
    shown = torch.zeros(queries, keys, dtype=torch.bool)
    inside = window_of.visible(queries, torch.device("cpu"))
    shown[:, window_of.lo : window_of.hi] = True if inside is None else inside[0, 0]
    assert torch.equal(shown, seen)


@pytest.mark.parametrize(
    ("dtype", "near"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)]
)
def test_precision_of_short_numbers(dtype: torch.dtype, near: float) -> None:
    """Merging keeps the kernel's precision: no worse than the dense kernel in the same dtype against float64."""
    lists = [[i] if i == 0 else [0, i - 1, i] if i % 3 else [0, 2, i] for i in range(20)]
    mask = from_lists(lists, 16, 310)
    rule = from_lists(lists, 16, 310, rule=lambda q, k: (q - k) % 3 != 1)
    q, k, v = tensors(2, 4, 2, 310, 310, 32, 0)
    for m in (mask, rule):
        seen = visible(m, 310)
        exact = scaled_dot_product_attention(q, k, v, seen, enable_gqa=True)
        short = [t.detach().to(dtype).requires_grad_() for t in (q, k, v)]
        output = waves.attend(*short, m.plan(310), 32**-0.5)
        assert output.dtype == dtype
        torch.testing.assert_close(output.double(), exact, atol=near, rtol=0)
        for one, other in zip(
            torch.autograd.grad(output.sum(), short),
            torch.autograd.grad(exact.sum(), (q, k, v)),
            strict=True,
        ):
            assert one.dtype == dtype
            torch.testing.assert_close(one.double(), other, atol=20 * near, rtol=0.02)


def test_a_query_that_sees_nothing_gives_zero_and_no_gradient() -> None:
    mask = from_lists([[0], [1]], 4, 8, rule=lambda q, k: (q != 5) & (k >= 0))
    q, k, v = tensors(1, 2, 2, 8, 8, 4, 0)
    output = waves.attend(q, k, v, mask.plan(8), 0.5)
    assert torch.equal(output[:, :, 5], torch.zeros(1, 2, 4, dtype=torch.float64))
    (grad,) = torch.autograd.grad(output.sum(), q)
    assert torch.equal(grad[:, :, 5], torch.zeros(1, 2, 4, dtype=torch.float64))
    assert torch.isfinite(grad).all()


def test_a_pattern_that_names_everything_is_plain_causal_attention() -> None:
    lists = [list(range(i + 1)) for i in range(4)]
    mask = from_lists(lists, 16, 60)
    assert mask.plan(60).complete
    assert not from_lists([*lists[:3], [0, 3]], 16, 60).plan(60).complete
    q, k, v = tensors(1, 2, 2, 60, 60, 8, 0)
    output = attend(AttentionCall(q, k, v, mask, 0.3), Pipeline(()))
    expected = scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3)
    assert torch.equal(output, expected)


@pytest.mark.parametrize("dense", [True, False])
def test_either_choice_gives_the_same(dense: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    lists = [[max(i - 1, 0), i] if i else [0] for i in range(5)]
    mask = from_lists(lists, 8, 37)
    q, k, v = tensors(2, 6, 2, 37, 37, 8, 3)
    monkeypatch.setattr(block_sparse, "cheaper_dense", lambda call, plan: dense)
    output = attend(AttentionCall(q, k, v, mask, 0.3), Pipeline(()))
    expected = scaled_dot_product_attention(q, k, v, visible(mask, 37), scale=0.3, enable_gqa=True)
    torch.testing.assert_close(output, expected, atol=1e-12, rtol=0)


def test_values_of_another_width_take_the_dense_kernel() -> None:
    q, k, _ = tensors(1, 2, 2, 40, 40, 8, 0)
    v = torch.randn(1, 2, 40, 5, dtype=torch.float64)
    mask = from_lists([[0], [1], [0, 2]], 16, 40)
    output = attend(AttentionCall(q, k, v, mask, 0.3), Pipeline(()))
    expected = scaled_dot_product_attention(q, k, v, visible(mask, 40), scale=0.3)
    torch.testing.assert_close(output, expected, atol=1e-12, rtol=0)


def test_long_sparse_patterns_run_as_tiles_and_short_ones_dense() -> None:
    def choice(tokens: int, size: int) -> bool:
        lists = [[max(i - 1, 0), i] if i else [0] for i in range(-(-tokens // size))]
        mask = from_lists(lists, size, tokens)
        call = AttentionCall(*(torch.zeros(1, 3, tokens, 64) for _ in range(3)), mask, 0.1)
        return block_sparse.cheaper_dense(call, mask.plan(tokens))

    assert not choice(4096, 128)
    assert choice(64, 2)


def test_lists_out_of_order_are_refused() -> None:
    with pytest.raises(ValueError, match=r"names key blocks \[1, 0\], expected an ascending list"):
        BlockSparseMask((torch.tensor([0]), torch.tensor([1, 0])), 8, 16)
    with pytest.raises(ValueError, match=r"query block 0 names key blocks \[0, 0\]"):
        BlockSparseMask((torch.tensor([0, 0]), torch.tensor([1])), 8, 16)
