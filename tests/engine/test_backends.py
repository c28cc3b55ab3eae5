"""Where backends overlap they give the same numbers: dense, blockwise, block-sparse and the float64 reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.reference import Reassemble, causal, dense, make
from regard.engine import (
    AttentionCall,
    BlockSparseMask,
    CausalMask,
    DeferredMask,
    FullMask,
    Pipeline,
    TensorMask,
    attend,
    block_sparse,
    blockwise,
)
from regard.engine import (
    dense as fused,
)


def named(pattern: list[list[int]], size: int, keys: int, causal: bool = True) -> BlockSparseMask:
    return BlockSparseMask(
        tuple(torch.tensor(blocks, dtype=torch.long) for blocks in pattern), size, keys, causal
    )


def seen_by(pattern: list[list[int]], size: int, queries: int, keys: int, causally: bool) -> Tensor:
    visible = torch.zeros(1, 1, queries, keys, dtype=torch.bool)
    for i in range(queries):
        for block in pattern[i // size]:
            visible[..., i, block * size : (block + 1) * size] = True
    return visible & causal(queries, keys) if causally else visible


PATTERNS = {
    "everything": [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3]],
    "window": [[0], [0, 1], [1, 2], [2, 3]],
    "sink and window": [[0], [0, 1], [0, 2], [0, 3]],
    "own block": [[0], [1], [2], [3]],
}


@pytest.mark.parametrize("causally", [True, False])
@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS.keys())
def test_block_sparse_blockwise_and_dense_agree(pattern: list[list[int]], causally: bool) -> None:
    q, k, v = make(queries=27)
    mask = named(pattern, 8, 27, causally)
    call = AttentionCall(q, k, v, mask, 0.3)
    expected = dense(q, k, v, seen_by(pattern, 8, 27, 27, causally), scaling=0.3)
    seen = Reassemble()
    outputs = {
        "block_sparse": block_sparse.attend(call),
        "blockwise": attend(call, Pipeline((seen,))),
        "dense": fused.attend(call),
        "chosen": attend(call, Pipeline(())),
    }
    for name, output in outputs.items():
        torch.testing.assert_close(output.double(), expected.output, atol=2e-5, rtol=1e-5, msg=name)
    torch.testing.assert_close(seen.weights_, expected.weights, atol=2e-5, rtol=0)


def test_a_sparse_pattern_keeps_soft_capping_and_sinks() -> None:
    q, k, v = make(queries=27)
    pattern = PATTERNS["window"]
    sinks = torch.tensor([0.3, -1.0, 2.0, 0.0])
    call = AttentionCall(q, k, v, named(pattern, 8, 27), 0.3, softcap=2.0, sinks=sinks)
    expected = dense(
        q, k, v, seen_by(pattern, 8, 27, 27, True), scaling=0.3, softcap=2.0, sinks=sinks
    )
    torch.testing.assert_close(
        attend(call, Pipeline(())).double(), expected.output, atol=2e-5, rtol=1e-5
    )


def test_patterns_that_cannot_be_are_named() -> None:
    with pytest.raises(ValueError, match="query block 1 names no key block"):
        named([[0], []], 8, 16)
    with pytest.raises(ValueError, match=r"names key blocks \[0, 2\], expected 0..1"):
        named([[0], [0, 2]], 8, 16)
    with pytest.raises(ValueError, match="query block 0 names only later key blocks"):
        named([[1], [0]], 8, 16)
    q, k, v = make(queries=27)
    with pytest.raises(ValueError, match="names 2 query blocks, but 27 queries make 4"):
        block_sparse.attend(AttentionCall(q, k, v, named([[0], [0, 1]], 8, 27), 1.0))
    with pytest.raises(TypeError, match="needs a BlockSparseMask, got CausalMask"):
        block_sparse.attend(AttentionCall(q, k, v, CausalMask(27), 1.0))


shapes = st.fixed_dictionaries(
    {
        "batch": st.integers(1, 2),
        "kv_heads": st.integers(1, 3),
        "group": st.integers(1, 3),
        "queries": st.integers(1, 33),
        "before": st.integers(0, 9),
        "dim": st.sampled_from([1, 4, 8]),
        "seed": st.integers(0, 10**6),
    }
)


@settings(max_examples=60, deadline=None)
@given(
    shapes,
    st.sampled_from(["causal", "full", "window", "tensor", "additive", "deferred"]),
    st.integers(1, 40),
)
def test_any_shape_and_mask(shape: dict[str, int], kind: str, rows: int) -> None:
    queries, keys = shape["queries"], shape["queries"] + shape["before"]
    q, k, v = make(
        shape["batch"],
        shape["kv_heads"] * shape["group"],
        shape["kv_heads"],
        queries,
        keys,
        shape["dim"],
        seed=shape["seed"],
    )
    generator = torch.Generator().manual_seed(shape["seed"])
    offset = shape["before"]
    visible = causal(queries, keys, offset, 4 if kind == "window" else None)
    if kind == "full":
        visible = torch.ones_like(visible)
    if kind in ("tensor", "additive", "deferred"):
        visible = (
            torch.rand(shape["batch"], 1, queries, keys, generator=generator) > 0.5
        ) & visible
    lowest = torch.finfo(torch.float32).min
    mask = {
        "causal": lambda: CausalMask(keys, offset),
        "full": lambda: FullMask(keys),
        "window": lambda: TensorMask(visible, keys),
        "tensor": lambda: TensorMask(visible, keys),
        "additive": lambda: TensorMask(
            torch.zeros(visible.shape).masked_fill(~visible, lowest), keys
        ),
        "deferred": lambda: DeferredMask(
            lambda b, h, i, j: visible[b, h, i, j], tuple(visible.shape)
        ),
    }[kind]()
    call = AttentionCall(q, k, v, mask, 0.5, query_offset=offset)
    expected = dense(q, k, v, visible, scaling=0.5)
    seen = Reassemble()
    held, blockwise.block_size = (
        blockwise.block_size,
        lambda call, count=None: min(rows, count or call.queries),
    )
    try:
        output = attend(call, Pipeline((seen,)))
    finally:
        blockwise.block_size = held
    torch.testing.assert_close(output.double(), expected.output, atol=5e-5, rtol=1e-4)
    torch.testing.assert_close(seen.weights_, expected.weights, atol=5e-5, rtol=1e-4)
    torch.testing.assert_close(seen.entropy, expected.entropy, atol=3e-4, rtol=1e-4)
    alive = visible.any(-1).expand(output.shape[:3])
    plain = attend(call, Pipeline(())).double()
    torch.testing.assert_close(plain[alive], expected.output[alive], atol=5e-5, rtol=1e-4)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 60), st.integers(0, 10), st.integers(1, 20))
def test_entropy_is_between_zero_and_the_log_of_the_visible_keys(
    queries: int, offset: int, scale: int
) -> None:
    q, k, v = make(1, 2, 1, queries, queries + offset)
    seen = Reassemble()
    attend(
        AttentionCall(q * scale, k, v, CausalMask(queries + offset, offset), 1.0), Pipeline((seen,))
    )
    assert (seen.entropy >= 0).all()
    assert (seen.entropy <= seen.counts[:, None].log() + 1e-4).all()
    torch.testing.assert_close(
        seen.received.sum(-1), torch.full((1, 2), float(queries)).double(), atol=1e-3, rtol=0
    )


def test_a_deferred_mask_computes_as_the_tensor_it_stands_for() -> None:
    visible = torch.rand(2, 1, 6, 9) > 0.5
    lookup = lambda b, h, i, j: visible[b, h, i, j]  # noqa: E731
    boolean = DeferredMask(lookup, (2, 1, 6, 9))
    assert boolean.shape == (2, 1, 6, 9) and boolean.dtype == torch.bool and boolean.dim() == 4
    assert torch.equal(boolean & True, visible)
    assert torch.equal(boolean[:, 0], visible[:, 0])
    assert torch.equal(torch.where(boolean, 1.0, 0.0), visible.float())
    additive = DeferredMask(lookup, (2, 1, 6, 9), dtype=torch.float32)
    expected = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
    assert additive.dtype == torch.float32
    assert torch.equal(additive + 0, expected)
    assert torch.equal(torch.cat([additive, torch.ones(2, 1, 6, 1)], -1)[..., :9], expected)
    q, k, v = make(queries=6, keys=9)
    for mask in (boolean, additive):
        call = AttentionCall(q, k, v, mask, 0.5)
        expected_output = dense(q, k, v, visible, scaling=0.5).output
        alive = visible.any(-1).expand(2, 4, 6)
        for output in (fused.attend(call), attend(call, Pipeline((Reassemble(),)))):
            torch.testing.assert_close(
                output.double()[alive], expected_output[alive], atol=2e-5, rtol=1e-5
            )


def test_a_plain_causal_rule_is_answered_without_evaluating_it() -> None:
    def rule(*_: Tensor) -> Tensor:
        raise AssertionError("evaluated")

    mask = DeferredMask(rule, (1, 1, 6, 9), query_offset=3, causal=True)
    q, k, v = make(1, queries=6, keys=9)
    seen = Reassemble()
    attend(AttentionCall(q, k, v, mask, 0.5, query_offset=3), Pipeline((seen,)))
    expected = dense(q, k, v, causal(6, 9, 3), scaling=0.5)
    torch.testing.assert_close(seen.weights_, expected.weights, atol=2e-5, rtol=0)
