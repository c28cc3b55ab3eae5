"""How far patches look: the share of attention at every distance on the patch grid.

For patch i at (r, c), ring k holds the patches j with max(|r_j - r|, |c_j - c|) = k; ring 0 is i itself. The strength of a
head at hop k is `S_k = mean_i sum_{j in ring k(i)} A_ij`, so that all S_k and the attention to special tokens (CLS) sum to 1.
Patches at the border have fewer neighbours; the per-neighbour strength divides each ring's sum by the number of patches
that exist in it. Source: Li et al. 2023, arXiv 2303.13731 (the formulas are our reading of its abstract).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from regard._errors import InputError

Grid = tuple[int, int]
"""Rows and columns of patches."""


@dataclass
class Hops:
    """Attention by distance, for any leading dimensions of the maps.

    Attributes:
        share: `[..., hops]`, S_k; sums to 1 together with `special`.
        neighbour: `[..., hops]`, mean weight on one existing patch of ring k.
        special: `[...]`, mean weight of patches on CLS and other special tokens.
        back: `[...]`, weight of the first special token on all patches (0 without one).
    """

    share: Float[Tensor, "*maps hops"]
    neighbour: Float[Tensor, "*maps hops"]
    special: Float[Tensor, "*maps"]
    back: Float[Tensor, "*maps"]

    @property
    def among_patches(self) -> Float[Tensor, "*maps hops"]:
        """S_k over the attention that goes to patches at all; a head that looks at CLS only has zeros."""
        return self.share / (1 - self.special).clamp_min(1e-9)[..., None]

    @property
    def mean_hop(self) -> Float[Tensor, "*maps"]:
        """`sum k S_k / sum S_k`."""
        hops = torch.arange(self.share.shape[-1], dtype=self.share.dtype, device=self.share.device)
        return (self.share * hops).sum(-1) / self.share.sum(-1).clamp_min(1e-9)


def hop_distance(grid: Grid) -> Int[Tensor, "patches patches"]:
    """Chebyshev distance between any two patches, numbered row by row.

    >>> hop_distance((1, 3)).tolist()
    [[0, 1, 2], [1, 0, 1], [2, 1, 0]]
    """
    row, column = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    places = torch.stack([row.flatten(), column.flatten()], 1)
    return (places[:, None] - places).abs().amax(-1)


def hop_profile(
    maps: Float[Tensor, "*maps tokens tokens"], grid: Grid, *, special: int = 1
) -> Hops:
    """The strength of attention at each hop.

    Args:
        maps: attention weights, rows are queries.
        grid: rows and columns of patches.
        special: tokens in front of the patches (1 for CLS, 2 for CLS and a distillation token, 0 for none).

    Raises:
        InputError: the maps have another number of tokens.

    Cost: O(tokens^2) for each map.

    >>> hop_profile(torch.full((5, 5), 0.2), (2, 2)).share  # itself, and the three others
    tensor([0.2000, 0.6000])
    """
    check_grid(maps.shape[-1], grid, special)
    patches = maps[..., special:, special:]
    distance = hop_distance(grid).to(maps.device)
    rings = distance == torch.arange(int(distance.max()) + 1, device=maps.device)[:, None, None]
    rings = rings.to(maps.dtype)
    sums = torch.einsum("...ij,kij->...ik", patches, rings)
    sizes = rings.sum(-1).T  # [patches, hops]: how many patches exist in each ring
    exists = (sizes > 0).to(maps.dtype)
    single = (sums / sizes.clamp_min(1)).sum(-2) / exists.sum(0)
    back = maps[..., 0, special:].sum(-1) if special else torch.zeros_like(maps[..., 0, 0])
    return Hops(sums.mean(-2), single, maps[..., special:, :special].sum(-1).mean(-1), back)


def check_grid(tokens: int, grid: Grid, special: int) -> None:
    """Raises InputError when `tokens` is not `special` + the patches of `grid`."""
    if tokens != special + grid[0] * grid[1]:
        raise InputError.of(
            "grid",
            given=f"{grid[0]}x{grid[1]} with {special} special token(s)",
            expected=f"the patches of a map with {tokens} tokens",
            fix="give grid=(rows, columns) and special=",
        )
