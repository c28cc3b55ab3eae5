"""What theory says of walks with unrelated steps and of vectors that add up concepts (`regard.labs.embedding_walk`)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

Number = float | int


def unrelated_displacement(
    lengths: Float[np.ndarray, "*walks steps"],
) -> Float[np.ndarray, "*walks steps"]:
    """How far a walk is from its start after each step when steps do not depend on one another: `sqrt(sum of squares)`.

    In d dimensions two random directions have a cosine of 0 +- 1/sqrt(d), so steps are nearly orthogonal.

    >>> unrelated_displacement(np.array([3.0, 4.0])).tolist()
    [3.0, 5.0]
    """
    return np.sqrt(np.cumsum(np.square(lengths), -1))


def unrelated_tortuosity(lengths: Float[np.ndarray, "*walks steps"]) -> np.ndarray:
    """Path over displacement of such a walk, `sqrt(n)` for n equal steps.

    >>> float(unrelated_tortuosity(np.ones(9)))
    3.0
    """
    return np.asarray(lengths.sum(-1) / unrelated_displacement(lengths)[..., -1])


def superposition_signal(
    weights: Float[np.ndarray, " words"],
    dimension: int,
    choice_words: int,
    *,
    sink: Number = 0.0,
) -> Float[np.ndarray, " words"]:
    """How many standard deviations the right choice scores above a wrong one, by the word of the context that it shares.

    Words are independent vectors of mean square 1 in d dimensions. The context is `sum_i w_i c_i`, a choice the mean of k
    words; one word of the right choice is c_i of the context. Given the context x, the score of a wrong choice has
    variance |x|^2 / (k d), so that

        signal_i = w_i sqrt(d / (k (sum_j w_j^2 + R^2 w^2)))

    with R the norm of one more vector that every text begins with (a sink), of the mean weight w: it costs as much as R^2 words.

    >>> superposition_signal(np.full(4, 0.25), 64, 4).tolist()
    [2.0, 2.0, 2.0, 2.0]
    >>> superposition_signal(np.full(4, 0.25), 64, 4, sink=math.sqrt(12)).tolist()
    [1.0, 1.0, 1.0, 1.0]
    """
    squares = float(np.square(weights).sum()) + float(sink) ** 2 * float(weights.mean()) ** 2
    return weights * math.sqrt(dimension / (choice_words * squares))


def choice_accuracy(signal: Float[np.ndarray, " words"], choices: int = 4) -> float:
    """The share of items whose right choice scores highest, the shared word being any of them with equal odds.

    `E Phi(z + signal)^(choices - 1)` over z ~ N(0, 1), by Gauss-Hermite quadrature.

    >>> round(choice_accuracy(np.array([0.0])), 6), round(choice_accuracy(np.array([9.0])), 6)
    (0.25, 1.0)
    """
    from scipy.special import ndtr

    nodes, odds = np.polynomial.hermite_e.hermegauss(64)
    above = ndtr(nodes[:, None] + np.asarray(signal)[None, :]) ** (choices - 1)
    return float((odds / odds.sum()) @ above.mean(1))


def rising_weights(words: int) -> Float[np.ndarray, " words"]:
    """The weights of w1mean: 1, 2, .. n over their sum.

    >>> rising_weights(3).round(3).tolist()
    [0.167, 0.333, 0.5]
    """
    weights = np.arange(1.0, words + 1)
    return weights / weights.sum()


def bag_nats(counts: Sequence[Sequence[int]] | np.ndarray, following: np.ndarray) -> np.ndarray:
    """Nats of the best forecast from counts alone: `-log((n_k + 1) / (n + K))` for symbols whose odds are uniform on the simplex.

    Args:
        counts: how often each of the K symbols has come, `[..., K]`.
        following: the symbol that comes.

    >>> bag_nats([[0, 0], [3, 0]], np.array([0, 0])).round(3).tolist()
    [0.693, 0.223]
    """
    table = np.asarray(counts, float)
    seen = np.take_along_axis(table, np.asarray(following)[..., None], -1)[..., 0]
    return -np.log((seen + 1) / (table.sum(-1) + table.shape[-1]))
