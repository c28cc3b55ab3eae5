"""Latching attention: a read-out of stored keys that holds on to one key, tires of it, and moves on.

    a = softmax(beta (K x - g h)),   x <- (1 - eta) x + eta K^T a + sigma xi / sqrt(d),   h <- h + (a - h) / tau,

with keys K [M, d] of norm one, the state x, a fatigue h per key and xi ~ N(0, I). With g = 0 this is softmax retrieval, one
update
of a modern Hopfield network, whose energy never rises:

    E(x) = ||x||^2 / 2 - 1/beta log sum_m exp(beta K_m . x).

A key is on while the largest entry of a is above `ON`; what is on one after the other is a sequence of tokens. Nothing in the
equations prefers one successor to another but the overlap of the keys: there are no asymmetric weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

ON = 0.7
"""Attention above which a key is on."""


def latching_attention(
    keys: Float[Tensor, "*runs keys d"],
    state: Float[Tensor, "*runs d"],
    fatigue: Float[Tensor, "*runs keys"],
    beta: float | int | Tensor = 12.0,
    gain: float | int | Tensor = 1.0,
    tau: float | int | Tensor = 30.0,
    step: float | int = 0.3,
    noise: Float[Tensor, "*runs d"] | None = None,
) -> tuple[Float[Tensor, "*runs keys"], Float[Tensor, "*runs d"], Float[Tensor, "*runs keys"]]:
    """One update; the attention a, the next state x and the next fatigue h.

    Args:
        keys: K, rows of norm one.
        state: x.
        fatigue: h, which follows a as a leaky mean with time constant `tau`, and so stays within 0 and 1.
        beta: inverse temperature.
        gain: g, how much fatigue counts; a tensor with one value a run has the shape `[*runs, 1]`, like `beta` and `tau`.
        tau: time constant of fatigue, in steps.
        step: eta, how far the state moves towards the read-out.
        noise: added to the state.

    Cost: O(M d) time a run.

    >>> keys = torch.eye(3)
    >>> a, x, h = latching_attention(keys, keys[0], torch.zeros(3))
    >>> int(a.argmax()), bool(h[0] > 0)
    (0, True)
    """
    match = (keys @ state.unsqueeze(-1)).squeeze(-1)
    attention = (beta * (match - gain * fatigue)).softmax(-1)
    read = (keys.mT @ attention.unsqueeze(-1)).squeeze(-1)
    moved = (1 - step) * state + step * read
    if noise is not None:
        moved = moved + noise
    return attention, moved, fatigue + (attention - fatigue) / tau


def retrieval_energy(
    keys: Float[Tensor, "*runs keys d"], state: Float[Tensor, "*runs d"], beta: float | int
) -> Float[Tensor, "*runs"]:
    """E(x), which an update without fatigue and noise does not raise."""
    match = (keys @ state.unsqueeze(-1)).squeeze(-1)
    return state.square().sum(-1) / 2 - (beta * match).logsumexp(-1) / beta


def grouped_keys(
    runs: int,
    generator: torch.Generator,
    groups: int = 20,
    each: int = 1,
    size: int = 64,
    correlation: float | int = 0.0,
) -> Float[Tensor, "runs keys d"]:
    """`K_m = normalise(sqrt(1 - c) N(0, I) + sqrt(c) B_group(m))`: keys of one group overlap by about c.

    >>> grouped_keys(2, torch.Generator().manual_seed(0), groups=5, each=4).shape
    torch.Size([2, 20, 64])
    """
    kind = {"generator": generator, "dtype": torch.float64}
    own = torch.randn(runs, groups, each, size, **kind)
    shared = torch.randn(runs, groups, 1, size, **kind)
    keys = (1 - correlation) ** 0.5 * own + correlation**0.5 * shared
    return torch.nn.functional.normalize(keys.flatten(1, 2), dim=-1)


@dataclass(frozen=True, slots=True)
class Walk:
    """Which key was on at every step of every run (-1 when none was), and how strongly the strongest."""

    on: Int[np.ndarray, "runs steps"]
    peak: Float[np.ndarray, "runs steps"]

    @property
    def share(self) -> Float[np.ndarray, "runs"]:
        """Share of the time in which some key was on."""
        return (self.on >= 0).mean(1)

    @property
    def distinct(self) -> Int[np.ndarray, "runs"]:
        """How many different keys were on at some time."""
        return np.array([len(set(row[row >= 0].tolist())) for row in self.on])

    @property
    def dwell(self) -> Float[np.ndarray, "runs"]:
        """Mean length of a run of one key, in steps; 0 when none was ever on."""
        return np.array(
            [np.mean(lengths) if lengths else 0.0 for lengths in map(_lengths, self.on)]
        )

    def tokens(self, run: int) -> list[int]:
        """The keys of a run in the order in which they came on, repeats of one key counted once."""
        row = self.on[run][self.on[run] >= 0]
        return [int(key) for i, key in enumerate(row) if i == 0 or key != row[i - 1]]

    def staying(self, each: int) -> Float[np.ndarray, "runs"]:
        """Share of transitions that stay within a group of `each` keys; NaN without transitions."""
        found = []
        for run in range(len(self.on)):
            groups = np.array(self.tokens(run)) // each
            found.append(np.mean(groups[1:] == groups[:-1]) if len(groups) > 1 else np.nan)
        return np.array(found, float)


def walk(
    keys: Float[Tensor, "runs keys d"],
    steps: int,
    generator: torch.Generator,
    *,
    gain: float | int | Float[Tensor, "runs"] = 1.0,
    beta: float | int | Float[Tensor, "runs"] = 12.0,
    tau: float | int | Float[Tensor, "runs"] = 30.0,
    sigma: float | int | Float[Tensor, "runs"] = 0.02,
    step: float | int = 0.3,
) -> Walk:
    """Many runs at once from x = K_1, h = 0, each with its own gain, beta, tau and noise where these are tensors."""
    runs, count, size = keys.shape
    column = lambda value: torch.as_tensor(value, dtype=keys.dtype).reshape(-1, 1)  # noqa: E731
    gain, beta, tau, sigma = map(column, (gain, beta, tau, sigma))
    state, fatigue = keys[:, 0].clone(), torch.zeros(runs, count, dtype=keys.dtype)
    on, peak = [], []
    for _ in range(steps):
        drawn = torch.randn(runs, size, generator=generator, dtype=keys.dtype)
        noise = sigma * drawn / size**0.5
        attention, state, fatigue = latching_attention(
            keys, state, fatigue, beta, gain, tau, step, noise
        )
        top, which = attention.max(-1)
        on.append(torch.where(top > ON, which, -1))
        peak.append(top)
    return Walk(torch.stack(on, 1).numpy(), torch.stack(peak, 1).numpy())


def _lengths(row: np.ndarray) -> list[int]:
    """Lengths of the runs of each key; a stretch without any key ends a run."""
    cuts = np.flatnonzero(np.diff(row)) + 1
    parts = np.split(row, cuts)
    return [len(part) for part in parts if part[0] >= 0]
