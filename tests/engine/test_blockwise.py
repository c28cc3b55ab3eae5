"""The blockwise backend, and everything a block offers, against full float64 maps."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.reference import Reassemble, causal, dense, make
from regard.engine import (
    AttentionCall,
    Block,
    DeferredMask,
    Method,
    Pipeline,
    TensorMask,
    attend,
    blockwise,
)


@pytest.fixture(autouse=True, params=[16, 7, 4096])
def block_rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Every test runs with several blocks, with a ragged last one, and with one block."""
    size = request.param
    monkeypatch.setattr(
        blockwise, "block_size", lambda call, rows=None: min(size, rows or call.queries)
    )
    return size


def run(call: AttentionCall, *methods: Method, **rest: Any) -> tuple[Tensor, Reassemble]:
    seen = Reassemble()
    return attend(call, Pipeline((seen, *methods)), **rest), seen


def check(
    call: AttentionCall, visible: Tensor, valid: Tensor | None = None, tolerance: float = 2e-5
) -> Reassemble:
    """Output, weights and every statistic of a call against the dense reference."""
    expected = dense(
        call.query,
        call.key,
        call.value,
        visible,
        scaling=call.scaling,
        softcap=call.softcap,
        sinks=call.sinks,
        bias=call.bias,
    )
    output, seen = run(call)
    alive = expected.visible.any(-1)
    assert output.dtype == call.query.dtype
    torch.testing.assert_close(output.double(), expected.output, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(seen.weights_, expected.weights, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(seen.entropy, expected.entropy, atol=5 * tolerance, rtol=tolerance)
    torch.testing.assert_close(
        seen.logsumexp[alive], expected.logsumexp[alive], atol=5 * tolerance, rtol=tolerance
    )
    slots = torch.arange(call.keys, dtype=torch.float64)
    torch.testing.assert_close(
        seen.mean_key, expected.weights @ slots, atol=call.keys * tolerance, rtol=tolerance
    )
    rows = torch.ones_like(seen.counts) if valid is None else valid.double()
    torch.testing.assert_close(
        seen.received,
        torch.einsum("bhqk,bq->bhk", expected.weights, rows),
        atol=call.queries * tolerance,
        rtol=tolerance,
    )
    counts = expected.visible.sum(-1).amax(1).double()
    assert torch.equal(seen.counts, counts)
    first = expected.visible.any(1).double().argmax(-1).double()
    assert torch.equal(seen.first[counts > 0], first[counts > 0])
    torch.testing.assert_close(
        seen.diagonals,
        diagonals(expected.weights, call.query_offset, seen.width),
        atol=tolerance,
        rtol=0,
    )
    assert seen.row_numbers == list(range(call.queries))
    return seen


def diagonals(weights: Tensor, offset: int, width: int) -> Tensor:
    out = torch.zeros(*weights.shape[:3], width, dtype=weights.dtype)
    for i in range(weights.shape[2]):
        for j in range(width):
            column = i + offset - j
            if 0 <= column < weights.shape[3]:
                out[..., i, j] = weights[..., i, column]
    return out


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 1), (12, 12)])
def test_causal_with_grouped_heads(heads: int, kv_heads: int) -> None:
    q, k, v = make(heads=heads, kv_heads=kv_heads, queries=37, value_dim=5)
    check(AttentionCall.make(q, k, v), causal(37, 37))


def test_full_attention_with_other_key_count() -> None:
    q, k, v = make(queries=11, keys=29)
    check(AttentionCall.make(q, k, v, causal=False), torch.ones(1, 1, 11, 29, dtype=torch.bool))


def test_a_decoded_token_sees_every_key() -> None:
    q, k, v = make(queries=1, keys=29)
    call = AttentionCall.make(q, k, v, query_offset=28)
    assert call.phase == "decode"
    check(call, torch.ones(1, 1, 1, 29, dtype=torch.bool))


@pytest.mark.parametrize("keys_before", [0, 5])
def test_a_boolean_mask_for_each_head(keys_before: int) -> None:
    q, k, v = make(queries=20, keys=20 + keys_before)
    visible = causal(20, 20 + keys_before, keys_before) & (
        torch.rand(2, 4, 20, 20 + keys_before) > 0.3
    )
    visible |= torch.eye(20, 20 + keys_before).bool().roll(keys_before, -1)
    check(AttentionCall.make(q, k, v, mask=visible, query_offset=keys_before), visible)


