"""A block cache (Fast-dLLM, arXiv 2505.22618): recompute everything at block borders, only the block inside.

The answer is decided block by block. The first step in a block recomputes all rows of all layers; the following ones
recompute the rows of that block against the cached keys and values of everything before and behind it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from jaxtyping import Bool
from torch import Tensor

from regard.cache.diffusion.canvas import Blocks, Canvas
from regard.cache.diffusion.policy import DiffusionCache


@dataclass(frozen=True)
class BlockCache(DiffusionCache):
    """Reuse inside blocks of `window.size` positions.

    Besides the block's rows a step recomputes the tokens that the previous step decided, which lie in the same block.
    """

    window: Blocks = field(default_factory=Blocks)

    def rows(self, canvas: Canvas) -> Bool[Tensor, "batch sequence"]:
        return self.window.block(canvas)

    def restart(self, canvas: Canvas) -> Bool[Tensor, " batch"]:
        """At a border no position of the block has been decided yet."""
        return ~(self.window.block(canvas) & canvas.decoded).any(1)
