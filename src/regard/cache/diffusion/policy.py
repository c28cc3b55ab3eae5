"""Base of the policies that decide what a denoising step recomputes; each policy is one short file.

A step recomputes, in every layer, the rows of the query set: the window of masks to be decided next, the tokens decided in
the previous step, the tracked tokens, and whatever `rows` adds. From layer r on it recomputes every row. `restart` sets
r = -1 (everything) at the start of a step; `changed` may set it to the next layer on the way down.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from regard.cache.diffusion.canvas import Canvas, Window, window_rule


@dataclass(frozen=True)
class DiffusionCache:
    """What every policy shares. Policies hold settings only; the states of a generation live in the generation.

    Attributes:
        window: which masks may be decided next: a number of leftmost masks, or `Blocks(size)`.
    """

    window: int | Window = 16

    def __post_init__(self) -> None:
        window_rule(self.window)

    @property
    def tracked(self) -> int:
        """How many of the most attended decided tokens each layer follows."""
        return 0

    def active(self, canvas: Canvas) -> Bool[Tensor, "batch sequence"]:
        """The masks that may be decided in this step."""
        return window_rule(self.window).active(canvas)

    def rows(self, canvas: Canvas) -> Bool[Tensor, "batch sequence"]:
        """Rows to recompute besides the window, the tokens just decided and the tracked ones."""
        return torch.zeros_like(canvas.open)

    def restart(self, canvas: Canvas) -> Bool[Tensor, " batch"]:
        """Sequences for which this step recomputes everything; the first step always does."""
        return canvas.step == 0

    def changed(
        self,
        old: Float[Tensor, "batch heads tracked keys"],
        new: Float[Tensor, "batch heads tracked keys"],
    ) -> tuple[Float[Tensor, " batch"], Bool[Tensor, " batch"]]:
        """A similarity of the tracked tokens' attention before and now, and whether all deeper layers must be recomputed."""
        same = torch.ones(len(old), device=old.device)
        return same, same < 1
