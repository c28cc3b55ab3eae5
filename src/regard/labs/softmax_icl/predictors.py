"""The predictors that theory names, as functions of a prompt: inputs x, labels y, one column a task, and a query."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

Number = float | int
Inputs = Float[Tensor, "*batch examples d"]
Labels = Float[Tensor, "*batch examples labels"]
Query = Float[Tensor, "*batch d"]
Answers = Float[Tensor, "*batch labels"]


def kernel_heads(
    omega: Sequence[Number], mu: Sequence[Number], x: Inputs, y: Labels, query: Query
) -> Answers:
    """The reduced model: `sum_h mu_h sum_l softmax_l(omega_h <x_l, x_q>) y_l`."""
    similar = x @ query[..., None]
    heads = [
        m * (torch.softmax(o * similar, -2) * y).sum(-2) for o, m in zip(omega, mu, strict=True)
    ]
    return torch.stack(heads).sum(0)


def debiased_gd(x: Inputs, y: Labels, query: Query, eta: Number) -> Answers:
    """One step of debiased gradient descent: `(eta / L) sum_l y_l <x_l - mean x, x_q>`.

    >>> x = torch.tensor([[1.0], [3.0]])
    >>> debiased_gd(x, torch.tensor([[1.0], [2.0]]), torch.tensor([2.0]), 1.0)
    tensor([1.])
    """
    return plain_gd(x - x.mean(-2, keepdim=True), y, query, eta)


def plain_gd(x: Inputs, y: Labels, query: Query, eta: Number) -> Answers:
    """One step of gradient descent from zero: `(eta / L) sum_l y_l <x_l, x_q>`."""
    return eta * ((x @ query[..., None]) * y).mean(-2)


def ridge(x: Inputs, y: Labels, query: Query, penalty: Number) -> Answers:
    """Ridge regression; with `penalty = s2 d` it is the posterior mean, the best of all predictors."""
    eye = torch.eye(x.shape[-1], dtype=x.dtype)
    fitted = torch.linalg.solve(x.mT @ x + penalty * eye, x.mT @ y)
    return (query[..., None] * fitted).sum(-2)
