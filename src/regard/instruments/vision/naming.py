"""Names of head patterns by rule, and whether a head minds the image at all.

| name | rule (the first that holds) |
|---|---|
| `cls` | more than half of the patches' attention goes to special tokens |
| `self` | S_0 > 0.5 |
| `uniform` | mean entropy of the rows over patches > 0.95 ln(patches) |
| `content` | content dependence > 0.5 |
| `left`, `right`, `up`, `down` | the mean offset is more than half a patch; its larger component names it |
| `row`, `column` | second moments of the offset differ by more than a factor of 4 |
| `local` | mean hop < 1.5 |
| `mixed` | none of these |

Content dependence is the part of a head's maps that its average over images does not explain,
`E|A(x) - mean A|^2 / E|A(x) - u|^2` with u the uniform map: near 0 for a head that always does the same.
Source: Li et al. 2023, arXiv 2303.13731 (rules and thresholds are ours).
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from regard.instruments.vision.strength import Grid, hop_profile

NAMES = ("cls", "self", "uniform", "content", "left", "right", "up", "down", "row", "column")
NAMES = (*NAMES, "local", "mixed")


def content_dependence(
    maps: Float[Tensor, "images *heads tokens tokens"],
) -> Float[Tensor, "*heads"]:
    """How much of a head's attention depends on the image, from the maps of several images.

    >>> content_dependence(torch.eye(3).expand(4, 1, 3, 3))  # the same map for every image
    tensor([0.])
    """
    return dependence(maps.mean(0), maps.square().sum((-2, -1)).mean(0))


def dependence(
    mean: Float[Tensor, "*heads tokens tokens"], square: Float[Tensor, "*heads"]
) -> Float[Tensor, "*heads"]:
    """The same from the mean map and the mean of `|A(x)|^2`, which can be summed up image by image.

    Uses `E|A - mean|^2 = E|A|^2 - |mean|^2` and, rows summing to 1, `E|A - u|^2 = E|A|^2 - 1`. A head that is uniform on
    every image depends on nothing: 0.
    """
    varies = (square - mean.square().sum((-2, -1))).clamp_min(0)
    spread = square - 1.0
    scale = square.clamp_min(1)
    return torch.where(
        spread > 1e-6 * scale, varies / spread.clamp_min(1e-12), torch.zeros_like(spread)
    )


def offset_moments(
    maps: Float[Tensor, "*heads tokens tokens"], grid: Grid, *, special: int = 1
) -> tuple[Float[Tensor, "*heads 2"], Float[Tensor, "*heads 2"]]:
    """Mean and second moment of the offset (down, across) between a patch and where it looks, in patches."""
    rows, columns = grid
    row = torch.arange(rows * columns, device=maps.device) // columns
    column = torch.arange(rows * columns, device=maps.device) % columns
    offsets = torch.stack([row[None] - row[:, None], column[None] - column[:, None]], -1)
    offsets = offsets.to(maps.dtype)
    patches = maps[..., special:, special:]
    mass = patches.sum((-2, -1)).clamp_min(1e-9)[..., None]
    first = torch.einsum("...ij,ijd->...d", patches, offsets) / mass
    second = torch.einsum("...ij,ijd->...d", patches, offsets.square()) / mass
    return first, second


def row_entropy(
    maps: Float[Tensor, "*maps tokens tokens"], *, special: int = 1
) -> Float[Tensor, "*maps"]:
    """Mean entropy (nats) of the patches' rows over patches, renormalised without the special tokens."""
    patches = maps[..., special:, special:]
    rows = patches / patches.sum(-1, keepdim=True).clamp_min(1e-9)
    return torch.special.entr(rows).sum(-1).mean(-1)


def name_head(
    mean: Float[Tensor, "tokens tokens"],
    grid: Grid,
    *,
    content: float,
    entropy: float,
    special: int = 1,
) -> str:
    """The name of one head's pattern, from its mean map, content dependence and mean row entropy."""
    hops = hop_profile(mean, grid, special=special)
    (down, across), (tall, wide) = (t.tolist() for t in offset_moments(mean, grid, special=special))
    if float(hops.special) > 0.5:
        return "cls"
    if float(hops.share[0]) > 0.5:
        return "self"
    if entropy > 0.95 * math.log(grid[0] * grid[1]):
        return "uniform"
    if content > 0.5:
        return "content"
    if max(abs(down), abs(across)) > 0.5:
        if abs(down) > abs(across):
            return "down" if down > 0 else "up"
        return "right" if across > 0 else "left"
    if wide > 4 * tall:
        return "row"
    if tall > 4 * wide:
        return "column"
    return "local" if float(hops.mean_hop) < 1.5 else "mixed"
