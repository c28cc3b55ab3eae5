"""What experiments with classifiers share."""

from __future__ import annotations

import torch
from torch import Tensor, nn


@torch.no_grad()
def accuracy(model: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    """In percent, of inputs and their labels; a hundred at a time."""
    right = [
        (model(inputs).argmax(-1) == labels).float()
        for inputs, labels in zip(data[0].split(100), data[1].split(100), strict=True)
    ]
    return 100 * float(torch.cat(right).mean())
