"""Classes of tokens, the exact dynamics of attention and decoder, and what theory says of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from regard.labs.flows import State, descend, flow


@dataclass(frozen=True, slots=True)
class Classes:
    """What each class (one next token) is made of.

    Attributes:
        probability: `[classes, tokens]`, P(l | n).
        last: `[classes]`, the row of Z of each class's last token.
        label: `[classes]`, its next token.
        common: `[tokens]`, whether several classes use a token.
    """

    probability: Float[np.ndarray, "classes tokens"]
    last: Int[np.ndarray, " classes"]
    label: Int[np.ndarray, " classes"]
    common: Bool[np.ndarray, " tokens"]

    @property
    def rows(self) -> int:
        """How many last tokens there are."""
        return int(self.last.max()) + 1

    @property
    def distinct(self) -> Bool[np.ndarray, "classes tokens"]:
        """Tokens of each class that no other uses."""
        return (self.probability > 0) & ~self.common


def make_classes(
    last: int, each: int, common: Sequence[float], distinct: Sequence[float]
) -> Classes:
    """`last` last tokens with `each` next tokens, all classes of one shape: weights of common and of their own distinct tokens.

    The vocabulary is: common tokens, distinct tokens class by class, last tokens, next tokens.

    >>> make_classes(2, 1, [1.0], [1.0, 2.0]).probability
    array([[0.25, 0.25, 0.5 , 0.  , 0.  , 0.  , 0.  , 0.  , 0.  ],
           [0.25, 0.  , 0.  , 0.25, 0.5 , 0.  , 0.  , 0.  , 0.  ]])
    """
    count, shared, own = last * each, len(common), len(distinct)
    size = shared + count * own + last + count
    weights = np.zeros((count, size))
    weights[:, :shared] = common
    for n in range(count):
        weights[n, shared + n * own : shared + (n + 1) * own] = distinct
    probability = weights / weights.sum(1, keepdims=True)
    used = (probability > 0).sum(0)
    return Classes(probability, np.arange(count) // each, size - count + np.arange(count), used > 1)


def token_mass(
    logits: Float[np.ndarray, "*runs tokens"], probability: Float[np.ndarray, "*#runs tokens"]
) -> Float[np.ndarray, "*runs tokens"]:
    """The long-sequence limit `c_l = P(l) exp(z_l) / sum`."""
    mass = probability * np.exp(logits)
    return mass / mass.sum(-1, keepdims=True)


def entropy(mass: Float[np.ndarray, "*runs tokens"]) -> Float[np.ndarray, "*runs"]:
    """Entropy of c in nats."""
    return -np.where(mass > 0, mass * np.log(np.where(mass > 0, mass, 1)), 0).sum(-1)


@dataclass(frozen=True, slots=True)
class Motion:
    """The state's velocity, and what the theory needs of it; leading axes are runs.

    Attributes:
        decoder, attention: of Y and of Z, `[*runs, tokens, tokens]` and `[*runs, rows, tokens]`.
        classes: the part of each class in `attention`, `[*runs, classes, tokens]`.
        unit: f of each class.
        residual: 1 - alpha_n of each class.
    """

    decoder: np.ndarray
    attention: np.ndarray
    classes: np.ndarray
    unit: np.ndarray
    residual: np.ndarray


def motion(
    decoder: Float[np.ndarray, "*runs tokens tokens"],
    attention: Float[np.ndarray, "*runs rows tokens"],
    classes: Classes,
    rate_decoder: Float[np.ndarray, "*runs"],
    rate_attention: Float[np.ndarray, "*runs"],
) -> Motion:
    """Gradient ascent on the mean log-likelihood over classes, in the long-sequence limit.

    Cost: O(classes x tokens^2) a run.
    """
    count = len(classes.last)
    mass = token_mass(attention[..., classes.last, :], classes.probability)
    unit = mass / np.linalg.norm(mass, axis=-1, keepdims=True)
    logits = unit @ decoder.swapaxes(-1, -2)
    logits -= logits.max(-1, keepdims=True)
    alpha = np.exp(logits)
    alpha /= alpha.sum(-1, keepdims=True)
    error = -alpha
    error[..., np.arange(count), classes.label] += 1
    back = error @ decoder
    pull = unit * (back - unit * (unit * back).sum(-1, keepdims=True)) / count
    member = (classes.last == np.arange(classes.rows)[:, None]).astype(float)
    eta_y, eta_z = rate_decoder[..., None, None], rate_attention[..., None, None]
    return Motion(
        eta_y * (error.swapaxes(-1, -2) @ unit) / count,
        eta_z * (member @ pull),
        eta_z * pull,
        unit,
        error[..., np.arange(count), classes.label],
    )


def growth(step: Motion, classes: Classes) -> Float[np.ndarray, "*runs classes"]:
    """`eta_Z xi_n`: the speed of the distinct tokens, `sum_l dz_l/dt / sum_l f_l^2` over the class's distinct tokens."""
    own = classes.distinct
    return (step.classes * own).sum(-1) / (step.unit**2 * own).sum(-1)


