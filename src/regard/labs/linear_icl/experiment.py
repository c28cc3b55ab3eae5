"""The experiment: prompts, the layer, its training by gradient descent on prompts, and its risk."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from regard.labs.linear_icl.theory import Matrix


@dataclass(frozen=True, slots=True)
class Prompts:
    """Prompts and the label of each query."""

    matrices: Float[Tensor, "*batch rows columns"]
    answers: Float[Tensor, "*batch"]


def draw_prompts(
    root: Float[Tensor, "... d d"],
    examples: int,
    batch: tuple[int, ...],
    generator: torch.Generator,
    *,
    noise: float = 0.0,
    label: Callable[[Tensor], Tensor] | None = None,
    task: Float[Tensor, "... d"] | None = None,
    query: Float[Tensor, "... d d"] | None = None,
) -> Prompts:
    """Prompts `[*batch, d + 1, N + 1]` of inputs with covariance `root root^T` (one root for all, or one a prompt), in float64.

    Args:
        root: a square root of the covariance.
        examples: N.
        batch: how many, as a shape.
        generator: draws everything.
        noise: variance added to every label, the query's too.
        label: maps <w, x> to the label before noise; the identity by default.
        task: w, drawn from N(0, I) by default.
        query: a root of the query's own covariance; the same by default.
    """
    size = root.shape[-1]

    def normal(*shape: int) -> Tensor:
        # single precision draws cost a quarter; all arithmetic on them is double
        return torch.randn(*shape, generator=generator).double()

    x = normal(*batch, examples + 1, size)
    inputs = x @ root.mT
    if query is not None:
        inputs = torch.cat([inputs[..., :-1, :], x[..., -1:, :] @ query.mT], -2)
    w = normal(*batch, size) if task is None else task
    y = (inputs * w[..., None, :]).sum(-1)
    y = y if label is None else label(y)
    if noise:
        y = y + math.sqrt(noise) * normal(*y.shape)
    shown = torch.cat([y[..., :-1], torch.zeros_like(y[..., :1])], -1)
    return Prompts(torch.cat([inputs, shown[..., None]], -1).mT, y[..., -1])


def predict(
    value: Float[Tensor, "*runs rows rows"],
    key: Float[Tensor, "*runs rows rows"],
    prompts: Float[Tensor, "*runs batch rows columns"],
) -> Float[Tensor, "*runs batch"]:
    """The layer's `y_hat` for W_PV = `value` and W_KQ = `key`: the last entry of W_PV (E E^T / N) W_KQ (x_q; 0).

    The division is by the labelled examples in these very prompts, one less than the columns.
    """
    read = prompts[..., -1] @ key.mT  # W_KQ (x_q; 0)
    moment = prompts @ prompts.mT / (prompts.shape[-1] - 1)
    # products of such small matrices are faster as sums
    mixed = (moment * read[..., None, :]).sum(-1)
    return (mixed * value[..., None, -1, :]).sum(-1)


@dataclass(frozen=True, slots=True)
class Trained:
    """Weights after training and at logged steps; the first axis of each is time.

    Attributes:
        steps: `[times]`.
        value, key: W_PV and W_KQ, `[times, seeds, d + 1, d + 1]`.
    """

    steps: np.ndarray
    value: Float[np.ndarray, "times seeds rows rows"]
    key: Float[np.ndarray, "times seeds rows rows"]

    def product(self) -> Float[np.ndarray, "times seeds d d"]:
        """u U, which decides the prediction whatever the balance of the two matrices."""
        return self.value[..., -1, -1, None, None] * self.key[..., :-1, :-1]

    def stray(self) -> float:
        """At the end, the largest entry that theory keeps at zero (w21 of W_PV, w12 of W_KQ) over the largest of all."""
        value, key = np.abs(self.value[-1]), np.abs(self.key[-1])
        stray = max(value[:, -1, :-1].max(), key[:, -1, :-1].max())
        return float(stray / max(value.max(), key.max()))


def start(
    dimension: int, scale: float, seeds: int, generator: torch.Generator
) -> tuple[Float[Tensor, "seeds rows rows"], Float[Tensor, "seeds rows rows"]]:
    """The theorem's start: W_PV = sigma [0 0; 0 1], W_KQ = sigma [Theta Theta^T 0; 0 0], `||Theta Theta^T||_F = 1`."""
    theta = torch.randn(seeds, dimension, dimension, dtype=torch.float64, generator=generator)
    square = theta @ theta.mT
    square = square / square.flatten(1).norm(dim=1)[:, None, None]
    value = torch.zeros(seeds, dimension + 1, dimension + 1, dtype=torch.float64)
    key = value.clone()
    value[:, -1, -1] = scale
    key[:, :-1, :-1] = scale * square
    return value, key


def train(
    draw: Callable[[tuple[int, ...], torch.Generator], Prompts],
    begin: tuple[Tensor, Tensor],
    *,
    steps: int,
    rate: float,
    batch: int,
    seed: int,
    logs: int = 40,
) -> Trained:
    """Stochastic gradient descent on all entries of both matrices, every seed at once, fresh prompts at every step.

    For the last third of the steps the rate falls to a tenth, so that the noise of the batches settles.

    Cost: O(steps x seeds x batch x d x N).
    """
    value, key = (part.clone().requires_grad_() for part in begin)
    generator = torch.Generator().manual_seed(seed)
    marks = sorted(set(np.unique(np.rint(np.geomspace(1, steps, logs)).astype(int)).tolist()))
    kept = [(0, value.detach().clone(), key.detach().clone())]
    for step in range(1, steps + 1):
        prompts = draw((len(value), batch), generator)
        wrong = predict(value, key, prompts.matrices) - prompts.answers
        gradients = torch.autograd.grad(0.5 * wrong.square().mean(-1).sum(), (value, key))
        late = max(0.0, step / steps - 2 / 3) * 3
        with torch.no_grad():
            for part, gradient in zip((value, key), gradients, strict=True):
                part -= rate * 0.1**late * gradient
        if step in marks:
            kept.append((step, value.detach().clone(), key.detach().clone()))
    steps_, values, keys = zip(*kept, strict=True)
    return Trained(np.array(steps_), torch.stack(values).numpy(), torch.stack(keys).numpy())


def measured_risk(
    weight: Matrix, prompts: Callable[[int, torch.Generator], Prompts], count: int, seed: int
) -> tuple[float, float]:
    """Mean squared error of the layer with u U = `weight` over `count` prompts, and half of its 95 % interval."""
    size = len(weight) + 1
    value, key = (torch.zeros(size, size, dtype=torch.float64) for _ in range(2))
    value[-1, -1] = 1.0
    key[:-1, :-1] = torch.as_tensor(weight)
    generator, errors, left = torch.Generator().manual_seed(seed), [], count
    while left > 0:
        drawn = prompts(min(left, 5000), generator)
        errors.append((predict(value, key, drawn.matrices) - drawn.answers).square())
        left -= 5000
    squares = torch.cat(errors)
    return float(squares.mean()), 1.96 * float(squares.std()) / math.sqrt(count)
