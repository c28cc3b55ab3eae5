"""Measurements of the image-to-video experiment: a small ViT trained on still digits, then made to tell where digits move."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from regard.nn.temporal_heads import TemporalHeads, VideoClassifier
from regard.papers._classifying import accuracy
from regard.weights.linear_adapters import attach_linear_adapters, merge_linear_adapters

CANVAS, DIGIT, HEADS = 16, 8, 6
DIRECTIONS = [(4, 0), (4, 4), (0, 4), (-4, 4), (-4, 0), (-4, -4), (0, -4), (4, -4)]
"""Pixels a frame, across and down; a direction and the one four places on are each other's reversal.

Three frames cross the canvas, so that its places show the axis of motion to a model that cannot see order; the way along it
they do not show.
"""


@dataclass(frozen=True)
class Scale:
    """Sizes of the training runs."""

    still_steps: int = 1500
    steps: int = 450
    frames: int = 3
    width: int = 48
    layers: int = 3
    still_batch: int = 64
    batch: int = 32
    test: int = 1000


@dataclass(frozen=True)
class Arm:
    """What is put into the image model, and what is trained."""

    offsets: Mapping[int, int] = field(default_factory=dict)
    adapters: bool = True
    timed: bool = False
    everything: bool = False


ARMS = {
    "head only": Arm(adapters=False),
    "adapters": Arm(),
    "adapters + time": Arm(timed=True),
    "adapters + 1 head": Arm({0: -1}),
    "adapters + 2 heads": Arm({0: -1, 1: +1}),
    "adapters + 4 heads": Arm({0: -1, 1: +1, 2: -2, 3: +2}),
    "adapters + 2 heads + time": Arm({0: -1, 1: +1}, timed=True),
    "all weights + 2 heads": Arm({0: -1, 1: +1}, adapters=False, everything=True),
}
BLIND, TIMED, SEES, ALL = (
    "adapters",
    "adapters + time",
    "adapters + 2 heads",
    "all weights + 2 heads",
)
COMPARED = (BLIND, TIMED, SEES, ALL)
"""What the claims set side by side: trained with every seed; the other arms with the first alone."""

ADAPTER_RATE, WEIGHT_RATE = 1e-2, 3e-3
"""Learning rates; the first is also that of the head alone."""


@dataclass
class Digits:
    """Images `[digits, 8, 8]` in [0, 1] and labels, to train on and held out."""

    train: tuple[Tensor, Tensor]
    held: tuple[Tensor, Tensor]


def digit_images() -> Digits:
    from sklearn.datasets import load_digits

    data: Any = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32) / 16
    labels = torch.tensor(data.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    first, last = order[:1437], order[1437:]
    return Digits((images[first], labels[first]), (images[last], labels[last]))


def placed(
    images: Float[Tensor, "digits 8 8"], across: Tensor, down: Tensor, generator: torch.Generator
) -> Float[Tensor, "digits 1 16 16"]:
    """Each digit with its upper left corner there, on a black canvas, with noise of spread 0.1."""
    canvas = torch.zeros(len(images), CANVAS, CANVAS)
    rows = (down[:, None] + torch.arange(DIGIT))[:, :, None]
    columns = (across[:, None] + torch.arange(DIGIT))[:, None, :]
    canvas[torch.arange(len(images))[:, None, None], rows, columns] = images
    canvas = canvas + 0.1 * torch.randn(canvas.shape, generator=generator)
    return 2 * canvas[:, None] - 1


def still(
    data: tuple[Tensor, Tensor], count: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Digits at random places, and which they are."""
    chosen = torch.randint(len(data[0]), (count,), generator=generator)
    across, down = torch.randint(0, CANVAS - DIGIT + 1, (2, count), generator=generator)
    return placed(data[0][chosen], across, down, generator), data[1][chosen]


def moving(
    data: tuple[Tensor, Tensor], count: int, frames: int, generator: torch.Generator
) -> tuple[Float[Tensor, "count {frames} 1 16 16"], Tensor]:
    """One digit a clip that moves four pixels a frame in one of eight directions and stays inside; labels are directions."""
    chosen = torch.randint(len(data[0]), (count,), generator=generator)
    labels = torch.randint(8, (count,), generator=generator)
    step = torch.tensor(DIRECTIONS)[labels]
    room = CANVAS - DIGIT - (frames - 1) * step.abs()
    start = (torch.rand(count, 2, generator=generator) * (room + 1)).long()
    start = start - step.clamp(max=0) * (frames - 1)
    times = torch.arange(frames).repeat(count)
    corner = start.repeat_interleave(frames, 0) + times[:, None] * step.repeat_interleave(frames, 0)
    images = data[0][chosen].repeat_interleave(frames, 0)
    clips = placed(images, corner[:, 0], corner[:, 1], generator)
    return clips.unflatten(0, (count, frames)), labels


