"""Measurements of the attentive-convolution experiment: exactness, cost, a far cue, digits, and how alike kernels are."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from regard.nn.atconv import ATConv2d
from regard.nn.attnet import AttNet, AttNetBlock, AttNetSize, initialise_attnet
from regard.ops.atconv import attentive_conv2d, kernel_redundancy, lateral_inhibition
from regard.papers._classifying import accuracy

NANO = AttNetSize(depths=(2, 2), dims=(32, 64), ratios=(4, 4))


class WithoutInhibition(ATConv2d):
    """Attentive convolution whose kernels keep their mean."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        del self.theta

    def kernels(self, features: Tensor) -> Tensor:
        return self.routed(features)


class StaticConv2d(nn.Module):
    """The same with one learnt kernel a channel for all images."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.x_proj, self.o_proj = nn.Conv2d(width, width, 1), nn.Conv2d(width, width, 1)
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width)

    def forward(self, features: Tensor) -> Tensor:
        return self.o_proj(self.depthwise(self.x_proj(features)))


class InhibitedStaticConv2d(StaticConv2d):
    """A static kernel less a learnt share of its mean."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.theta = nn.Parameter(torch.zeros(width))

    def forward(self, features: Tensor) -> Tensor:
        weight = self.depthwise.weight.transpose(0, 1)
        kernels = lateral_inhibition(weight, self.theta.sigmoid()).transpose(0, 1)
        values = self.x_proj(features)
        mixed = functional.conv2d(
            values, kernels, self.depthwise.bias, padding=1, groups=values.shape[1]
        )
        return self.o_proj(mixed)


