"""A vision transformer of one layer whose six heads are set by hand, to check an analysis against the truth."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

GRID = (8, 8)
TRUTH = ("right", "self", "cls", "uniform", "content", "right")
"""What the heads do. The last copies the first, but its columns of the output projection are zero."""

_DIM = 80  # of a head; 65 for one-hot positions, the rest unused
_SHINE, _ONE = 65, 66  # residual dimensions: brightness of the patch, constant


def targets(head: str) -> list[int]:
    """Where each token (CLS first) looks; the last column has no right neighbour and looks to the left."""
    rows, columns = GRID
    if head == "cls":
        return [0] * (rows * columns + 1)
    if head == "self":
        return list(range(rows * columns + 1))
    steps = [1 if c < columns - 1 else -1 for _ in range(rows) for c in range(columns)]
    return [0, *(1 + i + step for i, step in enumerate(steps))]


@torch.no_grad()
def planted_vit(sharpness: float = 60.0) -> Any:
    """The model: 32x32 images of one channel, patches of 4, ten classes (a random classifier on CLS)."""
    from transformers import ViTConfig, ViTForImageClassification

    width, tokens = _DIM * len(TRUTH), GRID[0] * GRID[1] + 1
    settings: dict[str, Any] = {"num_labels": 10, "attn_implementation": "sdpa"}
    config = ViTConfig(
        hidden_size=width,
        num_hidden_layers=1,
        num_attention_heads=len(TRUTH),
        intermediate_size=8,
        image_size=32,
        patch_size=4,
        num_channels=1,
        **settings,
    )
    torch.manual_seed(0)
    model: Any = ViTForImageClassification(config).eval()
    embeddings: Any = model.vit.embeddings
    embeddings.cls_token.zero_()
    embeddings.position_embeddings.zero_()
    places = torch.arange(tokens)
    embeddings.position_embeddings[0, places, places] = 4.0
    embeddings.position_embeddings[0, :, _ONE] = 4.0
    convolution = embeddings.patch_embeddings.projection
    convolution.weight.zero_()
    convolution.bias.zero_()
    convolution.weight[_SHINE] = 1 / 16
    attention = next(m for m in model.modules() if hasattr(m, "q_proj") or hasattr(m, "query"))
    projections: tuple[Any, ...] = tuple(
        getattr(attention, new, None) or getattr(attention, old)
        for new, old in (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value"))
    )
    query, key, value = projections
    for projection in (query, key):
        projection.weight.zero_()
        projection.bias.zero_()
    for number, head in enumerate(TRUTH):
        first = number * _DIM
        if head == "content":
            query.weight[first, _ONE] = sharpness
            key.weight[first, _SHINE] = 1.0
        elif head != "uniform":
            for place, target in enumerate(targets(head)):
                query.weight[first + target, place] += sharpness
            key.weight[first + places, places] = 1.0
    torch.nn.init.normal_(value.weight, std=0.05)
    block = next(b for b in model.modules() if type(b).__name__ == "ViTLayer")
    output: Any = next(
        m
        for name, m in block.named_modules()
        if isinstance(m, torch.nn.Linear)
        and name.endswith(("attention.o_proj", "attention.output.dense"))
    )
    torch.nn.init.normal_(output.weight, std=0.05)
    output.weight[:, -_DIM:] = 0
    torch.nn.init.normal_(model.classifier.weight, std=0.5)
    return model


def lights(images: int, seed: int = 0) -> Float[Tensor, "images 1 height width"]:
    """Dark images, each with one bright patch."""
    generator = torch.Generator().manual_seed(seed)
    picture = torch.full((images, *GRID), -1.0)
    place = torch.randint(0, GRID[0] * GRID[1], (images,), generator=generator)
    picture.flatten(1)[torch.arange(images), place] = 1.0
    return picture.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None]