def reversal_closed(
    data: tuple[Tensor, Tensor], count: int, frames: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Half of the clips are the others backwards, with the opposite direction: who cannot see order is right at most half."""
    clips, labels = moving(data, count // 2, frames, generator)
    return torch.cat([clips, clips.flip(1)]), torch.cat([labels, (labels + 4) % 8])


def new_vit(scale: Scale) -> Any:
    from transformers import ViTConfig, ViTModel

    settings: dict[str, Any] = {"attn_implementation": "sdpa"}
    config = ViTConfig(
        hidden_size=scale.width,
        num_hidden_layers=scale.layers,
        num_attention_heads=HEADS,
        intermediate_size=2 * scale.width,
        image_size=CANVAS,
        patch_size=4,
        num_channels=1,
        hidden_dropout_prob=0.0,
        initializer_range=0.14,  # about width ** -0.5: from 0.02 so narrow a model learns too slowly
        **settings,
    )
    return ViTModel(config, add_pooling_layer=False)


def pretrain(digits: Digits, scale: Scale) -> tuple[Any, float]:
    """An image transformer trained to name still digits, and its held-out accuracy in percent."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = VideoClassifier(new_vit(scale), 1, 10, {}, dropout=0.0, timed=False)
    descend(
        model,
        scale.still_steps,
        lambda: _one_frame(still(digits.train, scale.still_batch, generator)),
        WEIGHT_RATE,
    )
    model.eval()
    return model.backbone, accuracy(model, _one_frame(still(digits.held, scale.test, generator)))


def _one_frame(drawn: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return drawn[0][:, None], drawn[1]


def prepared(tower: nn.Module, arm: Arm, scale: Scale, seed: int) -> VideoClassifier:
    """A copy of the image model as this arm trains it."""
    torch.manual_seed(seed)
    model = VideoClassifier(
        copy.deepcopy(tower), scale.frames, 8, arm.offsets, dropout=0.0, timed=arm.timed
    )
    if arm.adapters:
        attach_linear_adapters(model.backbone, scale=0.5)
    else:
        model.backbone.requires_grad_(arm.everything)
    norm: Any = model.backbone.layernorm  # the paper trains the last norm too
    norm.requires_grad_(True)
    return model


def train_arm(
    tower: nn.Module, digits: Digits, name: str, seed: int, scale: Scale
) -> dict[str, Any]:
    """Held-out accuracy on directions in percent, and what merging and the order of frames change."""
    arm = ARMS[name]
    model = prepared(tower, arm, scale, seed)
    generator = torch.Generator().manual_seed(seed)
    rate = WEIGHT_RATE if arm.everything else ADAPTER_RATE
    losses = descend(
        model,
        scale.steps,
        lambda: moving(digits.train, scale.batch, scale.frames, generator),
        rate,
    )
    model.eval()
    held = reversal_closed(
        digits.held, scale.test, scale.frames, torch.Generator().manual_seed(10_000 + seed)
    )
    found: dict[str, Any] = {
        "accuracy": accuracy(model, held),
        "loss": losses[-1],
        "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }
    clips = held[0][:16]
    with torch.no_grad():
        logits = model(clips)
        found["reordered"] = float((model(clips.roll(1, 1)) - logits).abs().max())
        found["reversed"] = float((model(clips.flip(1)) - logits).abs().max())
        if arm.adapters:
            merge_linear_adapters(model.backbone)
            found["merged"] = float((model(clips) - logits).abs().max())
            found["parameters"] = sum(p.numel() for p in model.backbone.parameters())
    return found


@torch.no_grad()
def inference_cost(tower: nn.Module, scale: Scale, repeats: int) -> dict[str, float]:
    """Wall-clock time and multiply-adds of the tower with temporal heads over those of the image model on the same frames."""
    from torch.utils.flop_counter import FlopCounterMode

    from regard import attach

    frames = torch.randn(32 * scale.frames, 1, CANVAS, CANVAS)
    heads = TemporalHeads(scale.frames, ARMS[SEES].offsets)
    times: dict[str, list[float]] = {"image": [], "video": []}
    counts: dict[str, int] = {}

    def once(name: str) -> None:
        start = time.perf_counter()
        tower(pixel_values=frames)
        times[name].append(time.perf_counter() - start)

    for _ in range(repeats):
        once("image")
        with attach(tower, heads):
            once("video")
    with FlopCounterMode(display=False) as counter:
        tower(pixel_values=frames)
    counts["image"] = counter.get_total_flops()
    with attach(tower, heads), FlopCounterMode(display=False) as counter:
        tower(pixel_values=frames)
    counts["video"] = counter.get_total_flops()
    return {
        "time": min(times["video"]) / min(times["image"]),
        "multiply-adds": counts["video"] / counts["image"],
    }


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """What requires gradients: matrices with decay 0.05; embeddings, norms and biases without."""
    learning = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    decays = [p.ndim >= 2 and name.endswith("weight") for name, p in learning]
    return [
        {
            "params": [p for (_, p), one in zip(learning, decays, strict=True) if one is decayed],
            "weight_decay": 0.05 if decayed else 0.0,
        }
        for decayed in (True, False)
    ]


def descend(
    model: nn.Module, steps: int, draw: Callable[[], tuple[Tensor, Tensor]], rate: float
) -> list[float]:
    """AdamW on what requires gradients, warm-up and cosine; the losses."""
    groups = parameter_groups(model)
    learning = [p for group in groups for p in group["params"]]
    optimiser = torch.optim.AdamW(groups, lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, max_lr=rate, total_steps=steps + 1, pct_start=0.1
    )
    losses = []
    model.train()
    for _ in range(steps):
        images, labels = draw()
        loss = functional.cross_entropy(model(images), labels)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(learning, 1.0)
        optimiser.step()
        schedule.step()
        losses.append(float(loss.detach()))
    return losses
