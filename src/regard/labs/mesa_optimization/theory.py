"""What theory says of linear causal attention on linear sequences; the equations are in `regard.labs.mesa_optimization`."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Real

from regard._errors import InputError

Number = float | int
Runs = Float[np.ndarray, "*runs"]
STARTS = ("gaussian", "sparse", "ones", "signs")


@dataclass(frozen=True, slots=True)
class Moments:
    """Moments of a coordinate of x_1.

    Attributes:
        second: E x_1j^2.
        fourth: kappa1 = E x_1j^4.
        sixth: kappa2 = E x_1j^6.
        cross: kappa3 = sum over r != j of E x_1j^2 x_1r^4.
        support: probability that the coordinate is not 0.
    """

    second: Number
    fourth: Number
    sixth: Number
    cross: Number
    support: Number = 1.0


def start_moments(start: str, d: int, scale: Number = 1.0, share: Number = 1.0) -> Moments:
    """The moments of a law of x_1: "gaussian" N(0, scale^2 I); "sparse" one random coordinate +-scale; "ones" all scale;
    "signs" each coordinate +-scale with probability `share`, else 0.

    >>> start_moments("gaussian", 5)
    Moments(second=1.0, fourth=3.0, sixth=15.0, cross=12.0, support=1.0)
    """
    two, four, six = (float(scale) ** power for power in (2, 4, 6))
    if start == "gaussian":
        return Moments(two, 3 * four, 15 * six, 3 * (d - 1) * six)
    if start == "sparse":
        return Moments(two / d, four / d, six / d, 0.0, 1 / d)
    if start == "ones":
        return Moments(two, four, six, (d - 1) * six)
    if start == "signs":
        return Moments(share * two, share * four, share * six, (d - 1) * share**2 * six, share)
    raise InputError.of("start", given=start, expected=f"one of {', '.join(STARTS)}")


def inverse_mean(length: int) -> float:
    """`sum_{t=2}^{T-1} 1 / (t - 1) / (T - 2)`, the mean over trained positions of one over the transitions seen.

    >>> round(inverse_mean(20), 4)
    0.1942
    """
    return float((1 / np.arange(1, length - 1)).mean())


def mesa_step_size(moments: Moments, length: int) -> float:
    """The limit of a b: `kappa1 / (kappa2 + kappa3 / (T - 2) sum 1 / (t - 1))`.

    >>> round(mesa_step_size(start_moments("gaussian", 5), 20), 4)
    0.1731
    >>> mesa_step_size(start_moments("sparse", 5, 2), 20)
    0.25
    """
    return float(moments.fourth / (moments.sixth + moments.cross * inverse_mean(length)))


def curvature(moments: Moments, length: int) -> float:
    """`(T - 2) kappa2 + kappa3 sum 1 / (t - 1)`: the second derivative of a coordinate's loss in a b."""
    return (length - 2) * float(moments.sixth + moments.cross * inverse_mean(length))


def diagonal_loss(a: Runs, b: Runs, moments: Moments, d: int, length: int) -> Runs:
    """The population loss of the diagonal form, exact whatever the odd moments.

    `d sum_t [(a b)^2 / 2 (kappa2 + kappa3 / (t - 1)) - a b kappa1 + E x_1j^2 / 2]`: different eigenvalues have independent
    phases, so a product of coordinate j with another one counts only when the phases cancel step by step.
    """
    step = a * b
    positions = length - 2
    square = curvature(moments, length) * step**2 / 2
    return np.asarray(d * (square + positions * (moments.second / 2 - moments.fourth * step)))


def diagonal_velocity(a: Runs, b: Runs, moments: Moments, length: int) -> tuple[Runs, Runs]:
    """Minus the gradient of the loss in one of the d entries a, b: `da/dt = -b f`, `db/dt = -a f`,

    `f = a b ((T - 2) kappa2 + kappa3 sum 1 / (t - 1)) - (T - 2) kappa1`, so that a^2 - b^2 is conserved.
    """
    pull = a * b * curvature(moments, length) - (length - 2) * moments.fourth
    return np.asarray(-b * pull), np.asarray(-a * pull)


def balanced_limit(a: Number, b: Number, step: Number) -> tuple[float, float]:
    """The limits of a and b alone: their product is `step`, and a^2 - b^2 is as at the start (both positive).

    >>> balanced_limit(2.0, 2.0, 0.25)
    (0.5, 0.5)
    """
    gap = float(a) ** 2 - float(b) ** 2
    root = math.hypot(gap, 2 * step)
    return math.sqrt((gap + root) / 2), math.sqrt((root - gap) / 2)


def position_error(
    step: Number, moments: Moments, positions: Real[np.ndarray, " positions"]
) -> Float[np.ndarray, " positions"]:
    """`E |y_t - x_{t+1}|^2 / E |x_{t+1}|^2` at t = `positions` for a step of size a b = `step`.

    `(step^2 (kappa2 + kappa3 / (t - 1)) - 2 step kappa1) / E x_1j^2 + 1`: for long contexts it is 0 exactly when
    step x_1j^2 = 1 on the support.
    """
    square = moments.sixth + moments.cross / (positions - 1)
    return np.asarray((step**2 * square - 2 * step * moments.fourth) / moments.second + 1)
