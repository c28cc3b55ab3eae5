"""Attentive convolution against its steps written out, and the token form against the image form."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from regard._errors import InputError
from regard.nn import ATConv2d, ATConvTokenMixer, routing_kernels


def written_out(layer: ATConv2d, image: torch.Tensor) -> torch.Tensor:
    """One image at a time, one channel at a time, with linear maps as matrices."""

    def project(conv: torch.nn.Conv2d, pixels: torch.Tensor) -> torch.Tensor:
        return pixels @ conv.weight[:, :, 0, 0].T + conv.bias

    outputs = []
    for one in image:
        width, height, columns = one.shape
        pixels = one.flatten(1).T
        features, values = project(layer.kernel_proj, pixels), project(layer.x_proj, pixels)
        count, mixed = height * columns, torch.zeros_like(values)
        for channel in range(width):
            runs = torch.stack(
                [
                    features[i * count // 9 : -(-(i + 1) * count // 9), channel].mean()
                    for i in range(9)
                ]
            )
            kernel = layer.generate.weight @ functional.gelu(runs) + layer.generate.bias
            kernel = kernel - layer.theta[channel].sigmoid() * kernel.mean()
            padded = functional.pad(values[:, channel].view(1, 1, height, columns), (1, 1, 1, 1))
            taps = functional.unfold(padded, 3)[0]
            mixed[:, channel] = kernel @ taps
        outputs.append(project(layer.o_proj, mixed).T.view(width, height, columns))
    return torch.stack(outputs)


def test_it_is_its_steps():
    torch.manual_seed(0)
    layer = ATConv2d(4).double()
    layer.theta.data.normal_()
    image = torch.randn(3, 4, 5, 7, dtype=torch.float64)
    torch.testing.assert_close(layer(image), written_out(layer, image), rtol=0, atol=1e-10)


def test_half_of_the_mean_goes_at_first_and_all_of_it_at_the_limit():
    torch.manual_seed(0)
    layer, image = ATConv2d(4), torch.randn(2, 4, 6, 6)
    routed = layer.routed(image)
    torch.testing.assert_close(layer.kernels(image).mean((-2, -1)), routed.mean((-2, -1)) / 2)
    layer.theta.data.fill_(-100.0)
    torch.testing.assert_close(layer.kernels(image), routed)
    layer.theta.data.fill_(100.0)
    assert layer.kernels(image).mean((-2, -1)).abs().max() < 1e-6


def test_kernels_depend_on_the_image_and_slide_over_all_of_it():
    torch.manual_seed(0)
    layer, image = ATConv2d(4), torch.randn(2, 4, 8, 8)
    kernels = layer.kernels(image)
    assert (kernels[0] - kernels[1]).abs().max() > 1e-4
    torch.testing.assert_close(layer(image)[:1], layer(image[:1]))


@pytest.mark.parametrize("options", [{"act": "silu"}, {"act": "tanh"}, {"pool": "grid"}])
def test_options_change_what_is_computed(options):
    torch.manual_seed(0)
    plain, other, image = ATConv2d(4), ATConv2d(4, **options), torch.randn(2, 4, 6, 6)
    other.load_state_dict(plain.state_dict())
    assert (plain(image) - other(image)).abs().max() > 1e-7


def test_parameters_are_those_of_the_formula_and_all_get_gradients():
    layer = ATConv2d(6)
    assert sum(p.numel() for p in layer.parameters()) == 3 * 36 + 4 * 6 + 81 + 9
    layer(torch.randn(2, 6, 5, 5)).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_tokens_are_the_image_row_by_row():
    torch.manual_seed(0)
    mixer, image = ATConvTokenMixer(4), torch.randn(2, 4, 3, 5)
    tokens = image.flatten(2).transpose(1, 2)
    expected = mixer.mixer(image).flatten(2).transpose(1, 2)
    torch.testing.assert_close(mixer(tokens, grid=(3, 5)), expected)
    with pytest.raises(InputError, match="square number, got 15"):
        mixer(tokens)


def test_another_resolution_and_half_precision_work():
    layer = ATConv2d(4)
    assert layer(torch.randn(1, 4, 1, 2)).shape == (1, 4, 1, 2)
    image = torch.randn(1, 4, 9, 6)
    near = layer.bfloat16()(image.bfloat16())
    assert near.dtype == torch.bfloat16
    torch.testing.assert_close(near.float(), layer.float()(image), rtol=0, atol=0.03)


def test_kernels_of_a_model_are_read_and_nothing_stays():
    torch.manual_seed(0)
    model = torch.nn.Sequential(ATConv2d(4), torch.nn.GELU(), ATConv2d(4))
    image = torch.randn(2, 4, 6, 6)
    found = routing_kernels(model, image)
    assert list(found) == ["0", "2"]
    inner = functional.gelu(model[0](image))
    torch.testing.assert_close(found["2"], model[2].kernels(inner).detach())
    assert not model[0]._forward_pre_hooks
    with pytest.raises(InputError, match="no ATConv2d"):
        routing_kernels(torch.nn.Linear(2, 2), torch.randn(1, 2))


@pytest.mark.parametrize("wrong", [{"kernel": 2}, {"pool": "cells"}, {"act": "relu"}])
def test_wrong_options_are_refused(wrong):
    with pytest.raises((InputError, Exception), match=next(iter(wrong))):
        ATConv2d(4, **wrong)
