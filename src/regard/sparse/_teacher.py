"""The boundary predictor's teacher: the model's own dense attention, read in blocks of rows."""

from __future__ import annotations

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from regard.engine import AttentionCall, Block, Method, blockwise
from regard.ops.boundary_ratio import boundary_mass, mass_ratio


class _Mass(Method):
    """Adds up, for each text of the batch, what later rows pay on either side of every gap."""

    reads_only = True

    def __init__(self, batch: int, keys: int, window: int, reach: int | None) -> None:
        self.window, self.reach = window, reach
        self.past, self.future = torch.zeros(2, batch, keys, dtype=torch.float64)

    def weights(self, block: Block) -> None:
        mean = block.weights.float().mean(1)
        first, keys = int(block.positions[0]), block.window.hi
        mean = torch.nn.functional.pad(mean, (block.window.lo, 0))
        for text, rows in enumerate(mean):
            past, future = boundary_mass(rows, first, self.window, self.reach)
            self.past[text, :keys] += past.cpu()
            self.future[text, :keys] += future.cpu()


@torch.no_grad()
def attention_boundaries(
    call: AttentionCall, window: int = 4, reach: int | None = None
) -> Float64[Tensor, "batch keys"]:
    """`ops.boundary_ratio` of a causal call's head-averaged attention, without padding.

    Cost: one blockwise pass over the scores; memory O(rows of a block x keys).
    """
    mass = _Mass(call.query.shape[0], call.keys, window, reach)
    rows = torch.arange(call.queries, device=call.query.device)
    blockwise.attend(call, (), (mass,), rows=rows)
    return torch.stack(
        [mass_ratio(p, f, window) for p, f in zip(mass.past, mass.future, strict=True)]
    )


def shared_keys(key: Float[Tensor, "kv_heads length dim"]) -> Float[Tensor, "length channels"]:
    """The keys of all KV heads of a token side by side, as the predictor sees them."""
    return key.transpose(0, 1).flatten(1)