def decoder_time(classes: int, tokens: int, rate_decoder: float) -> tuple[float, float]:
    """`t0' = K ln M / eta_Y` and `t0 = 2 K ln M / eta_Y`: scanning ends, snapping has begun.

    >>> [round(t, 1) for t in decoder_time(20, 141, 2.0)]
    [49.5, 99.0]
    """
    first = classes * math.log(tokens) / rate_decoder
    return first, 2 * first


def late_exponent(time: float, classes: int, tokens: int, rate_decoder: float) -> float:
    """`d ln B / d ln t = 2 / ln(M eta_Y t / K)` while B is small and the regime is snapping (B is then proportional to ln^2)."""
    return 2 / math.log(tokens * rate_decoder * time / classes)


def early_growth(
    time: Float[np.ndarray, " times"], classes: Classes, rate_decoder: float, rate_attention: float
) -> Float[np.ndarray, " times"]:
    """B while the decoder is still linear, without a free constant, for classes of one shape and one common token:

    `B = eta_Y eta_Z (K - 1) f_c(0)^2 t^2 / (2 K^2 M)`. It is the scanning law's t^2 with its constant computed at Z = 0.
    """
    count, tokens = classes.probability.shape
    unit = classes.probability[0] / np.linalg.norm(classes.probability[0])
    share = float((unit[classes.common] ** 2).sum())
    return rate_decoder * rate_attention * (count - 1) * share * time**2 / (2 * count**2 * tokens)


@dataclass(frozen=True, slots=True)
class Course:
    """A run of the long-sequence model at logged times; the first axis is time, further ones are runs.

    Attributes:
        times: `[times]`.
        attention: Z, `[times, *runs, rows, tokens]`.
        drive: B of each class, `[times, *runs, classes]`.
        residual: 1 - alpha of each class, `[times, *runs, classes]`.
        rising: whether every distinct token rises and the common ones' sum falls, `[times, *runs]`, from the first step on.
    """

    times: np.ndarray
    attention: np.ndarray
    drive: np.ndarray
    residual: np.ndarray
    rising: np.ndarray


def follow(
    classes: Classes,
    rate_decoder: Float[np.ndarray, "*runs"],
    rate_attention: Float[np.ndarray, "*runs"],
    times: Float[np.ndarray, " times"],
    *,
    step: float | None = None,
) -> Course:
    """The long-sequence model from Y = Z = 0: by SciPy's solver, or by gradient descent with step size `step`."""
    count, tokens = classes.probability.shape
    runs = rate_decoder.shape
    begin: State = (
        np.zeros((*runs, tokens, tokens)),
        np.zeros((*runs, classes.rows, tokens)),
        np.zeros((*runs, count)),
    )

    def velocity(decoder: np.ndarray, attention: np.ndarray, drive: np.ndarray) -> State:
        found = motion(decoder, attention, classes, rate_decoder, rate_attention)
        return found.decoder, found.attention, growth(found, classes)

    if step is None:
        decoder, attention, drive = flow(velocity, begin, times, accuracy=1e-7)
    else:
        decoder, attention, drive = descend(velocity, begin, times, step)
    residual, rising = [], []
    for y, z in zip(decoder, attention, strict=True):
        found = motion(y, z, classes, rate_decoder, rate_attention)
        residual.append(found.residual)
        own = np.where(classes.distinct, found.classes, np.inf).min((-2, -1)) > 0
        rising.append(own & ((found.classes * classes.common).sum(-1).max(-1) < 0))
    return Course(times, attention, drive, np.stack(residual), np.stack(rising))


def relative_growth(
    course: Course, classes: Classes, n: int = 0
) -> Float[np.ndarray, "times *runs others"]:
    """ln chi of class n's most frequent distinct token against each of its other distinct tokens."""
    weights = np.where(classes.distinct[n], classes.probability[n], 0)
    order = np.flatnonzero(weights)
    top = order[weights[order].argmax()]
    others = [token for token in order if weights[token] < weights[top]]
    z = course.attention[..., classes.last[n], :]
    first = (weights[top] / weights[others]) ** 2
    now = first * np.exp(2 * (z[..., [top]] - z[..., others]))
    return np.log((now - 1) / (first - 1))


def local_exponent(
    times: Float[np.ndarray, " times"], values: Float[np.ndarray, "times *runs"]
) -> Float[np.ndarray, "times *runs"]:
    """`d ln value / d ln t` by central differences."""
    return np.gradient(np.log(values), np.log(times), axis=0)


def crossing(times: Float[np.ndarray, " times"], exponent: Float[np.ndarray, " times"]) -> float:
    """The time from which on growth is slower than linear: where the exponent falls through 1 (NaN when it does not)."""
    below = np.flatnonzero((exponent[1:] < 1) & (exponent[:-1] >= 1))
    if not len(below):
        return math.nan
    i = int(below[0])
    share = (exponent[i] - 1) / (exponent[i] - exponent[i + 1])
    return float(np.exp(np.log(times[i]) + share * np.log(times[i + 1] / times[i])))
