"""AttNet: a convolutional image classifier whose blocks mix pixels by attentive convolution.

    X += drop_path(gamma1 * ATConv(LN X));      X += drop_path(gamma2 * GLU(LN X))
    GLU(X) = fc2( RMS( gelu(DWConv3x3 a) * v ) ),   (a, v) = fc1 X,   hidden floor(2 floor(C r) / 3)

Four stages, a stem of two strided 3x3 convolutions before and one between each two; at the end mean over the pixels, layer norm
and a linear head. Normalisations are over channels.

Source: "Attentive Convolution: Unifying the Expressivity of Self-Attention with Convolutional Efficiency", arXiv 2510.20092.
`mixer` may be any module made from the width, so that a comparison changes nothing else.

Cost: linear in the pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from regard._errors import InputError
from regard.nn.atconv import ATConv2d


@dataclass(frozen=True)
class AttNetSize:
    """One model of the family.

    Attributes:
        depths: blocks of each stage.
        dims: channels of each stage.
        ratios: expansion of the feed-forward layers of each stage.
        drop_path: largest chance to leave a block out; it grows linearly from 0 with depth.
        scaled: whether blocks scale what they add, from 1e-6 on.
        normalised: whether feed-forward layers normalise before their last map.
    """

    depths: tuple[int, ...]
    dims: tuple[int, ...]
    ratios: tuple[int, ...] = (8, 8, 4, 4)
    drop_path: float = 0.0
    scaled: bool = False
    normalised: bool = True


ATTNETS = {
    "XXS": AttNetSize((2, 2, 4, 2), (32, 64, 128, 240), drop_path=0.02, normalised=False),
    "XS": AttNetSize(
        (2, 2, 7, 2), (40, 80, 160, 320), drop_path=0.02, scaled=True, normalised=False
    ),
    "S": AttNetSize((2, 3, 10, 3), (40, 80, 160, 320), drop_path=0.1, normalised=False),
    "T1": AttNetSize((2, 3, 12, 3), (48, 96, 224, 384), drop_path=0.1, scaled=True),
    "T2": AttNetSize((3, 3, 16, 3), (64, 128, 288, 512), drop_path=0.2, scaled=True),
    "T3": AttNetSize((4, 4, 26, 4), (72, 144, 320, 576), drop_path=0.4, scaled=True),
    "T4": AttNetSize((5, 5, 28, 5), (96, 192, 384, 768), drop_path=0.5, scaled=True),
}
"""The published sizes."""


class AttNet(nn.Module):
    """An image classifier of attentive convolutions: `AttNet("T2")`, or a size of one's own.

    Args:
        size: a name of `ATTNETS`, or an `AttNetSize`.
        classes: of the head.
        channels: of the images.
        strides: of the two convolutions of the stem.
        mixer: makes the mixer of a block from its width.

    Raises:
        InputError: an unknown name, or a size whose stages do not agree.

    >>> nano = AttNetSize(depths=(1, 1), dims=(8, 16), ratios=(4, 4))
    >>> AttNet(nano, classes=10, channels=1, strides=(1, 2))(torch.randn(2, 1, 16, 16)).shape
    torch.Size([2, 10])
    """

    def __init__(
        self,
        size: str | AttNetSize = "T2",
        *,
        classes: int = 1000,
        channels: int = 3,
        strides: tuple[int, int] = (2, 2),
        mixer: Callable[[int], nn.Module] = ATConv2d,
    ) -> None:
        super().__init__()
        if isinstance(size, str):
            if size not in ATTNETS:
                known = f"one of {', '.join(ATTNETS)}, or an AttNetSize"
                raise InputError.of("size", given=size, expected=known)
            size = ATTNETS[size]
        if not len(size.depths) == len(size.dims) == len(size.ratios):
            raise InputError.of("size", given=size, expected="as many depths as dims and ratios")
        dims = size.dims
        self.stem = nn.Sequential(
            *_halving(channels, dims[0] // 2, strides[0]),
            nn.GELU(),
            *_halving(dims[0] // 2, dims[0], strides[1]),
        )
        drops = iter(_rising(size.drop_path, sum(size.depths)))
        self.stages = nn.ModuleList()
        for index, (depth, width, ratio) in enumerate(
            zip(size.depths, dims, size.ratios, strict=True)
        ):
            between = _halving(dims[index - 1], width, 2) if index else []
            blocks = [
                AttNetBlock(
                    width,
                    ratio,
                    mixer,
                    drop=next(drops),
                    scaled=size.scaled,
                    normalised=size.normalised,
                )
                for _ in range(depth)
            ]
            self.stages.append(nn.Sequential(*between, *blocks))
        self.norm = nn.LayerNorm(dims[-1], eps=1e-5)
        self.head = nn.Linear(dims[-1], classes)
        self.apply(initialise_attnet)

    def forward(
        self, images: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch classes"]:
        features = self.stem(images)
        for stage in self.stages:
            features = stage(features)
        return self.head(self.norm(features.mean((-2, -1))))


class GatedFeedForward(nn.Module):
    """`fc2(norm(gelu(depthwise(a)) * v))` with `a, v = fc1(x)`: channels mix, and 3x3 neighbours on one side of the gate.

    Args:
        width: channels.
        ratio: expansion; the hidden width is floor(2 floor(width ratio) / 3).
        normalised: RMS norm over the hidden channels.
    """

    def __init__(self, width: int, ratio: float | int, *, normalised: bool = True) -> None:
        super().__init__()
        hidden = 2 * int(width * ratio) // 3
        self.fc1 = nn.Conv2d(width, 2 * hidden, 1)
        self.depthwise = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.norm = _OverChannels(nn.RMSNorm(hidden, eps=1e-6)) if normalised else nn.Identity()
        self.fc2 = nn.Conv2d(hidden, width, 1)

    def forward(
        self, features: Float[Tensor, "batch width rows columns"]
    ) -> Float[Tensor, "batch width rows columns"]:
        gate, value = self.fc1(features).chunk(2, dim=1)
        return self.fc2(self.norm(functional.gelu(self.depthwise(gate)) * value))


class AttNetBlock(nn.Module):
    """Mixer and gated feed-forward layer, each after a norm and beside a residual connection.

    Args:
        width: channels.
        ratio: expansion of the feed-forward layer.
        mixer: makes the mixer from the width.
        drop: chance to leave either out, by image, in training.
        scaled: whether what they add is scaled, from 1e-6 on.
        normalised: whether the feed-forward layer normalises before its last map.
    """

    def __init__(
        self,
        width: int,
        ratio: int,
        mixer: Callable[[int], nn.Module] = ATConv2d,
        *,
        drop: float | int = 0.0,
        scaled: bool = False,
        normalised: bool = True,
    ) -> None:
        super().__init__()
        self.norm1 = _OverChannels(nn.LayerNorm(width, eps=1e-6))
        self.norm2 = _OverChannels(nn.LayerNorm(width, eps=1e-6))
        self.mixer = mixer(width)
        self.feed_forward = GatedFeedForward(width, ratio, normalised=normalised)
        self.drop = drop
        for name in ("gamma1", "gamma2"):
            scale = nn.Parameter(torch.full((width,), 1e-6)) if scaled else None
            self.register_parameter(name, scale)

    def forward(self, features: Tensor) -> Tensor:
        features = features + self._kept(self.mixer(self.norm1(features)), self.gamma1)
        return features + self._kept(self.feed_forward(self.norm2(features)), self.gamma2)

    def _kept(self, added: Tensor, gamma: Any) -> Tensor:
        """What a block adds: scaled, and in training left out of some images."""
        if gamma is not None:
            added = added * gamma[:, None, None]
        if not self.training or self.drop == 0:
            return added
        kept = torch.rand(len(added), 1, 1, 1, device=added.device) >= self.drop
        return added * kept.to(added.dtype) / (1 - self.drop)


class _OverChannels(nn.Module):
    """A norm of the last dimension, applied to the channels of images."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, features: Tensor) -> Tensor:
        return self.norm(features.movedim(1, -1)).movedim(-1, 1)


def _rising(last: float, count: int) -> list[float]:
    """From 0 to `last` in even steps."""
    return [last * index / max(1, count - 1) for index in range(count)]


def _halving(channels: int, width: int, stride: int) -> list[nn.Module]:
    convolution = nn.Conv2d(channels, width, 3, stride=stride, padding=1, bias=False)
    return [convolution, nn.BatchNorm2d(width)]


def initialise_attnet(module: nn.Module) -> None:
    """Truncated normal weights of spread 0.02 and zero biases: `model.apply(initialise_attnet)`."""
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
