"""What theory says of softmax attention on regression prompts; the equations are in `regard.labs.softmax_icl`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float

Heads = Float[np.ndarray, "*runs heads"]
Number = float | int


def _bracket(
    omega: Heads, d: int, examples: int, noise: Number
) -> Float[np.ndarray, "*runs heads heads"]:
    outer = omega[..., :, None] * omega[..., None, :]
    return outer + (1 + noise) / examples * np.exp(d * outer)


def reduced_loss(
    omega: Heads, mu: Heads, d: int, examples: int, noise: Number
) -> Float[np.ndarray, "*runs"]:
    """`1 + s2 - 2 mu . omega + mu^T A mu`, the loss of the reduced model for large d and L.

    >>> round(float(reduced_loss(np.array([0.13, -0.13]), np.array([3.45, -3.45]), 5, 40, 0.1)), 3)
    0.221
    """
    matrix = _bracket(omega, d, examples, noise)
    linear, square = (mu * omega).sum(-1), np.einsum("...i,...ij,...j->...", mu, matrix, mu)
    return np.asarray(1 + noise - 2 * linear + square)


def reduced_velocity(
    omega: Heads, mu: Heads, d: int, examples: int, noise: Number
) -> tuple[Heads, Heads]:
    """Minus half the gradient of `reduced_loss`, for omega and for mu.

    `dmu = omega - A mu`, `domega = mu - (mu . omega) mu - (d (1 + s2) / L) (exp(d omega omega^T) o mu mu^T) omega`.
    """
    matrix = _bracket(omega, d, examples, noise)
    outer = omega[..., :, None] * omega[..., None, :]
    weighted = np.exp(d * outer) * mu[..., :, None] * mu[..., None, :]
    kernel = d * (1 + noise) / examples * np.einsum("...ij,...j->...i", weighted, omega)
    along = (mu * omega).sum(-1, keepdims=True)
    return mu - along * mu - kernel, omega - np.einsum("...ij,...j->...i", matrix, mu)


def optimal_mu(omega: Heads, d: int, examples: int, noise: Number) -> Heads:
    """`A^-1 omega`, the best output scales for given omega."""
    return np.linalg.solve(_bracket(omega, d, examples, noise), omega[..., None])[..., 0]


def single_head(d: int, examples: int, noise: Number) -> tuple[float, float, float]:
    """The best single head: `omega = 1 / sqrt(d)`, `mu = sqrt(d) / (1 + (1 + s2) e d / L)`, and its loss.

    >>> [round(value, 3) for value in single_head(5, 40, 0.1)]
    [0.447, 1.628, 0.372]
    """
    ratio = (1 + noise) * math.e * d / examples
    return 1 / math.sqrt(d), math.sqrt(d) / (1 + ratio), 1 + noise - 1 / (1 + ratio)


def debiased_step(d: int, examples: int, noise: Number) -> tuple[float, float]:
    """The best step of debiased gradient descent, `eta* = 1 / (1 + (1 + s2) d / L)`, and its loss `1 + s2 - eta*`.

    >>> [round(value, 3) for value in debiased_step(5, 40, 0.1)]
    [0.879, 0.221]
    """
    eta = 1 / (1 + (1 + noise) * d / examples)
    return eta, 1 + noise - eta


def debiased_risk(d: int, examples: int, noise: Number, eta: Number) -> float:
    """The exact mean squared error of debiased gradient descent, for any d and L.

    `1 + s2 - 2 eta (1 - 1/L) + eta^2 (1 - 1/L) (1 + (1 + s2) d / L)`, from the moments of a Wishart matrix with L - 1 degrees of
    freedom. Not in the paper, whose approximate loss lacks the factors 1 - 1/L; the best eta is eta* all the same.

    >>> round(debiased_risk(5, 40, 0.1, debiased_step(5, 40, 0.1)[0]), 3)
    0.243
    """
    share = 1 - 1 / examples
    return 1 + noise - 2 * eta * share + eta**2 * share * (1 + (1 + noise) * d / examples)


def plain_risk(d: int, examples: int, noise: Number, eta: Number) -> float:
    """The exact mean squared error of the plain step, `1 + s2 - 2 eta + eta^2 (1 + (1 + (1 + s2) d) / L)`."""
    return 1 + noise - 2 * eta + eta**2 * (1 + (1 + (1 + noise) * d) / examples)


def best_preconditioner(
    spectrum: Sequence[Number], examples: int, noise: Number
) -> Float[np.ndarray, " d"]:
    """The diagonal of the best W in `x_q^T W (1/L) sum_l y_l (x_l - mean x)` for x ~ N(0, Sigma), Sigma = diag(spectrum).

    `W = (Sigma + ((tr Sigma + s2 d) / L) I)^-1`, exact for any d and L; eta* I for Sigma = I. The paper says that anisotropic
    inputs give preconditioned descent; this matrix follows from the moments of a Wishart matrix.

    >>> best_preconditioner([1.0] * 5, 40, 0.1).round(3).tolist() == [0.879] * 5
    True
    """
    values = np.asarray(spectrum, float)
    return 1 / (values + (values.sum() + noise * len(values)) / examples)


def preconditioned_risk(spectrum: Sequence[Number], examples: int, noise: Number) -> float:
    """The mean squared error with the best preconditioner W: `s2 + (tr Sigma - (1 - 1/L) tr(Sigma W Sigma)) / d`."""
    values = np.asarray(spectrum, float)
    gain = (1 - 1 / examples) * (values**2 * best_preconditioner(spectrum, examples, noise)).sum()
    return float(noise + (values.sum() - gain) / len(values))


def task_risks(
    uses: Bool[np.ndarray, "tasks d"], examples: int, noise: Sequence[Number]
) -> tuple[float, float]:
    """Mean error over tasks of debiased descent: with its own matrix for each task, and with one matrix up to scale for all.

    Task k has labels `<beta_k, x> + noise`, beta_k ~ N(0, I) on the coordinates it uses. The heads of one output add up to
    sum_h mu_kh (1 + A_h) for small matrices A_h in the scores; the sum of mu_kh must vanish, so H heads give H - 1 independent
    matrices. Two heads give the tasks one matrix up to scale, and N + 1 heads already give each of N tasks its own, which is
    why heads can be shared. This count is ours; the paper reports the sharing.

    A diagonal W costs `|S| + s2 - 2 (1 - 1/L) sum_S w + sum_j v_j w_j^2`, `v = (1 - 1/L) (L [j in S] + |S| + s2) / L`; for the
    common matrix, W_k = m_k w is fitted by alternating between m and w.
    """
    use, extra = uses.astype(float), np.asarray(noise, float)
    share = 1 - 1 / examples
    size = use.sum(1) + extra
    square = share * (examples * use + size[:, None]) / examples
    own = share * use / square
    scale = np.ones(len(use))
    common = np.zeros(use.shape[1])
    for _ in range(200):
        common = share * (scale @ use) / (scale**2 @ square)
        scale = share * (use @ common) / (square @ common**2)
    risks = [
        size - 2 * share * (use * w).sum(1) + (square * w**2).sum(1)
        for w in (own, scale[:, None] * common)
    ]
    return float(risks[0].mean()), float(risks[1].mean())
