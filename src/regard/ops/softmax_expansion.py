"""Softmax attention as separable attention: the features of the exponential, cut off at an order.

    e^{q . k / sqrt(n)} = sum_p <q^(x p), k^(x p)> / (p! n^{p/2})          q^(x p): all products of p entries of q

Order P needs 1 + n + ... + n^P features: a softmax is separable attention whose state is infinite, and a larger state comes
nearer to it. The remainder of the series is small only where P is above e |q . k| / sqrt(n), so heads with large scores need
orders that no state can hold.

Source: Sieber et al. 2024, arXiv 2405.15731; the features: Nauen, Palacio and Dengel 2024, arXiv 2403.02920.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from regard._errors import InputError


def exponential_features(
    states: Float[Tensor, "*batch dim"], order: int
) -> Float[Tensor, "*batch features"]:
    """Features whose product is the series of `e^{q . k / sqrt(dim)}` up to an order.

    Cost: O(dim^order) time and memory a vector.

    Raises:
        InputError: an order below 0, or more than a million features.

    >>> q, k = torch.tensor([1.0, 0.0]), torch.tensor([2.0, 5.0])
    >>> x = 2 / 2**0.5
    >>> bool(torch.isclose(exponential_features(q, 2) @ exponential_features(k, 2), torch.tensor(1 + x + x * x / 2)))
    True
    """
    dim = states.shape[-1]
    if order < 0 or feature_count(dim, order) > 10**6:
        raise InputError.of(
            "order",
            given=order,
            expected=f"0 or more, with at most a million features ({dim} numbers a vector)",
        )
    power = torch.ones_like(states[..., :1])
    parts = [power]
    for p in range(1, order + 1):
        power = (power[..., :, None] * states[..., None, :]).flatten(-2)
        parts.append(power / math.sqrt(math.factorial(p) * dim ** (p / 2)))
    return torch.cat(parts, -1)


def feature_count(dim: int, order: int) -> int:
    """1 + dim + ... + dim^order.

    >>> feature_count(8, 2)
    73
    """
    return sum(dim**p for p in range(order + 1))


def truncated_exponential(scores: Float[Tensor, "*any"], order: int) -> Float[Tensor, "*any"]:
    """`sum_{p <= order} scores^p / p!`, what features of that order give for `scores = q . k / sqrt(n)`.

    Of an even order it is above 0 everywhere; of an odd order it is not.

    >>> truncated_exponential(torch.tensor([0.0, 2.0]), 2)
    tensor([1., 5.])
    """
    total = torch.ones_like(scores)
    for p in range(order, 0, -1):
        total = 1 + scores / p * total
    return total
