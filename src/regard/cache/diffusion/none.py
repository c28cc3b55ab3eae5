"""No cache: every step recomputes every row of every layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor

from regard.cache.diffusion.canvas import Canvas
from regard.cache.diffusion.policy import DiffusionCache


@dataclass(frozen=True)
class NoCache(DiffusionCache):
    """Full recomputation, the reference of every other policy: `steps x layers x sequence` rows."""

    def restart(self, canvas: Canvas) -> Bool[Tensor, " batch"]:
        return torch.ones_like(canvas.step, dtype=torch.bool)
