"""What theory says of linear attention on regression prompts; the equations are in `regard.labs.linear_icl`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

Matrix = Float[np.ndarray, "d d"]


def icl_gamma(covariance: Matrix, examples: int) -> Matrix:
    """`Gamma = (1 + 1/N) Lambda + (tr Lambda / N) I`.

    >>> icl_gamma(np.eye(2), 4)
    array([[1.75, 0.  ],
           [0.  , 1.75]])
    """
    trace = np.trace(covariance)
    return (1 + 1 / examples) * covariance + trace / examples * np.eye(len(covariance))


def icl_optimum(covariance: Matrix, examples: int) -> tuple[float, Matrix]:
    """The limit of gradient flow (theorem 1): `u = tr(Gamma^-2)^(1/4)` in the corner of W_PV, `U = Gamma^-1 / u` in W_KQ."""
    inverse = np.linalg.inv(icl_gamma(covariance, examples))
    u = float(np.trace(inverse @ inverse)) ** 0.25
    return u, inverse / u


def icl_largest_scale(covariance: Matrix, examples: int) -> float:
    """The start scale below which theorem 1 promises convergence: `sigma^2 ||Gamma||_op sqrt(d) < 2`."""
    gamma = icl_gamma(covariance, examples)
    return math.sqrt(2 / (np.linalg.norm(gamma, 2) * math.sqrt(len(gamma))))


def icl_velocity(
    u: Float[np.ndarray, "*runs"],
    matrix: Float[np.ndarray, "*runs d d"],
    covariance: Matrix,
    examples: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Minus the gradient of the population loss in the reduced variables u (corner of W_PV) and U (block of W_KQ).

    `l = 1/2 u^2 tr(Lambda U Gamma Lambda U^T) - u tr(Lambda^2 U^T) + 1/2 tr Lambda`, so
    `du/dt = tr(Lambda^2 U^T) - u tr(Lambda U Gamma Lambda U^T)` and `dU/dt = u Lambda^2 - u^2 Gamma Lambda U Lambda`.
    """
    square, kernel = covariance @ covariance, icl_gamma(covariance, examples) @ covariance
    pushed = kernel @ matrix @ covariance
    du = np.einsum("ij,...ij->...", square, matrix) - u * (pushed * matrix).sum((-2, -1))
    u_ = u[..., None, None]
    return np.asarray(du), u_ * square - u_**2 * pushed


def icl_loss(
    u: Float[np.ndarray, "*runs"],
    matrix: Float[np.ndarray, "*runs d d"],
    covariance: Matrix,
    examples: int,
) -> Float[np.ndarray, "*runs"]:
    """The population loss whose gradient `icl_velocity` follows."""
    kernel = icl_gamma(covariance, examples) @ covariance
    quadratic = ((kernel @ matrix @ covariance) * matrix).sum((-2, -1))
    linear = np.einsum("ij,...ij->...", covariance @ covariance, matrix)
    return np.asarray(0.5 * u**2 * quadratic - u * linear + 0.5 * np.trace(covariance))


def icl_risk(
    covariance: Matrix,
    examples: int,
    test_examples: int,
    noise: float = 0.0,
    test: Matrix | None = None,
) -> float:
    """The trained layer's risk on prompts of M examples with random tasks w ~ N(0, I) (theorems 2 and 3).

    With the prompt's covariance L (`test`; the training covariance by default), G = Gamma^-1 and label noise of variance s,

        R = s + (1/M) tr[((tr L + s) L + L^2) G L G] + tr[(G L - I)^T L (G L - I)].

    For L = Lambda the last term is O(1/N^2); for another L it stays.

    >>> round(icl_risk(np.diag([2.0, 1, 0.5, 0.25]), 20, 5), 3)
    2.327
    """
    inverse = np.linalg.inv(icl_gamma(covariance, examples))
    here = covariance if test is None else test
    spread = (np.trace(here) + noise) * here + here @ here
    bias = inverse @ here - np.eye(len(here))
    variance = np.trace(spread @ inverse @ here @ inverse) / test_examples
    return float(noise + variance + np.trace(bias.T @ here @ bias))


def icl_risk_of_labels(
    covariance: Matrix,
    examples: int,
    test_examples: int,
    best: float,
    coefficient: Float[np.ndarray, " d"],
    spread: Matrix,
) -> float:
    """The risk for one fixed law of labels, linear or not (theorem 2).

    With `best` = min_w E (y - <w, x>)^2, a = Lambda^-1 E[x y] and Sigma = Cov(x y),

        R = best + (1/M) tr(Sigma Gamma^-2 Lambda) + (1/N^2) a^T Gamma^-2 Lambda (Lambda + tr(Lambda) I)^2 a.
    """
    inverse = np.linalg.inv(icl_gamma(covariance, examples))
    twice = inverse @ inverse @ covariance
    shifted = covariance + np.trace(covariance) * np.eye(len(covariance))
    bias = coefficient @ twice @ shifted @ shifted @ coefficient / examples**2
    return float(best + np.trace(spread @ twice) / test_examples + bias)


def icl_random_covariance_limit(
    moments: Sequence[float | int], dimension: int, examples: int
) -> float:
    """What u U converges to, times I, when each prompt draws its own diagonal covariance with i.i.d. entries (theorem 4).

    `P = (E[Gamma Lambda^2])^-1 E[Lambda^2] = m2 / ((1 + 1/N) m3 + (m3 + (d - 1) m1 m2) / N)`, m1 .. m3 the moments of an entry.

    >>> icl_random_covariance_limit((1, 2, 6), 3, 40)
    0.3125
    """
    one, two, three = moments
    return two / ((1 + 1 / examples) * three + (three + (dimension - 1) * one * two) / examples)


def icl_random_covariance_risk(
    moments: Sequence[float | int], dimension: int, examples: int, test_examples: float | int
) -> float:
    """The risk after training on random covariances, on further ones; it does not vanish as N and M grow.

    `R = d [P^2 (m3 + (2 m3 + (d - 1) m1 m2) / M) - 2 P m2 + m1]`; for exponential entries it tends to d / 3.

    >>> round(icl_random_covariance_risk((1, 2, 6), 3, 10**9, math.inf), 6)
    1.0
    """
    one, two, three = moments
    p = icl_random_covariance_limit(moments, dimension, examples)
    second = three + (2 * three + (dimension - 1) * one * two) / test_examples
    return dimension * (p**2 * second - 2 * p * two + one)
