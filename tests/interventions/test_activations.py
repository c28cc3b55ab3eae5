from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

import regard
from regard._errors import InputError
from regard.engine import Method, State
from regard.interventions import CapActivations, CapRatio


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids).logits


class Stream(Method):
    """The stream after each block."""

    def __init__(self) -> None:
        self.seen: dict[int, Tensor] = {}

    def residual(self, state: State) -> None:
        if state.part == "block":
            self.seen[state.layer] = state.hidden.clone()


def test_zeroed_neurons_equal_zero_columns_in_the_down_projection(model, ids):
    edited = copy.deepcopy(model)
    edited.model.layers[1].mlp.down_proj.weight.data[:, [3, 17]] = 0
    edited.model.layers[0].self_attn.o_proj.weight.data[:, :8] = 0
    with regard.ablate(model, heads=["L0H0", "mlp.1.n3"], neurons="mlp.1.n17"):
        ablated = logits(model, ids)
    torch.testing.assert_close(ablated, logits(edited, ids), atol=1e-10, rtol=1e-10)


def test_neurons_in_the_decode_phase(model, ids):
    with regard.ablate(model, neurons="mlp.*.n*", phase="decode"):
        assert torch.equal(logits(model, ids), logits(model, ids))
        assert (logits(model, ids[:, :1]) != 0).any()
        one = logits(model, ids[:, :1])
    assert torch.equal(logits(model, ids), logits(model, ids))
    assert (one - logits(model, ids[:, :1])).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("given", "message"), [("mlp.0.n64", "layer 0 has neurons 0..63"), ("L0H1", "names no neuron")]
)
def test_neurons_outside_the_model(model, given, message):
    with pytest.raises(InputError, match=message):
        regard.ablate(model, neurons=given)


def test_capping_clamps_the_chosen_layers_and_dimensions(model, ids):
    plain, capped, limit = Stream(), Stream(), 0.25
    with regard.attach(model, plain):
        before = logits(model, ids)
    cap = CapActivations(limit, layers=[1], dims=[3, 40])
    with regard.attach(model, cap, capped):
        logits(model, ids)
    expected = plain.seen[1].clone()
    expected[..., [3, 40]] = expected[..., [3, 40]].clamp(-limit, limit)
    assert torch.equal(capped.seen[0], plain.seen[0])
    assert torch.equal(capped.seen[1], expected)
    assert not torch.equal(capped.seen[2], plain.seen[2])
    with regard.attach(model, CapActivations(math.inf)):
        assert torch.equal(logits(model, ids), before)
    assert torch.equal(logits(model, ids), before)


def test_the_ratio_is_to_the_median_of_each_state(model, ids):
    plain, capped = Stream(), Stream()
    with regard.attach(model, plain):
        logits(model, ids)
    with regard.attach(model, CapRatio(2.0, layers=[0]), capped):
        logits(model, ids)
    limit = 2 * plain.seen[0].abs().median(-1, keepdim=True).values
    assert torch.equal(capped.seen[0], torch.minimum(torch.maximum(plain.seen[0], -limit), limit))
    assert (capped.seen[0] != plain.seen[0]).any()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CapActivations(-1), "limit must be a magnitude"),
        (lambda: CapRatio(0), "ratio must be"),
        (lambda: CapActivations(1, layers=[3]), "blocks 0..2"),
        (lambda: CapActivations(1, dims=[48]), "dimensions 0..47"),
        (lambda: CapActivations(1, stack="encoder"), "stack must be one of"),
    ],
)
def test_caps_outside_the_model(model, ids, make, message):
    with pytest.raises(InputError, match=message), regard.attach(model, make()):
        logits(model, ids)
