"""A two-sample permutation test for many heads at once."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def permutation_test(
    a: Float[Tensor, "windows_a heads"],
    b: Float[Tensor, "windows_b heads"],
    *,
    permutations: int = 2000,
    seed: int = 0,
) -> tuple[Float[Tensor, " heads"], Float[Tensor, " heads"], Float[Tensor, " heads"]]:
    """The difference of means `a - b` for each head, its p-value, and its p-value against the maximum over heads.

    `p = (1 + #{permutations at least as extreme}) / (1 + permutations)`, two-sided. Cost: permutations x windows x heads.

    >>> a, b = torch.ones(6, 2), torch.zeros(6, 2)
    >>> difference, p, corrected = permutation_test(a, b, permutations=999)
    >>> difference.tolist(), bool((p < 0.01).all())
    ([1.0, 1.0], True)
    """
    every = torch.cat([a, b]).double()
    count, total = len(a), len(a) + len(b)
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(permutations, total, generator=generator).argsort(-1)
    signs = torch.full((permutations, total), -1.0 / len(b), dtype=torch.float64)
    signs.scatter_(1, order[:, :count], 1.0 / count)
    shuffled = (signs @ every).abs()  # [permutations, heads]
    difference = a.double().mean(0) - b.double().mean(0)
    edge = difference.abs() - 1e-12
    own = (1 + (shuffled >= edge).sum(0)) / (1 + permutations)
    corrected = (1 + (shuffled.amax(1)[:, None] >= edge).sum(0)) / (1 + permutations)
    return difference.float(), own.float(), corrected.float()
