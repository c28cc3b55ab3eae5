"""The laboratory: capacity, chains, heads and conditioning, each beside its closed form."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from regard._errors import InputError
from regard.labs.pavlovian import capacity, theory
from regard.labs.pavlovian.comparison import (
    closest,
    conditioning_checks,
    conditioning_series,
    mean_of,
    operator_checks,
)
from regard.labs.pavlovian.rules import Decaying, Hebbian, Oja, RescorlaWagner, Rule
from regard.labs.results import Check, Result, Series
from regard.labs.settings import Lab, setting


@dataclass(frozen=True, kw_only=True)
class Pavlovian(Lab):
    """The laboratory: how many associations attention holds, and which conditioning phenomena its learning rule has."""

    name: ClassVar[str] = "pavlovian"
    dimension: int = setting(64, "d_k of the capacity curve", low=4, high=1024)
    items: tuple[int, ...] = setting(
        (4, 16, 64, 128), "associations n of the capacity curve", low=2, high=4096, most=32
    )
    overload_dimensions: tuple[int, ...] = setting(
        (16, 64, 256), "d_k of the worst case", low=4, high=4096, least=2, most=16
    )
    overload_draws: int = setting(100, "draws for the worst case", low=2, high=100_000)
    chain_items: tuple[int, ...] = setting(
        (32,), "associations n of each memory of a chain", low=2, high=2048, most=8
    )
    chain_dimension: int = setting(128, "d of a chain", low=4, high=1024)
    depth: int = setting(5, "memories D of a chain", low=1, high=32)
    heads: tuple[int, ...] = setting((1, 2, 4, 8), "redundant heads R", low=1, high=64, most=16)
    draws: int = setting(20, "draws of every other random code", low=2, high=10_000)
    rate: float = setting(0.1, "b of the learning rules", above=0, below=1)
    keep: float = setting(0.98, "g of the decaying trace", above=0, below=1)
    first: int = setting(15, "n1, trials of the first phase", low=1, high=10_000)
    second: int = setting(20, "n2, trials of the second phase", low=1, high=10_000)
    seed: int = setting(0, "first of the random seeds", low=0, high=2**31)

    def check(self) -> None:
        if max(self.items) > 64 * self.dimension:
            raise InputError.of(
                "items", given=self.items, expected=f"at most {64 * self.dimension}, 64 x dimension"
            )

    def run(self) -> Result:
        rules, phases = self.rules(), (self.first, self.second)
        conditioning = (
            conditioning_series(rules, *phases),
            [*conditioning_checks(rules, *phases), *operator_checks(self.rate, *phases)],
        )
        random = (self._capacity(), self._worst(), self._chain(), self._heads())
        return Result.of(self, *random, conditioning)

    def rules(self) -> dict[str, Rule]:
        """The rules that have closed forms."""
        return {
            "Hebbian": Hebbian(self.rate),
            "decaying": Decaying(self.rate, self.keep),
            "Rescorla-Wagner": RescorlaWagner(self.rate),
            "Oja": Oja(self.rate),
        }

    def generator(self, part: int) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed + 1000 * part)

    def _capacity(self) -> tuple[list[Series], list[Check]]:
        """The error of reading back n associations."""
        generator = self.generator(1)
        found = [
            capacity.cross_talk(n, self.dimension, self.draws, generator=generator)
            for n in self.items
        ]
        theory_ = [theory.cross_talk_error(n, self.dimension) for n in self.items]
        measured = [mean_of(one.error) for one in found]
        accuracy = [mean_of(one.accuracy) for one in found]
        fine = np.geomspace(min(self.items), max(self.items), 60)
        series = [
            Series.of(
                "cross-talk",
                self.items,
                measured,
                theory_,
                "n, associations",
                "mean squared error of a reading",
                line=(fine, (fine - 1) / self.dimension),
                log="xy",
            ),
            Series.of(
                "clean-up",
                self.items,
                accuracy,
                [math.nan] * len(found),
                "n, associations",
                "nearest stored value is right",
                log="x",
            ),
        ]
        return series, [closest("cross-talk", "Cross-talk", self.items, measured, theory_, "n")]

    def _worst(self) -> tuple[list[Series], list[Check]]:
        """The first n whose worst cross-talk reaches the signal, over d_k."""
        generator, sizes = self.generator(2), self.overload_dimensions
        found = [
            capacity.first_overload(d, self.overload_draws, generator=generator) for d in sizes
        ]
        measured = [mean_of(one) for one in found]
        predicted = [theory.worst_case_count(d) for d in sizes]
        logs = np.log(np.array(sizes, float))
        counts = np.log([one[0] for one in measured])
        slope = float(np.polyfit(logs, counts, 1)[0])
        # least squares is linear in the counts, so errors of the means pass through its weights
        weights = (logs - logs.mean()) / np.square(logs - logs.mean()).sum()
        bar = float(np.linalg.norm(weights * [half / mean for mean, half in measured]))
        series = [
            Series.of(
                "overload",
                sizes,
                measured,
                predicted,
                "d_k",
                "n at which the worst cross-talk reaches 1 (line: average item)",
                log="xy",
            )
        ]
        return series, [
            Check(
                "worst case",
                "Exponent of d_k in the number of associations that are safe in the worst case",
                slope,
                0.5,
                tolerance=0.05,
                error=bar,
                why="0.05: the worst of n items is not the average one",
            )
        ]

    def _chain(self) -> tuple[list[Series], list[Check]]:
        """Errors along a chain of memories, for each number of items."""
        generator, d = self.generator(3), self.chain_dimension
        depths = range(1, self.depth + 1)
        series, checks = [], []
        for n in self.chain_items:
            errors = capacity.chain_errors(n, d, self.depth, self.draws, generator=generator)
            measured = [mean_of(errors[:, i]) for i in range(self.depth)]
            predicted = [theory.chain_error(n, d, depth) for depth in depths]
            series.append(
                Series.of(
                    f"chain, n = {n}",
                    depths,
                    measured,
                    predicted,
                    "D, memories in a chain",
                    "mean squared error",
                    panel="chain",
                    log="y",
                )
            )
            says = f"Error of a chain of {n} items"
            checks.append(closest(f"chain, n = {n}", says, depths, measured, predicted, "D"))
        return series, checks

    def _heads(self) -> tuple[list[Series], list[Check]]:
        """The average of R heads, with key codes of their own and with projections of one code; n is the first of chains'."""
        generator, n, d = self.generator(4), self.chain_items[0], self.chain_dimension
        own = [
            mean_of(capacity.cross_talk(n, d, self.draws, heads=r, generator=generator).error)
            for r in self.heads
        ]
        shared = [
            mean_of(capacity.projected_heads(n, d, self.draws, r, generator=generator).error)
            for r in self.heads
        ]
        predicted = [theory.cross_talk_error(n, d * r) for r in self.heads]
        floor = theory.cross_talk_error(n, d)
        lowest = min(shared, key=lambda pair: pair[0])
        label = ("R, heads", "mean squared error of their average")
        series = [
            Series.of("own codes", self.heads, own, predicted, *label, panel="heads", log="xy"),
            Series.of(
                "projections of one code",
                self.heads,
                shared,
                [floor] * len(shared),
                *label,
                panel="heads",
                log="xy",
            ),
        ]
        return series, [
            closest("redundancy", "Error of the average of heads", self.heads, own, predicted, "R"),
            Check(
                "projections",
                "Heads that see projections of one code: smallest error over one full head's",
                lowest[0] / floor,
                1.0,
                tolerance=0.05,
                error=lowest[1] / floor,
                sense=">",
                why="5 %: the noise of the draws",
            ),
        ]
