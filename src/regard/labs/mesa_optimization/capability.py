"""What the trained layer can predict: its answers beside the truth, and beside one step of descent."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from regard.labs.mesa_optimization.experiment import (
    Trained,
    linear_causal_attention,
    one_step_ols_gd,
)


@dataclass(frozen=True, slots=True)
class Answers:
    """What the trained layer predicts on new sequences.

    Attributes:
        ratio: mean of Re(y_t / x_{t+1}) over sequences and over coordinates that are not 0.
        error: E |y_t - x_{t+1}|^2 / E |x_{t+1}|^2.
        gap: root mean squared distance to a step of descent of size a b, relative to the predictions.
        diagonal_gap: the same for the weights without other entries than a_j and b_j.
    """

    ratio: Float[np.ndarray, "seeds starts positions"]
    error: Float[np.ndarray, "seeds starts positions"]
    gap: Float[np.ndarray, "seeds starts"]
    diagonal_gap: Float[np.ndarray, "seeds starts"]


def answers(
    trained: Trained,
    sequences: Callable[[int, torch.Generator], Tensor],
    count: int,
    *,
    chunk: int,
    seed: int,
) -> Answers:
    """The layer's predictions for `count` sequences a seed, `chunk` at a time from `sequences(how many, generator)`."""
    generator, left = torch.Generator().manual_seed(seed), count
    step = torch.as_tensor(trained.product[-1])[..., None, None, None]
    quotients, errors, squares, size = [], [], [], []
    while left > 0:
        x = sequences(min(left, chunk), generator)
        target = x[:, None, :, 2:]
        y = linear_causal_attention(trained.value, trained.key, x)
        plain = linear_causal_attention(*trained.diagonal(), x)
        one = step * one_step_ols_gd(x, 1.0)[:, None]
        there = (target.abs() > 1e-6 * target.abs().max()).expand(y.shape)
        quotient = torch.where(there, y / torch.where(there, target, 1), 0).real
        quotients.append(torch.stack([quotient.sum((2, 4)), there.sum((2, 4))]).double())
        errors.append((y - target).abs().square().sum((2, 4)).double())
        size.append(target.abs().square().sum((2, 4)).double())
        parts = [part.abs().square().sum((2, 3, 4)).double() for part in (y - one, plain - one, y)]
        squares.append(torch.stack(parts))
        left -= chunk
    up, down = torch.stack(quotients).sum(0)
    far, near, whole = torch.stack(squares).sum(0)
    return Answers(
        (up / down).numpy(),
        (torch.stack(errors).sum(0) / torch.stack(size).sum(0)).numpy(),
        (far / whole).sqrt().numpy(),
        (near / whole).sqrt().numpy(),
    )
