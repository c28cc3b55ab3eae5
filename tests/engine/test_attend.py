"""Hooks: their order, what they may replace, what is refused, and gradients through all of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from engine.reference import Reassemble, causal, dense, make
from regard.engine import (
    AttentionCall,
    Block,
    Method,
    Pipeline,
    attend,
    blockwise,
    overrides,
    sample_rows,
)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        blockwise, "block_size", lambda call, rows=None: min(8, rows or call.queries)
    )


class Recorder(Method):
    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def before(self, call: AttentionCall) -> None:
        self.log.append(f"{self.name}.before")

    def scores(self, block: Block) -> None:
        self.log.append(f"{self.name}.scores")

    def weights(self, block: Block) -> None:
        self.log.append(f"{self.name}.weights")

    def heads(self, call: AttentionCall, output: Tensor) -> None:
        self.log.append(f"{self.name}.heads")

    def after(self, call: AttentionCall) -> None:
        assert call.output is not None
        self.log.append(f"{self.name}.after")


def test_hooks_run_in_order_and_scores_come_before_weights_in_each_block() -> None:
    log: list[str] = []
    q, k, v = make(queries=16)
    attend(AttentionCall.make(q, k, v), Pipeline((Recorder("a", log), Recorder("b", log))))
    block = ["a.scores", "b.scores", "a.weights", "b.weights"]
    assert log == [
        "a.before",
        "b.before",
        *block,
        *block,
        "a.heads",
        "b.heads",
        "a.after",
        "b.after",
    ]


class Change(Method):
    """Applies the given functions."""

    def __init__(self, **hooks: Any) -> None:
        for name, function in hooks.items():
            setattr(self, name, function)


def test_a_hook_set_on_the_object_counts_as_overridden() -> None:
    method = Change(scores=lambda block: None)
    assert overrides(method, "scores") and not overrides(method, "weights")


def test_replaced_scores_are_what_the_softmax_sees() -> None:
    q, k, v = make(queries=20)
    seen = Reassemble()
    halved = Change(scores=lambda block: block.scores / 2)
    output = attend(AttentionCall.make(q, k, v), Pipeline((halved, seen)))
    expected = dense(q, k, v, causal(20, 20), scaling=q.shape[-1] ** -0.5 / 2)
    torch.testing.assert_close(output.double(), expected.output, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(seen.weights_, expected.weights, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(seen.entropy, expected.entropy, atol=1e-4, rtol=1e-5)


def test_minus_infinity_in_replaced_scores_gives_no_nan() -> None:
    q, k, v = make(queries=20)
    seen = Reassemble()

    def hide_first_key(block: Block) -> Tensor:
        scores = block.scores.clone()
        scores[..., block.rows > 0, 0] = float("-inf")
        return scores

    output = attend(AttentionCall.make(q, k, v), Pipeline((Change(scores=hide_first_key), seen)))
    visible = causal(20, 20).clone()
    visible[..., 1:, 0] = False
    expected = dense(q, k, v, visible)
    torch.testing.assert_close(output.double(), expected.output, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(seen.entropy, expected.entropy, atol=1e-4, rtol=1e-5)


def test_replaced_weights_are_what_the_values_are_mixed_with_and_what_later_methods_see() -> None:
    q, k, v = make(queries=20)
    seen = Reassemble()
    doubled = Change(weights=lambda block: block.weights * 2)
    output = attend(AttentionCall.make(q, k, v), Pipeline((doubled, seen)))
    expected = dense(q, k, v, causal(20, 20))
    torch.testing.assert_close(output.double(), 2 * expected.output, atol=4e-5, rtol=1e-5)
    torch.testing.assert_close(seen.weights_, 2 * expected.weights, atol=4e-5, rtol=1e-5)


def test_a_method_before_the_change_saw_the_weights_as_they_were() -> None:
    q, k, v = make(queries=20)
    seen = Reassemble()
    attend(AttentionCall.make(q, k, v), Pipeline((seen, Change(weights=lambda b: b.weights * 0))))
    torch.testing.assert_close(
        seen.weights_, dense(q, k, v, causal(20, 20)).weights, atol=2e-5, rtol=0
    )


def test_replaced_heads_and_before() -> None:
    q, k, v = make(queries=20)

    def negate(call: AttentionCall) -> AttentionCall:
        call.query = -call.query
        return call

    silence = Change(
        before=negate,
        heads=lambda call, output: output * torch.tensor([0.0, 1, 1, 1])[:, None, None],
    )
    output = attend(AttentionCall.make(q, k, v), Pipeline((silence,)))
    expected = dense(-q, k, v, causal(20, 20)).output
    expected[:, 0] = 0
    torch.testing.assert_close(output.double(), expected, atol=2e-5, rtol=1e-5)


def test_without_weights_the_fused_kernel_gives_the_output() -> None:
    q, k, v = make(queries=20)
    output = attend(
        AttentionCall.make(q, k, v), Pipeline((Change(heads=lambda call, output: None),))
    )
    fused = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert torch.equal(output, fused)


@pytest.mark.parametrize(
    "extras", [{"softcap": 5.0}, {"sinks": torch.zeros(4)}, {"bias": torch.randn(1, 4, 20, 20)}]
)
def test_without_weights_what_the_fused_kernel_cannot_do_is_still_done(
    extras: dict[str, Any],
) -> None:
    q, k, v = make(queries=20)
    output = attend(AttentionCall.make(q, k, v, **extras), Pipeline(()))
    expected = dense(q, k, v, causal(20, 20), **extras)
    torch.testing.assert_close(output.double(), expected.output, atol=2e-5, rtol=1e-5)


def test_sampled_rows_are_refused_for_methods_that_may_change_attention() -> None:
    q, k, v = make(queries=40)
    call = AttentionCall.make(q, k, v)
    with pytest.raises(
        ValueError, match=r"rows=0.125 .* Recorder may change attention; use rows=None"
    ):
        attend(call, Pipeline((Reassemble(), Recorder("a", []))), fraction=1 / 8)


def test_a_method_that_claims_to_read_but_replaces_is_refused_when_rows_are_sampled() -> None:
    q, k, v = make(queries=40)
    liar = Change(weights=lambda block: block.weights)
    liar.reads_only = True  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="says that it only reads"):
        attend(AttentionCall.make(q, k, v), Pipeline((liar,)), fraction=1 / 8)


@pytest.mark.parametrize("count", [1, 15, 16, 17, 100])
def test_sample_rows_draws_one_of_each_run(count: int) -> None:
    rows = sample_rows(count, 1 / 16, torch.Generator().manual_seed(0), torch.device("cpu"))
    assert (rows // 16).tolist() == list(range(-(-count // 16)))
    assert rows.max() < count


def test_shapes_that_do_not_fit_are_named() -> None:
    q, k, v = make(heads=4, kv_heads=2)
    with pytest.raises(ValueError, match="multiple of KV heads, got 3 and 2"):
        AttentionCall.make(q[:, :3], k, v)
    bare = object.__new__(AttentionCall)  # the annotations, checked in tests, would speak first
    bare.query, bare.key, bare.value = q, k[:, :, :5], v
    with pytest.raises(
        ValueError, match=r"do not fit: got query \(2, 4, 40, 8\), key \(2, 2, 5, 8\)"
    ):
        bare.__post_init__()
    with pytest.raises(ValueError, match="attention mask must be"):
        AttentionCall.make(q, k, v, mask=torch.ones(2, 40, 40))


@pytest.mark.parametrize("masked", [False, True])
def test_gradients_equal_those_of_the_fused_kernel(masked: bool) -> None:
    tensors = [t.requires_grad_() for t in make(queries=20, dtype=torch.float64)]
    visible = causal(20, 20, window=5 if masked else None)
    fused = scaled_dot_product_attention(*tensors, attn_mask=visible, enable_gqa=True)
    expected = torch.autograd.grad(fused.square().sum(), tensors)
    q, k, v = tensors
    seen = Reassemble()
    output = attend(AttentionCall.make(q, k, v, mask=visible), Pipeline((seen,)))
    found = torch.autograd.grad(output.square().sum(), tensors)
    for theirs, ours in zip(expected, found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=1e-10)
    assert not seen.entropy.requires_grad, "what a reading method keeps must not hold the graph"


def test_gradients_reach_biases_sinks_and_the_parameters_of_methods() -> None:
    q, k, v = make(queries=20, dtype=torch.float64)
    bias = torch.randn(1, 4, 20, 20, dtype=torch.float64, requires_grad=True)
    sinks = torch.randn(4, dtype=torch.float64, requires_grad=True)
    gate = torch.full((4, 1, 1), 0.5, dtype=torch.float64, requires_grad=True)
    shift = torch.full((4, 1, 1), 0.1, dtype=torch.float64, requires_grad=True)

    def loss(bias: Tensor, sinks: Tensor, gate: Tensor, shift: Tensor) -> Tensor:
        gated = Change(
            weights=lambda block: block.weights * gate, scores=lambda block: block.scores * shift
        )
        return (
            attend(AttentionCall.make(q, k, v, bias=bias, sinks=sinks), Pipeline((gated,)))
            .square()
            .sum()
        )

    assert torch.autograd.gradcheck(loss, (bias, sinks, gate, shift))


def test_dropout_leaves_what_is_read_alone() -> None:
    q, k, v = make(queries=20)
    seen = Reassemble()
    output = attend(AttentionCall.make(q, k, v, dropout=0.5), Pipeline((seen,)))
    expected = dense(q, k, v, causal(20, 20))
    torch.testing.assert_close(seen.weights_, expected.weights, atol=2e-5, rtol=0)
    assert (output.double() - expected.output).abs().max() > 0.1
