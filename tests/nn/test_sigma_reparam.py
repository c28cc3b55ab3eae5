"""sigmaReparam layers against singular value decompositions and an analytic gradient."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from torch import nn

from regard._errors import InputError
from regard.nn import SigmaReparamConv2d, SigmaReparamLinear

F64 = torch.float64


def linear(inputs: int = 7, outputs: int = 5, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(inputs, outputs, bias=bias, dtype=F64)


def top(matrix: torch.Tensor) -> torch.Tensor:
    return torch.linalg.svdvals(matrix.detach().flatten(1))[0]


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.floats(-3, 3))
def test_the_norm_of_the_weight_is_gamma(inputs, outputs, gamma):
    layer = SigmaReparamLinear.of(linear(inputs, outputs), "one")
    with torch.no_grad():
        layer.gamma.fill_(gamma)
    torch.testing.assert_close(top(layer.weight), torch.tensor(abs(gamma), dtype=F64))


def test_power_iteration_follows_a_weight_that_changes():
    layer = SigmaReparamLinear(20, 30, std=0.1).double()
    with torch.no_grad():
        layer.raw.copy_(torch.randn(30, 20, dtype=F64, generator=torch.Generator().manual_seed(1)))
    for _ in range(200):
        layer(torch.zeros(1, 20, dtype=F64))
    torch.testing.assert_close(top(layer.weight), torch.ones((), dtype=F64), atol=1e-6, rtol=0)
    right = torch.linalg.svd(layer.raw.detach()).Vh[0]
    assert float((layer.right @ right).abs()) == pytest.approx(1, abs=1e-6)


def test_converted_it_computes_the_same():
    plain, inputs = linear(), torch.randn(4, 7, dtype=F64)
    expected = plain(inputs)
    layer = SigmaReparamLinear.of(plain)
    torch.testing.assert_close(layer(inputs), expected, atol=1e-12, rtol=1e-12)
    assert layer.raw is plain.weight and layer.bias is plain.bias
    assert (layer.in_features, layer.out_features) == (7, 5)


def test_gradient_projects_out_the_scale():
    """d W_hat = gamma / sigma (dW - W (v^T dW u) / sigma): changes of the leading direction alone do nothing."""
    layer = SigmaReparamLinear.of(linear(bias=False), "one")
    with torch.no_grad():
        layer.gamma.fill_(1.7)
    u, s, vh = torch.linalg.svd(layer.raw.detach())
    left, right, sigma = u[:, 0], vh[0], s[0]
    upstream = torch.randn(5, 7, dtype=F64)
    layer.weight.mul(upstream).sum().backward()
    inner = (upstream * layer.raw.detach()).sum()
    expected = 1.7 / sigma * (upstream - inner / sigma * torch.outer(left, right))
    torch.testing.assert_close(layer.raw.grad, expected)
    torch.testing.assert_close(layer.gamma.grad, inner / sigma)
    assert (
        abs(float((layer.raw.grad * layer.raw).sum().detach())) < 1e-10
    )  # scaling W changes nothing


def test_evaluation_writes_nothing():
    layer = SigmaReparamLinear(9, 6)
    with torch.no_grad():
        layer.raw.normal_()
    before = layer.right.clone()
    layer.eval()(torch.randn(2, 9))
    assert torch.equal(layer.right, before)
    layer.train()(torch.randn(2, 9))
    assert not torch.equal(layer.right, before)


def test_wide_layers_start_as_the_narrow_ones_do():
    norms = [float(top(SigmaReparamLinear(w, w, gamma="one").weight)) for w in (16, 256)]
    assert norms == pytest.approx([1.0, 1.0], abs=1e-4)


@pytest.mark.parametrize(
    ("groups", "padding"), [(1, 0), (2, 1)], ids=["patches", "grouped and padded"]
)
def test_convolution(groups, padding):
    torch.manual_seed(0)
    plain = nn.Conv2d(4, 6, 3, stride=2, padding=padding, groups=groups, dtype=F64)
    images = torch.randn(2, 4, 9, 9, dtype=F64)
    layer = SigmaReparamConv2d(plain)
    torch.testing.assert_close(layer(images), plain(images), atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(layer.fuse()(images), layer(images))
    one = SigmaReparamConv2d(plain, "one")
    torch.testing.assert_close(top(one.weight), torch.ones((), dtype=F64))
    torch.testing.assert_close(
        one(images) - plain.bias.view(-1, 1, 1),
        (plain(images) - plain.bias.view(-1, 1, 1)) / top(plain.weight),
    )


def test_folded_back_it_computes_what_evaluation_computes():
    layer = SigmaReparamLinear(9, 6, std=0.5)
    for _ in range(3):
        layer(torch.randn(2, 9))
    inputs = torch.randn(4, 9)
    assert torch.equal(layer.fuse()(inputs), layer.eval()(inputs))


def test_half_precision():
    layer, inputs = SigmaReparamLinear.of(linear(64, 32), "one"), torch.randn(4, 64, dtype=F64)
    whole = layer(inputs)
    half = layer.bfloat16()(inputs.bfloat16())
    assert half.dtype == torch.bfloat16
    assert float((half.double() - whole).norm() / whole.norm()) < 0.02


def test_saves_and_loads():
    layer, other = SigmaReparamLinear(5, 4), SigmaReparamLinear(5, 4)
    layer(torch.randn(2, 5))
    assert set(layer.state_dict()) == {"raw", "gamma", "bias", "right"}
    other.load_state_dict(layer.state_dict())
    inputs = torch.randn(3, 5)
    assert torch.equal(other.eval()(inputs), layer.eval()(inputs))


def zero(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.zero_()


def test_errors():
    with pytest.raises((InputError, TypeCheckError), match="gamma"):
        SigmaReparamLinear(3, 3, gamma="two")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="all zeros"):
        SigmaReparamLinear.of(nn.Linear(3, 3).requires_grad_(False).apply(zero))
    with pytest.raises(InputError, match="padding_mode"):
        SigmaReparamConv2d(nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect"))
