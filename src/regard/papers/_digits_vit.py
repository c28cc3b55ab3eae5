"""A small vision transformer trained on the digits that ship with scikit-learn."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

GRID = (8, 8)


@dataclass
class Digits:
    """Images `[images, 1, 32, 32]` in [-1, 1] and labels: to train on, to rank heads on, and held out."""

    train: tuple[Tensor, Tensor]
    rank: tuple[Tensor, Tensor]
    held: tuple[Tensor, Tensor]


def digits(seed: int = 0, train: int = 1200, rank: int = 256) -> Digits:
    """The 1797 digits that ship with scikit-learn, 8x8 upsampled to 32x32 (bilinear), in a seeded order."""
    from sklearn.datasets import load_digits

    data: Any = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    images = functional.interpolate(images, size=(32, 32), mode="bilinear", align_corners=False)
    labels = torch.tensor(data.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    cuts = order[:train], order[train : train + rank], order[train + rank :]
    return Digits(*((images[c], labels[c]) for c in cuts))


def new_vit(seed: int = 0, *, width: int = 96, layers: int = 4, heads: int = 4) -> Any:
    """A vision transformer with random weights for 32x32 images: patches of 4, so an 8x8 grid and a CLS token."""
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(seed)
    settings: dict[str, Any] = {"num_labels": 10, "attn_implementation": "sdpa"}
    config = ViTConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=2 * width,
        image_size=32,
        patch_size=4,
        num_channels=1,
        **settings,
    )
    return ViTForImageClassification(config)


def shifted(
    images: Float[Tensor, "images 1 height width"], most: int, generator: torch.Generator
) -> Float[Tensor, "images 1 height width"]:
    """Each image moved by up to `most` pixels; what comes in is background."""
    size = images.shape[-1]
    padded = functional.pad(images, (most,) * 4, value=-1.0)
    across, down = torch.randint(0, 2 * most + 1, (2, len(images)), generator=generator)
    rows = (torch.arange(size) + down[:, None])[:, :, None]
    columns = (torch.arange(size) + across[:, None])[:, None, :]
    return padded[torch.arange(len(images))[:, None, None], 0, rows, columns][:, None]


def train_vit(
    images: Float[Tensor, "images 1 height width"],
    labels: Int[Tensor, " images"],
    *,
    seed: int = 0,
    epochs: int = 25,
    batch: int = 100,
    rate: float = 1e-3,
    tick: Any = lambda epoch: None,
) -> Any:
    """A trained `new_vit(seed)`: AdamW, warm-up and cosine decay, small random shifts."""
    model = new_vit(seed).train()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.05)
    steps = epochs * (len(images) // batch)
    warm = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda s: min(1.0, (s + 1) / warm) * 0.5 * (1 + math.cos(math.pi * min(1.0, s / steps))),
    )
    for epoch in range(epochs):
        order = torch.randperm(len(images), generator=generator)
        for start in range(0, len(images) - batch + 1, batch):
            chosen = order[start : start + batch]
            logits = model(pixel_values=shifted(images[chosen], 3, generator)).logits
            loss = functional.cross_entropy(logits, labels[chosen], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        tick(epoch)
    return model.eval()
