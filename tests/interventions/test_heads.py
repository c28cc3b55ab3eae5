from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import regard
from regard._errors import InputError
from regard.engine import AttentionCall, Pipeline, attend
from regard.interventions import MeanHeads, ParkOnSink, UniformHeads, ZeroHeads


def logits(model: nn.Module, ids: Tensor, **inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids, **inputs).logits


def with_zero_columns(model: nn.Module, heads: list[tuple[int, int]], dim: int = 8) -> nn.Module:
    """A copy whose output projections have zeros in the heads' columns: the reference for zeroing."""
    edited = copy.deepcopy(model)
    for layer, head in heads:
        weight = edited.model.layers[layer].self_attn.o_proj.weight
        weight.data[:, head * dim : (head + 1) * dim] = 0
    return edited


def dense(q: Tensor, k: Tensor, v: Tensor, change, mask: Tensor | None = None) -> Tensor:
    """Softmax attention with the full map; `change(scores, weights, visible)` edits one head's weights."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    n = q.shape[2]
    visible = torch.ones(n, n, dtype=torch.bool).tril() if mask is None else mask
    visible = visible.expand(q.shape[0], q.shape[1], n, n)
    scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~visible, -torch.inf)
    return change(scores.softmax(-1), visible) @ v


@pytest.mark.parametrize("heads", [[(1, 2)], [(0, 0), (2, 3)], [(0, 0), (0, 5), (2, 3)]])
def test_zeroing_equals_zero_columns_in_the_output_projection(model, ids, heads):
    with regard.ablate(model, heads=heads):
        ablated = logits(model, ids)
    expected = logits(with_zero_columns(model, heads), ids)
    torch.testing.assert_close(ablated, expected, atol=1e-10, rtol=1e-10)
    assert (ablated - logits(model, ids)).abs().max() > 1e-3


@pytest.mark.parametrize("side", ["left", "right"])
def test_zeroing_with_padding(model, ids, side):
    mask = torch.ones_like(ids)
    mask[1, slice(0, 7) if side == "left" else slice(13, None)] = 0
    with regard.ablate(model, "L1H4"):
        ablated = logits(model, ids, attention_mask=mask)
    expected = logits(with_zero_columns(model, [(1, 4)]), ids, attention_mask=mask)
    keep = mask.bool()
    torch.testing.assert_close(ablated[keep], expected[keep], atol=1e-10, rtol=1e-10)


def test_zeroing_while_generating(model, ids):
    settings = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    with regard.ablate(model, "L0H1 L1H4 L2H0"):
        ablated = model.generate(ids, **settings)
    expected = with_zero_columns(model, [(0, 1), (1, 4), (2, 0)]).generate(ids, **settings)
    assert torch.equal(ablated, expected)
    assert not torch.equal(ablated, model.generate(ids, **settings))


def test_each_gives_every_share_of_the_batch_its_own_heads(model, ids):
    variants = [[], ["L1H2"], ["L0H5", "L2H1"]]
    with regard.attach(model, ZeroHeads.each(variants)):
        together = logits(model, ids.repeat(3, 1))
    expected = [
        logits(model, ids),
        logits(with_zero_columns(model, [(1, 2)]), ids),
        logits(with_zero_columns(model, [(0, 5), (2, 1)]), ids),
    ]
    torch.testing.assert_close(together, torch.cat(expected), atol=1e-10, rtol=1e-10)


def test_each_can_change_while_attached(model, ids):
    method = ZeroHeads.each([["L0H0"]])
    with regard.attach(model, method):
        logits(model, ids)
        method.choose([["L2H2"]])
        later = logits(model, ids)
    torch.testing.assert_close(
        later, logits(with_zero_columns(model, [(2, 2)]), ids), atol=1e-10, rtol=0
    )


def test_a_batch_that_does_not_divide_by_the_variants_is_refused(model, ids):
    with (
        regard.attach(model, ZeroHeads.each([["L0H0"], [], ["L0H1"]])),
        pytest.raises(InputError, match="2 rows"),
    ):
        logits(model, ids)


def test_mean_replaces_by_the_mean_over_valid_tokens(model, ids):
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    caught: dict[str, Tensor] = {}
    handle = model.model.layers[1].self_attn.o_proj.register_forward_pre_hook(
        lambda module, args: caught.update(x=args[0])
    )
    logits(model, ids, attention_mask=mask)
    handle.remove()
    mean = caught["x"][mask.bool()].mean(0)[16:24]

    def put(module: nn.Module, args: tuple) -> Tensor:
        edited = args[0].clone()
        edited[..., 16:24] = mean
        return edited

    with regard.ablate(model, "L1H2", "mean", means={"input_ids": ids, "attention_mask": mask}):
        ablated = logits(model, ids)
    handle = model.model.layers[1].self_attn.o_proj.register_forward_pre_hook(put)
    expected = logits(model, ids)
    handle.remove()
    torch.testing.assert_close(ablated, expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("sliding", [False, True])
def test_uniform_and_park_against_the_dense_map(sliding):
    q = torch.randn(2, 4, 9, 8, dtype=torch.float64)
    k, v = torch.randn(2, 2, 2, 9, 8, dtype=torch.float64)
    mask = torch.ones(9, 9, dtype=torch.bool).tril()
    if sliding:
        mask &= torch.ones(9, 9, dtype=torch.bool).triu(-3)
    call = {"mask": mask[None, None] if sliding else None}

    def uniform(weights: Tensor, visible: Tensor) -> Tensor:
        weights = weights.clone()
        weights[:, 2] = visible[:, 2].double() / visible[:, 2].sum(-1, keepdim=True)
        return weights

    def park(weights: Tensor, visible: Tensor) -> Tensor:
        weights = weights.clone()
        first = visible[:, 2].to(torch.uint8).argmax(-1)
        weights[:, 2] = nn.functional.one_hot(first, 9).double()
        return weights

    for method, change in ((UniformHeads("L0H2"), uniform), (ParkOnSink("L0H2"), park)):
        found = attend(AttentionCall.make(q, k, v, **call), Pipeline([method]))
        torch.testing.assert_close(found, dense(q, k, v, change, mask), atol=1e-12, rtol=0)


def test_park_finds_the_first_real_token_under_left_padding(model, ids):
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    with regard.ablate(model, "L0 L1 L2", "sink"):
        padded = logits(model, ids, attention_mask=mask, position_ids=positions)[0, 6:]
        alone = logits(model, ids[:1, 6:])[0]
    torch.testing.assert_close(padded, alone, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("mode", ["zero", "mean", "uniform", "sink"])
def test_decode_phase_leaves_the_prompt_alone(model, ids, mode):
    with regard.ablate(model, "L*", mode, phase="decode", means=ids), torch.no_grad():
        prefill = model(ids, use_cache=True)
        step = model(ids[:, :1], past_key_values=prefill.past_key_values).logits
    with torch.no_grad():
        plain = model(ids, use_cache=True)
        untouched = model(ids[:, :1], past_key_values=plain.past_key_values).logits
    torch.testing.assert_close(prefill.logits, plain.logits, atol=1e-10, rtol=0)
    assert (step - untouched).abs().max() > 1e-3


def test_the_model_is_restored_after_an_exception(model, ids):
    before = logits(model, ids)
    with pytest.raises(KeyboardInterrupt), regard.ablate(model, "L0H0"):
        raise KeyboardInterrupt
    with (
        pytest.raises(InputError),
        regard.ablate(model, "L0H0", "mean", means={("", 2): torch.zeros(6, 8)}),
    ):
        logits(model, ids)
    assert torch.equal(logits(model, ids), before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_ablations_nest(model, ids):
    with regard.ablate(model, "L0H0"), regard.ablate(model, "L2H5"):
        both = logits(model, ids)
    torch.testing.assert_close(
        both, logits(with_zero_columns(model, [(0, 0), (2, 5)]), ids), atol=1e-10, rtol=0
    )


def test_gradients_pass_through(model, ids):
    with regard.attach(model, MeanHeads("L0H0", means={("", 0): torch.ones(6, 8)})):
        model(ids).logits.sum().backward()
    grad = model.model.layers[0].self_attn.q_proj.weight.grad
    assert grad[:8].abs().max() == 0 and grad[8:].abs().max() > 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("L9H0", r"L9H0 is outside the model: layers with heads are 0..2"),
        ("L1H6", r"L1H6 is outside the model: layer 1 has heads 0..5"),
        ("decoder.L0H0", "no stack 'decoder'"),
        ("five", "names no head"),
        ((), "nothing to ablate"),
    ],
)
def test_what_is_outside_the_model_is_refused_by_name(model, given, message):
    with pytest.raises(InputError, match=message):
        regard.ablate(model, given)


def test_unknown_mode_and_phase(model):
    with pytest.raises(InputError, match="did you mean uniform"):
        regard.ablate(model, "L0H0", "unifrom")
    with pytest.raises(InputError, match="'all' or 'decode'"):
        ZeroHeads("L0H0", phase="prefill")
    with pytest.raises(InputError, match="reference to average over"):
        regard.ablate(model, "L0H0", "mean")
    with pytest.raises(InputError, match="neurons can only be zeroed"):
        regard.ablate(model, ["L0H0", "mlp.0.n1"], "uniform")