class ImageAttention(nn.Module):
    """Softmax attention between all pixels, heads of 16 channels, without positions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = max(1, width // 16)
        self.qkv, self.o_proj = nn.Conv2d(width, 3 * width, 1), nn.Conv2d(width, width, 1)

    def forward(self, features: Tensor) -> Tensor:
        pixels = self.qkv(features).flatten(2).unflatten(1, (3, self.heads, -1))
        query, key, value = pixels.transpose(-1, -2).unbind(1)
        mixed = functional.scaled_dot_product_attention(query, key, value)
        return self.o_proj(mixed.transpose(-1, -2).flatten(1, 2).view_as(features))


MIXERS: dict[str, Callable[[int], nn.Module]] = {
    "static": StaticConv2d,
    "static + inhibition": InhibitedStaticConv2d,
    "ATConv": ATConv2d,
    "ATConv without inhibition": WithoutInhibition,
    "attention": ImageAttention,
}


def exactness() -> dict[str, float]:
    """Largest difference of the operator from unfolding and summing, and of kernel sums from (1 - alpha) times what they were."""
    values, kernels = torch.randn(4, 16, 20, 20), torch.randn(4, 16, 3, 3)
    taps = functional.unfold(values, 3, padding=1).unflatten(1, (16, 9))
    expected = torch.einsum("bctn,bct->bcn", taps, kernels.flatten(2)).view_as(values)
    operator = (attentive_conv2d(values, kernels) - expected).abs().max()
    alpha = torch.rand(16)
    kept = lateral_inhibition(kernels, alpha).sum((-2, -1))
    share = (kept - (1 - alpha) * kernels.sum((-2, -1))).abs().max()
    return {"operator": float(operator), "sum": float(share)}


@torch.no_grad()
def cost_ratios(side: int, repeats: int) -> dict[str, float]:
    """Processor time on four times the pixels over that on side x side, the smallest of some repetitions each."""
    found = {}
    for name in ("ATConv", "attention"):
        layer, times = MIXERS[name](64).eval(), []
        for size in (side, 2 * side):
            image, best = torch.randn(2, 64, size, size), math.inf
            for _ in range(repeats):
                start = time.process_time()
                layer(image)
                best = min(best, time.process_time() - start)
            times.append(best)
        found[name] = times[1] / times[0]
    return found


def cued_orientation(
    count: int, generator: torch.Generator
) -> tuple[Float[Tensor, "count 1 40 40"], Tensor]:
    """Images with a grating in the middle and cues in the corners, which turn its meaning round.

    12x12 pixels sin(2 pi f (x cos phi + y sin phi) + psi), f within .15 and .25, phi 45 or 135 degrees; four 4x4 corners of
    level +1 or -1; noise of spread 0.3 everywhere. Label: (phi is 45 degrees) xor (the corners are -1).
    """
    images = 0.3 * torch.randn(count, 1, 40, 40, generator=generator)
    steep, low = torch.randint(0, 2, (2, count), generator=generator)
    angle = (math.pi / 4 + steep * math.pi / 2)[:, None, None]
    frequency = 0.15 + 0.1 * torch.rand(count, 1, 1, generator=generator)
    phase = 2 * math.pi * torch.rand(count, 1, 1, generator=generator)
    x, y = torch.arange(12.0)[None, None, :], torch.arange(12.0)[None, :, None]
    wave = 2 * math.pi * frequency * (x * angle.cos() + y * angle.sin()) + phase
    images[:, 0, 14:26, 14:26] += wave.sin()
    level = (1.0 - 2.0 * low)[:, None, None]
    for rows in (slice(0, 4), slice(36, 40)):
        for columns in (slice(0, 4), slice(36, 40)):
            images[:, 0, rows, columns] += level
    return images, (1 - steep) ^ low


class OneBlock(nn.Module):
    """A strided convolution, one block, the mean over pixels and a linear head: no norm that could multiply far and near."""

    def __init__(self, mixer: Callable[[int], nn.Module], width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, width, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.GELU(),
        )
        self.block, self.head = AttNetBlock(width, 4, mixer), nn.Linear(width, 2)
        self.apply(initialise_attnet)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.block(self.stem(images)).mean((-2, -1)))


def train_cued(name: str, seed: int, epochs: int, train: int, test: int) -> dict[str, Any]:
    """Held-out accuracy after each epoch, in percent, and accuracy on the training images at the end."""
    generator = torch.Generator().manual_seed(seed)
    data, held = cued_orientation(train, generator), cued_orientation(test, generator)
    torch.manual_seed(seed)
    model, curve = OneBlock(MIXERS[name]), []
    fit(model, data, epochs, 50, 3e-3, generator, lambda: curve.append(accuracy(model, held)))
    return {"curve": curve, "fitted": accuracy(model, data)}


def digit_images(seed: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The 1797 digits of scikit-learn, 8x8 upsampled to 16x16, within [-1, 1]; 400 to train on, the others held out."""
    from sklearn.datasets import load_digits

    data: Any = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    images = functional.interpolate(images, size=(16, 16), mode="bilinear", align_corners=False)
    labels = torch.tensor(data.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    first, last = order[:400], order[400:]
    return (images[first], labels[first]), (images[last], labels[last])


def train_digits(name: str, seed: int, epochs: int, train: int, test: int) -> dict[str, Any]:
    """Accuracy on `test` held-out digits of a small AttNet trained on `train`; of ATConv, how alike kernels are, by layer."""
    (images, labels), held = digit_images(seed)
    data, held = (images[:train], labels[:train]), (held[0][:test], held[1][:test])
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = AttNet(NANO, classes=10, channels=1, strides=(1, 2), mixer=MIXERS[name])
    fit(model, data, epochs, 50, 3e-3, generator)
    found: dict[str, Any] = {"accuracy": accuracy(model, held)}
    if name == "ATConv":
        found["redundancy"] = redundancy(model, held[0][:64])
    return found


@torch.no_grad()
def redundancy(model: nn.Module, images: Tensor) -> list[dict[str, float]]:
    """Of each attentive convolution: similarity and constant share of its kernels, routed and inhibited; mean alpha."""
    found: list[dict[str, float]] = []

    def read(layer: Any, args: tuple[Tensor, ...]) -> None:
        before = kernel_redundancy(layer.routed(args[0]))
        after = kernel_redundancy(layer.kernels(args[0]))
        found.append(
            {
                "similarity before": before.similarity,
                "similarity after": after.similarity,
                "constant before": before.constant,
                "constant after": after.constant,
                "alpha": float(layer.theta.sigmoid().mean()),
            }
        )

    layers = [module for module in model.modules() if isinstance(module, ATConv2d)]
    hooks = [layer.register_forward_pre_hook(read) for layer in layers]
    model(images)
    for hook in hooks:
        hook.remove()
    return found


def fit(
    model: nn.Module,
    data: tuple[Tensor, Tensor],
    epochs: int,
    batch: int,
    rate: float,
    generator: torch.Generator,
    after_epoch: Callable[[], Any] = lambda: None,
) -> None:
    """AdamW, decay 0.05 on matrices only (theta has none), a cosine to zero after a short warm-up."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=rate)
    images, labels = data
    steps = max(1, epochs * (len(images) // batch))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, max_lr=rate, total_steps=steps + 1, pct_start=0.1
    )
    for _ in range(epochs):
        model.train()
        order = torch.randperm(len(images), generator=generator)
        for start in range(0, len(images) - batch + 1, batch):
            chosen = order[start : start + batch]
            loss = functional.cross_entropy(model(images[chosen]), labels[chosen])
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            schedule.step()
        model.eval()
        after_epoch()