@pytest.mark.parametrize("lowest", [float("-inf"), torch.finfo(torch.float32).min])
def test_an_additive_mask_hides_and_biases(lowest: float) -> None:
    q, k, v = make(queries=20)
    visible = causal(20, 20, window=6).expand(2, 1, -1, -1)
    bias = torch.randn(2, 1, 20, 20)
    mask = torch.where(visible, bias, lowest)
    call = AttentionCall.make(q, k, v, mask=mask)
    expected = dense(q, k, v, visible, bias=bias)
    output, seen = run(call)
    torch.testing.assert_close(output.double(), expected.output, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(seen.weights_, expected.weights, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(seen.entropy, expected.entropy, atol=1e-4, rtol=1e-5)
    assert torch.equal(seen.counts, visible.sum(-1)[:, 0].double())


def deferred(visible: Tensor, **rest: Any) -> DeferredMask:
    """A rule that looks the answer up in `[batch, 1, queries, keys]`."""

    def rule(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return visible[batch, head, query, key]

    return DeferredMask(rule, tuple(visible.shape), **rest)  # type: ignore[arg-type]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(side: str) -> None:
    q, k, v = make(batch=3, queries=24)
    lengths = torch.tensor([24, 17, 3])
    slots = torch.arange(24)
    valid = (
        slots[None] < lengths[:, None] if side == "right" else slots[None] >= 24 - lengths[:, None]
    )
    visible = causal(24, 24) & valid[:, None, None, :]
    call = AttentionCall.make(q, k, v, mask=deferred(visible, key_valid=valid), valid=valid)
    seen = check(call, visible, valid)
    dead = ~visible.any(-1).expand(3, 4, 24)
    assert dead.any() == (side == "left")
    assert seen.weights_[dead].abs().sum() == 0
    assert not output_is_nan(call)


def output_is_nan(call: AttentionCall) -> bool:
    return bool(run(call)[0].isnan().any())


def test_a_block_in_which_nothing_is_visible() -> None:
    q, k, v = make(queries=20)
    visible = causal(20, 20).clone()
    visible[..., :16, :] = False
    check(AttentionCall.make(q, k, v, mask=visible), visible)


def test_packed_sequences_start_again() -> None:
    q, k, v = make(queries=30)
    document = torch.arange(30) // 11
    visible = causal(30, 30) & (document[:, None] == document[None, :])
    check(AttentionCall.make(q, k, v, mask=visible), visible)


def test_a_sliding_window_narrows_the_key_range() -> None:
    q, k, v = make(queries=64)
    visible = causal(64, 64, window=5)
    call = AttentionCall.make(q, k, v, mask=deferred(visible))
    check(call, visible)
    window = call.mask.window(torch.arange(32, 48))
    assert (window.lo, window.hi) == (28, 48)


@pytest.mark.parametrize(
    "extras",
    [
        {"softcap": 5.0},
        {"sinks": torch.tensor([0.3, -1.0, 2.0, 0.0])},
        {"sinks": torch.linspace(-1, 2, 2 * 4 * 21).view(2, 4, 21)},
        {"bias": torch.randn(1, 4, 21, 21, generator=torch.Generator().manual_seed(1))},
        {"bias": torch.randn(2, 1, 1, 21, generator=torch.Generator().manual_seed(2))},
        {"softcap": 3.0, "sinks": torch.tensor([0.3, -1.0, 2.0, 0.0]), "scaling": 0.7},
    ],
    ids=["softcap", "sinks", "sinks by query", "bias", "key bias", "together"],
)
def test_softcap_sinks_and_bias(extras: dict[str, Any]) -> None:
    q, k, v = make(queries=21)
    check(AttentionCall.make(q, k, v, **extras), causal(21, 21))


def test_sinks_with_left_padding() -> None:
    q, k, v = make(queries=12)
    valid = torch.ones(2, 12, dtype=torch.bool)
    valid[1, :5] = False
    visible = causal(12, 12) & valid[:, None, None]
    call = AttentionCall.make(
        q, k, v, mask=visible, sinks=torch.tensor([0.3, -1.0, 2.0, 0.0]), valid=valid
    )
    expected = dense(q, k, v, visible, sinks=call.sinks)
    output, seen = run(call)
    torch.testing.assert_close(seen.weights_, expected.weights, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(output.double(), expected.output, atol=2e-5, rtol=1e-5)
    rows = valid[:, None].expand(-1, 4, -1)
    torch.testing.assert_close(seen.entropy[rows], expected.entropy[rows], atol=1e-4, rtol=1e-5)


def test_float64_is_exact_to_rounding() -> None:
    q, k, v = make(queries=33, dtype=torch.float64)
    check(AttentionCall.make(q, k, v), causal(33, 33), tolerance=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_input_is_computed_in_32(dtype: torch.dtype) -> None:
    q, k, v = make(queries=33, dtype=dtype)
    call = AttentionCall.make(q, k, v)
    output, seen = run(call)
    expected = dense(q, k, v, causal(33, 33))
    assert output.dtype == dtype
    torch.testing.assert_close(output.double(), expected.output, atol=2e-2, rtol=1e-2)
    torch.testing.assert_close(seen.weights_, expected.weights, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(seen.entropy, expected.entropy, atol=2e-5, rtol=1e-5)


def test_views_that_are_not_contiguous() -> None:
    q, k, v = make(queries=19)
    q, k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v))
    assert not q.is_contiguous()
    check(AttentionCall.make(q, k, v), causal(19, 19))


def test_sampled_rows_show_the_exact_rows_and_leave_the_output() -> None:
    q, k, v = make(queries=70)
    call = AttentionCall.make(q, k, v)
    expected = dense(q, k, v, causal(70, 70))
    generator = torch.Generator().manual_seed(3)
    output, seen = run(call, fraction=1 / 8, generator=generator)
    rows = seen.row_numbers
    assert len(rows) == math.ceil(70 / 8) and rows == sorted(set(rows))
    assert all(8 * i <= row < 8 * (i + 1) for i, row in enumerate(rows))
    assert seen.shares == {70 / 9}
    torch.testing.assert_close(output.double(), expected.output, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(
        seen.weights_[:, :, rows], expected.weights[:, :, rows], atol=2e-5, rtol=1e-5
    )
    torch.testing.assert_close(
        seen.entropy[:, :, rows], expected.entropy[:, :, rows], atol=1e-4, rtol=1e-5
    )
    torch.testing.assert_close(
        seen.diagonals[:, :, rows], diagonals(expected.weights, 0, 4)[:, :, rows], atol=2e-5, rtol=0
    )
    torch.testing.assert_close(
        seen.received, expected.weights[:, :, rows].sum(-2), atol=2e-4, rtol=1e-5
    )


class Diagonals(Method):
    reads_only = True

    def weights(self, block: Block) -> None:
        wide = block.diagonals(9).clone()
        assert torch.equal(block.diagonals(3), wide[..., :3])
        block._diagonals = None  # type: ignore[assignment]
        block.padded = None
        assert torch.equal(block.diagonals(9), wide)


@pytest.mark.parametrize("window", [None, 4])
def test_strided_diagonals_equal_gathered_ones(window: int | None) -> None:
    q, k, v = make(queries=50)
    attend(
        AttentionCall.make(q, k, v, mask=causal(50, 50, window=window)), Pipeline((Diagonals(),))
    )
    attend(AttentionCall.make(q, k, v), Pipeline((Diagonals(),)))


def test_a_mask_window_never_leaves_out_a_visible_key() -> None:
    visible = torch.rand(2, 3, 25, 25) > 0.9
    mask = TensorMask(visible, 25)
    for rows in (torch.arange(0, 7), torch.arange(7, 25), torch.tensor([3, 9, 24])):
        window = mask.window(rows)
        seen = torch.zeros(2, 3, len(rows), 25, dtype=torch.bool)
        inside = window.visible(len(rows), rows.device)
        seen[..., window.lo : window.hi] = True if inside is None else inside
        assert torch.equal(seen, visible[:, :, rows])


class ReadScores(Method):
    """The scores of every block, read before or after its entropy."""

    reads_only = True

    def __init__(self, *, entropy_first: bool) -> None:
        self.entropy_first = entropy_first
        self.seen: list[torch.Tensor] = []

    def weights(self, block: Block) -> None:
        if self.entropy_first:
            assert (block.entropy >= 0).all()
        self.seen.append(block.scores.clone())


def test_scores_can_be_read_after_the_entropy_took_their_place():
    query, key = torch.randn(2, 4, 70, 8), torch.randn(2, 2, 70, 8)
    before, after = ReadScores(entropy_first=False), ReadScores(entropy_first=True)
    for method in (before, after):
        attend(AttentionCall.make(query, key, key, softcap=3.0), Pipeline([method]))
    for left, right in zip(before.seen, after.seen, strict=True):
        torch.testing.assert_close(left, right, atol=1e-6, rtol=0)


class ReadParts(Method):
    reads_only = True

    def __init__(self, runs: int) -> None:
        self.runs = runs

    def weights(self, block: Block) -> None:
        rows = len(block.rows)
        counts = [rows // self.runs] * self.runs
        counts[-1] += rows - sum(counts)
        parts = block.received_by_part(counts)
        held = block.weights * (block.valid[:, None, :, None] if block.valid is not None else 1)
        at = 0
        for part, count in zip(parts, counts, strict=True):
            expected = held[:, :, at : at + count].sum(2)
            torch.testing.assert_close(part, expected, atol=1e-5, rtol=0)
            at += count
        torch.testing.assert_close(block.received(), held.sum(2), atol=1e-5, rtol=0)


@pytest.mark.parametrize("runs", [1, 3, 16])
@pytest.mark.parametrize("padded", [False, True])
def test_what_parts_of_a_block_receive_adds_up(runs, padded):
    query, key = torch.randn(2, 4, 48, 8), torch.randn(2, 2, 48, 8)
    valid = torch.ones(2, 48, dtype=torch.bool)
    valid[1, 40:] = False
    call = AttentionCall.make(query, key, key, valid=valid if padded else None)
    attend(call, Pipeline([ReadParts(runs)]))


def test_a_workspace_filled_in_inference_mode_serves_outside_of_it():
    workspace = blockwise.Workspace()
    query, key = torch.randn(1, 2, 40, 8), torch.randn(1, 2, 40, 8)
    outputs = []
    for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode):
        with mode():
            method = ReadScores(entropy_first=True)
            call = AttentionCall.make(query, key, key)
            outputs.append(attend(call, Pipeline([method]), workspace=workspace))
    for output in outputs[1:]:
        assert torch.equal(output, outputs[0])
