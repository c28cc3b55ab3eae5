"""The laboratory: each mechanism with the numbers by which it is told from a network without it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from regard.labs.brain_basis import latching
from regard.labs.brain_basis.networks import learning_part, networks_part
from regard.labs.brain_basis.rhythms import SPIKING, phases_part, spikes_part
from regard.labs.brain_basis.states import latching_part, sequences_part
from regard.labs.results import Result
from regard.labs.settings import Lab, setting

PARTS = (latching_part, sequences_part, phases_part, spikes_part, networks_part, learning_part)


@dataclass(frozen=True, kw_only=True)
class BrainBasis(Lab):
    """The laboratory: latching attention, phase gates, a phase code, a sparse network, and learning by events."""

    name: ClassVar[str] = "brain-basis"
    steps: int = setting(4000, "latching: steps of a walk", low=100, high=1_000_000)
    seeds: int = setting(5, "runs of each setting", low=2, high=1024)
    gains: tuple[float, ...] = setting(
        (0.0, 0.5, 1.0, 2.0), "latching: g, how much fatigue counts", low=0, high=100, most=16
    )
    correlations: tuple[float, ...] = setting(
        (0.0, 0.2, 0.35, 0.5), "latching: overlap of the keys of a group", low=0, below=1, most=16
    )
    kappas: tuple[float, ...] = setting(
        (0.0, 0.5, 1.0, 2.0, 4.0), "phase gate: kappa", low=0, high=100, most=16
    )
    trials: int = setting(400, "phase gate: pairs of senders", low=10, high=100_000)
    drives: tuple[float, ...] = setting(
        tuple(SPIKING), "phase code: constant inputs", low=0, high=10, least=2, most=64
    )
    cycles: int = setting(30, "phase code: cycles of the rhythm", low=4, high=10_000)
    nodes: int = setting(500, "network: nodes", low=100, high=5000)
    networks: int = setting(3, "network: how many are drawn", low=2, high=100)
    shuffles: int = setting(2, "network: degree-preserving shuffles of each", low=1, high=100)
    updates: int = setting(6000, "gated learning: steps", low=500, high=1_000_000)
    thresholds: tuple[float, ...] = setting(
        (0.0, 1.0), "gated learning: k, standard deviations", low=-3, high=10, most=16
    )
    seed: int = setting(0, "first of the random seeds", low=0, high=2**31)

    def run(self) -> Result:
        return Result.of(self, *(part(self) for part in PARTS))

    def regimes(self) -> dict[str, latching.Walk]:
        """Walks by setting: each gain, a low temperature, and the second gain without noise."""
        settings = {f"g = {gain:g}": (gain, 12.0, 0.02) for gain in self.gains}
        settings |= {"beta = 3": (1.0, 3.0, 0.02), "g = 0.5, no noise": (0.5, 12.0, 0.0)}
        generator = torch.Generator().manual_seed(self.seed)
        keys = latching.grouped_keys(self.seeds, generator).repeat(len(settings), 1, 1)
        gain, beta, sigma = (
            torch.tensor(list(settings.values()), dtype=keys.dtype)
            .repeat_interleave(self.seeds, 0)
            .T
        )
        walked = latching.walk(keys, self.steps, generator, gain=gain, beta=beta, sigma=sigma)
        rows = lambda i: slice(i * self.seeds, (i + 1) * self.seeds)  # noqa: E731
        return {
            name: latching.Walk(walked.on[rows(i)], walked.peak[rows(i)])
            for i, name in enumerate(settings)
        }
