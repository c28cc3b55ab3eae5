"""Rotary position embedding (RoFormer, arXiv 2104.09864).

The pair (x_i, x_{i + dim/2}) of a query or key at position p turns by p * theta^(-2i / dim), so a score depends on the
distance between query and key only.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def rotate(
    states: Float[Tensor, "batch heads tokens dim"],
    positions: Int[Tensor, "*rows tokens"],
    theta: float = 10_000.0,
) -> Float[Tensor, "batch heads tokens dim"]:
    """Queries or keys turned to their positions, `[tokens]` for all rows or `[batch, tokens]`.

    Cost: 4 multiplications a number.
    """
    dim, device = states.shape[-1], states.device
    precise = torch.promote_types(states.dtype, torch.float32)
    speed = theta ** -(torch.arange(0, dim, 2, dtype=precise, device=device) / dim)
    angle = positions[..., None, :, None].to(precise) * speed
    cos, sin = angle.cos().to(states.dtype), angle.sin().to(states.dtype)
    first, second = states.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
