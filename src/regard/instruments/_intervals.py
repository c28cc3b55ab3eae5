"""Intervals for means over tokens: neighbouring tokens are not independent, so whole stretches of text are drawn."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

STRETCH = 32


def stretches(
    values: Float[Tensor, "*series batch next"], length: int = STRETCH
) -> tuple[Float[Tensor, "*series stretches"], Float[Tensor, "*series stretches"]]:
    """Sums and counts of the finite values of consecutive stretches; a stretch never spans two rows."""
    values = values.double()
    missing = -values.shape[-1] % length
    values = torch.nn.functional.pad(values, (0, missing), value=float("nan"))
    parts = values.unflatten(-1, (-1, length)).flatten(-3, -2)
    known = ~parts.isnan()
    return parts.nan_to_num(0.0).sum(-1), known.sum(-1).double()


def bootstrap(
    values: Float[Tensor, "*series batch next"],
    *,
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> Float[Tensor, "*series two"]:
    """The percentile interval of the mean over tokens, from `draws` resamples of stretches with replacement.

    >>> bootstrap(torch.ones(1, 320)).tolist()
    [1.0, 1.0]
    """
    sums, counts = stretches(values)
    generator = torch.Generator().manual_seed(seed)
    picked = torch.randint(sums.shape[-1], (draws, sums.shape[-1]), generator=generator)
    means = sums[..., picked].sum(-1) / counts[..., picked].sum(-1).clamp_min(1)
    edges = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=means.dtype)
    return means.quantile(edges, dim=-1).movedim(0, -1)


def standard_error(values: Float[Tensor, "batch next"]) -> float:
    """Standard error of the mean over tokens, from the spread between stretches (NaN with a single stretch)."""
    sums, counts = stretches(values)
    sums, counts = sums[counts > 0], counts[counts > 0]
    if len(sums) < 2:
        return float("nan")
    residual = sums - counts * (sums.sum() / counts.sum())
    return float((residual.square().sum() * len(sums) / (len(sums) - 1)).sqrt() / counts.sum())


def bootstrap_items(
    values: Float[Tensor, "*series items"], *, level: float = 0.95, draws: int = 2000, seed: int = 0
) -> Float[Tensor, "*series two"]:
    """The percentile interval of the mean over independent items; NaN for a single item.

    >>> bootstrap_items(torch.tensor([3.0])).tolist()
    [nan, nan]
    """
    count = values.shape[-1]
    if count < 2:
        return values.new_full((*values.shape[:-1], 2), float("nan"), dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    picked = torch.randint(count, (draws, count), generator=generator)
    means = values.double()[..., picked].nanmean(-1)
    edges = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=means.dtype)
    return means.quantile(edges, dim=-1).movedim(0, -1)
