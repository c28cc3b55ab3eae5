"""Learning that is gated by events: an update only where the error is larger than usual.

A linear map y = w.x + 0.3 N(0, 1) of d = 20 inputs changes every 500 steps to a new w ~ N(0, 4 / d). A learner follows it by

    w^ <- w^ + eta G (y - w^.x) x,

with G = 1 at every step, or where the squared error exceeds its running mean by k running standard deviations (decay 0.99), or at
random as often as that.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

SIZE, NOISE, RATE, CHANGE, DECAY = 20, 0.3, 0.02, 500, 0.99


@dataclass(frozen=True, slots=True)
class Stream:
    """Inputs, noisy targets, and the targets without noise."""

    inputs: Float[np.ndarray, "runs steps d"]
    targets: Float[np.ndarray, "runs steps"]
    clean: Float[np.ndarray, "runs steps"]


def make_stream(
    runs: int, steps: int, seed: int = 0, *, size: int = SIZE, change: int = CHANGE
) -> Stream:
    """A map that changes every `change` steps, for each run."""
    rng = np.random.default_rng(seed)
    maps = rng.normal(0, 2 / np.sqrt(size), (runs, -(-steps // change), size))
    inputs = rng.standard_normal((runs, steps, size))
    clean = np.einsum("rtd,rtd->rt", inputs, maps.repeat(change, 1)[:, :steps])
    return Stream(inputs, clean + NOISE * rng.standard_normal(clean.shape), clean)


@dataclass(frozen=True, slots=True)
class Learning:
    """Squared error of the prediction without the noise of the target, and where the learner updated."""

    errors: Float[np.ndarray, "runs steps"]
    updates: Bool[np.ndarray, "runs steps"]


def learn_always(stream: Stream, rate: float | int = RATE) -> Learning:
    """An update at every step."""
    return _learn(stream, np.ones(stream.targets.shape, bool), rate)


def learn_at_random(
    stream: Stream, share: Float[np.ndarray, "runs"], seed: int = 0, rate: float | int = RATE
) -> Learning:
    """Updates at random steps, a share of them for each run."""
    drawn = np.random.default_rng(seed).random(stream.targets.shape)
    return _learn(stream, drawn < share[:, None], rate)


def event_gated_learning(
    stream: Stream,
    threshold: float | int = 0.0,
    rate: float | int = RATE,
    decay: float | int = DECAY,
) -> Learning:
    """Updates where the squared error exceeds its running mean by `threshold` running standard deviations.

    The running moments begin with the first error and take in each error after it was judged.
    """
    runs, steps, size = stream.inputs.shape
    weight = np.zeros((runs, size))
    mean = stream.targets[:, 0] ** 2
    second = mean**2
    errors, updates = np.zeros((runs, steps)), np.zeros((runs, steps), bool)
    for t in range(steps):
        x = stream.inputs[:, t]
        guess = (weight * x).sum(1)
        miss = stream.targets[:, t] - guess
        squared = miss**2
        spread = np.sqrt(np.maximum(second - mean**2, 0))
        opened = squared > mean + threshold * spread
        weight += rate * (opened * miss)[:, None] * x
        mean = decay * mean + (1 - decay) * squared
        second = decay * second + (1 - decay) * squared**2
        errors[:, t], updates[:, t] = (stream.clean[:, t] - guess) ** 2, opened
    return Learning(errors, updates)


def _learn(stream: Stream, gate: Bool[np.ndarray, "runs steps"], rate: float | int) -> Learning:
    runs, steps, size = stream.inputs.shape
    weight, errors = np.zeros((runs, size)), np.zeros((runs, steps))
    for t in range(steps):
        x = stream.inputs[:, t]
        guess = (weight * x).sum(1)
        miss = stream.targets[:, t] - guess
        weight += rate * (gate[:, t] * miss)[:, None] * x
        errors[:, t] = (stream.clean[:, t] - guess) ** 2
    return Learning(errors, gate)
