"""The simplified model of one ordinary query and its gradient flow; the equations are in `regard.labs.bigram_backcopy`."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from regard._errors import InputError

Number = float | int
Vector = Float[np.ndarray, " symbols"]


def _check(p: np.ndarray, xi: np.ndarray, others: Number) -> None:
    if p.shape != xi.shape or not np.isclose(p.sum(), 1) or (p <= 0).any() or others <= 0:
        raise InputError(
            f"p and xi need one entry a symbol, p positive with sum 1, and others > 0; got shapes {p.shape} and {xi.shape}, "
            f"sum {p.sum():g}, others {others}"
        )


def _predicted(alpha: Number, beta: Vector, p: Vector, xi: Vector, others: Number) -> Vector:
    """softmax(log p + o)."""
    output = (beta + np.exp(-alpha) * xi) / (1 + others * np.exp(-alpha))
    logits = np.log(p) + output
    grown = np.exp(logits - logits.max())
    return grown / grown.sum()


def extreme_loss(alpha: Number, beta: Vector, p: Vector, xi: Vector, others: Number) -> float:
    """KL(p || softmax(log p + o)) with `xi` the summed values of the `others` = W ordinary tokens in sight."""
    return float((p * np.log(p / _predicted(alpha, beta, p, xi, others))).sum())


def extreme_velocity(
    alpha: Number, beta: Vector, p: Vector, xi: Vector, others: Number
) -> tuple[float, np.ndarray]:
    """Minus the gradient of `extreme_loss` in alpha and beta, with s = e^alpha / (e^alpha + W) and q the prediction:

    dalpha/dt = <p - q, W beta - xi> e^alpha / (e^alpha + W)^2,    dbeta/dt = s (p - q).
    """
    wrong = p - _predicted(alpha, beta, p, xi, others)
    share = 1 / (1 + others * np.exp(-alpha))
    slope = share**2 * np.exp(-alpha) * (others * beta - xi)
    return float(wrong @ slope), share * wrong


def sink_logit_ode(
    p: Vector,
    xi: Vector,
    others: Number,
    times: Float[np.ndarray, " times"],
    *,
    step: Number = 0.05,
) -> Float[np.ndarray, " times"]:
    """alpha at `times` while beta is held at a constant vector, from alpha = 0, by Euler's method with `step`.

    Cost: O(times[-1] / step x symbols).
    """
    _check(p, xi, others)
    marks = np.rint(np.asarray(times) / step).astype(int)
    if (np.diff(marks) < 0).any() or marks[0] < 0:
        raise InputError.of("times", given=times, expected="times of at least 0 in order")
    log_p, alpha, done, found = np.log(p), 0.0, 0, []
    for mark in marks:
        for _ in range(mark - done):
            small = np.exp(-alpha)
            share = 1 / (1 + others * small)
            # values are far below 700, so that nothing overflows without a shift
            grown = np.exp(log_p + share * small * xi)
            alpha += step * share * share * small * float((grown / grown.sum() - p) @ xi)
        done = mark
        found.append(alpha)
    return np.array(found)


def sink_logit(
    p: Vector, xi: Vector, times: Float[np.ndarray, " times"]
) -> Float[np.ndarray, " times"]:
    """What alpha tends to while beta is constant: 1/2 log(2 Var_p(xi) t), from dalpha/dt = Var_p(xi) e^(-2 alpha).

    >>> float(sink_logit(np.array([0.5, 0.5]), np.array([1.0, -1.0]), np.array([0.5]))[0])
    0.0
    """
    spread = float(p @ xi**2 - (p @ xi) ** 2)
    return 0.5 * np.log(2 * spread * np.asarray(times))


def drain_limit(alpha: Number, begin: Vector, xi: Vector) -> Vector:
    """What beta tends to while alpha is held: c 1 - e^-alpha xi; c keeps the sum of `begin`, which the flow conserves.

    >>> drain_limit(0.0, np.zeros(2), np.array([1.0, -1.0])).tolist()
    [-1.0, 1.0]
    """
    push = np.exp(-alpha) * xi
    return begin.mean() + push.mean() - push


def drain_rate(alpha: Number, p: Vector, others: Number) -> float:
    """The rate at which beta reaches it at last: s^2 times the smallest positive eigenvalue of diag(p) - p p^T."""
    share = 1 / (1 + others * np.exp(-alpha))
    return float(share**2 * np.linalg.eigvalsh(np.diag(p) - np.outer(p, p))[1])
