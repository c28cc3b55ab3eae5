"""Attention entropy kept within a band around a learnable level, and the share of heads that look at everything.

    E = -sum_j A_j log(A_j + 1e-9)          entropy of an attention row, nats
    delta = E - theta E_max                 E_max = log T, theta the level of the head
    penalty = delta^2  if |delta| > gamma E_max,  else 0

`head_entropy_penalty` takes E as the mean over batch and rows, `row_entropy_penalty` (the released code) sums the penalties of
all rows; both then average over heads. A causal row i can reach log i only, so with the published E_max early rows lie below
the band for ever; `causal_ceiling` gives log i for each row.

Source: Jha and Reagen 2025, "Entropy-Guided Attention for Private LLMs", arXiv 2501.03489, algorithm 1.

Cost: one pass over the weights, which must be held: meant for training lengths (T up to a few hundred).
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from regard._errors import InputError


def attention_entropy(
    weights: Float[Tensor, "*rows keys"],
) -> Float[Tensor, "*rows"]:
    """Shannon entropy of every row in nats. The 1e-9 keeps gradients finite at weights of 0.

    >>> round(float(attention_entropy(torch.full((4,), 0.25))), 4)
    1.3863
    """
    return -(weights * torch.log(weights + 1e-9)).sum(-1)


def causal_ceiling(
    rows: int, *, device: torch.device | str | None = None
) -> Float[Tensor, " rows"]:
    """The largest entropy of each causal row: log of the keys it sees.

    >>> causal_ceiling(3)
    tensor([0.0000, 0.6931, 1.0986])
    """
    return torch.arange(1, rows + 1, device=device).float().log()


def head_entropy_penalty(
    entropy: Float[Tensor, "batch heads rows"],
    levels: Float[Tensor, " heads"],
    *,
    tolerance: float = 0.2,
    ceiling: Float[Tensor, " rows"] | None = None,
) -> Float[Tensor, ""]:
    """The penalty of each head's mean entropy, averaged over heads.

    Args:
        entropy: of the attention rows of one layer.
        levels: theta of each head, a share of the ceiling.
        tolerance: gamma, the half-width of the free band, a share of the ceiling.
        ceiling: E_max of every row, log of the number of rows by default; its mean over rows is taken.

    >>> head_entropy_penalty(torch.full((2, 1, 8), 1.0), torch.tensor([0.5]))
    tensor(0.)
    """
    highest = _ceiling(entropy, ceiling).mean()
    return _band(entropy.mean((0, 2)), levels, highest, tolerance).mean()


def row_entropy_penalty(
    entropy: Float[Tensor, "batch heads rows"],
    levels: Float[Tensor, " heads"],
    *,
    tolerance: float = 0.2,
    ceiling: Float[Tensor, " rows"] | None = None,
) -> Float[Tensor, ""]:
    """The penalties of all rows, summed over batch and rows and averaged over heads; arguments as for the heads' penalty.

    The published strength of 1e-5 belongs to this sum, which grows with batch and rows.
    """
    highest = _ceiling(entropy, ceiling)
    return _band(entropy, levels[:, None], highest, tolerance).sum((0, 2)).mean()


def entropic_overload(
    entropy: Float[Tensor, "layers heads"], parts: int = 4
) -> Float[Tensor, " parts"]:
    """The share of heads in each of `parts` equal ranges from 0 to the largest entropy there is, the last one the overload.

    >>> entropic_overload(torch.tensor([[4.0, 3.5], [0.5, 1.5]]))
    tensor([0.2500, 0.2500, 0.0000, 0.5000])
    """
    most = float(entropy.max())
    if not most > 0:
        raise InputError.of("entropy", given=most, expected="above 0 in some head")
    place = (entropy / most * parts).long().clamp(0, parts - 1)
    return torch.bincount(place.flatten(), minlength=parts) / place.numel()


def _ceiling(entropy: Tensor, ceiling: Tensor | None) -> Tensor:
    rows = entropy.shape[-1]
    if ceiling is None:
        return entropy.new_full((rows,), math.log(rows))
    return ceiling.to(entropy)


def _band(entropy: Tensor, levels: Tensor, ceiling: Tensor, tolerance: float) -> Tensor:
    if not tolerance >= 0:
        raise InputError.of("tolerance", given=tolerance, expected="at least 0")
    delta = entropy - levels * ceiling
    return torch.where(delta.abs() > tolerance * ceiling, delta.square(), 0.0)
