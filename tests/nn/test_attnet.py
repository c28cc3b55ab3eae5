"""AttNet: published sizes, and blocks as they are written."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from regard._errors import InputError
from regard.nn import ATTNETS, AttNet, AttNetSize
from regard.nn.attnet import GatedFeedForward

NANO = AttNetSize(depths=(1, 2), dims=(8, 12), ratios=(4, 4))
PUBLISHED = {"XXS": 2.86, "XS": 5.56, "S": 7.69, "T1": 13.71, "T2": 27.01, "T3": 49.2, "T4": 87.3}
"""Millions of parameters, to the digits that are printed."""


@pytest.mark.parametrize("name", ATTNETS)
def test_sizes_have_the_published_number_of_parameters(name):
    with torch.device("meta"):
        model = AttNet(name)
    count = sum(p.numel() for p in model.parameters()) / 1e6
    assert count == pytest.approx(
        PUBLISHED[name], abs=0.01 if name[0] != "T" or name < "T3" else 0.05
    )


def test_a_block_adds_the_mixer_and_then_the_feed_forward():
    torch.manual_seed(0)
    model = AttNet(NANO, classes=3, channels=1).eval()
    block, features = model.stages[0][0], torch.randn(2, 8, 5, 5)

    def over_channels(features: torch.Tensor) -> torch.Tensor:
        mean = features.mean(1, keepdim=True)
        spread = (features - mean).square().mean(1, keepdim=True)
        return (features - mean) / (spread + 1e-6).sqrt()

    middle = features + block.mixer(over_channels(features))
    expected = middle + block.feed_forward(over_channels(middle))
    torch.testing.assert_close(block(features), expected)


def test_the_gated_feed_forward_is_its_formula():
    torch.manual_seed(0)
    layer, features = GatedFeedForward(6, 4), torch.randn(2, 6, 5, 5)
    assert layer.fc1.out_channels == 32
    a, v = layer.fc1(features)[:, :16], layer.fc1(features)[:, 16:]
    hidden = functional.gelu(layer.depthwise(a)) * v
    hidden = hidden / (hidden.square().mean(1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(layer(features), layer.fc2(hidden))


def test_blocks_are_left_out_in_training_only_and_make_up_for_it():
    torch.manual_seed(0)
    model = AttNet(AttNetSize((1, 1), (8, 8), (4, 4), drop_path=0.5), classes=3, channels=1)
    block = model.stages[1][-1]
    assert block.drop == 0.5 and model.stages[0][0].drop == 0
    ones = torch.ones(4000, 8, 1, 1)
    kept = block._kept(ones, None)[:, 0, 0, 0]
    assert set(kept.tolist()) == {0.0, 2.0}
    assert float(kept.mean()) == pytest.approx(1, abs=0.1)
    assert torch.equal(block.eval()._kept(ones, None), ones)


def test_scales_start_tiny_and_everything_gets_a_gradient():
    torch.manual_seed(0)
    scaled = AttNetSize((1, 1), (8, 8), (4, 4), scaled=True)
    model = AttNet(scaled, classes=3, channels=1, strides=(1, 2))
    assert float(model.stages[0][0].gamma1.max().detach()) == pytest.approx(1e-6)
    assert model.stages[0][0].gamma1 is not model.stages[0][0].gamma2
    for parameter in (p for n, p in model.named_parameters() if "gamma" in n):
        parameter.data.fill_(1.0)
    images, labels = torch.randn(6, 1, 16, 16), torch.arange(6) % 3
    functional.cross_entropy(model(images), labels).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_any_mixer_and_any_size_of_image():
    model = AttNet(NANO, classes=3, channels=1, mixer=lambda width: torch.nn.Identity()).eval()
    assert model(torch.randn(1, 1, 20, 28)).shape == (1, 3)
    with pytest.raises(InputError, match="one of XXS, XS"):
        AttNet("XXSS")
    with pytest.raises(InputError, match="as many depths"):
        AttNet(AttNetSize((1, 1), (8,), (4, 4)))
