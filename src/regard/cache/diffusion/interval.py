"""A cache refreshed at a fixed interval: every n-th step recomputes everything, the others the query set only."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Bool
from torch import Tensor

from regard._errors import InputError
from regard.cache.diffusion.canvas import Canvas
from regard.cache.diffusion.policy import DiffusionCache


@dataclass(frozen=True)
class FixedIntervalCache(DiffusionCache):
    """Recomputes everything in steps 0, n, 2n, ...; `interval=1` is no cache.

    Attributes:
        interval: n.
    """

    interval: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.interval < 1:
            raise InputError.of("interval", given=self.interval, expected="a whole number >= 1")

    def restart(self, canvas: Canvas) -> Bool[Tensor, " batch"]:
        return canvas.step % self.interval == 0
