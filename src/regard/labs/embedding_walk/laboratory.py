"""The laboratory: predictions of `theory` beside measurements of `experiment`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from regard._errors import InputError
from regard.labs.embedding_walk.experiment import (
    bags,
    best_bag_nats,
    displacements,
    lookups,
    measured_choices,
    mixing_curve,
    trained,
    untrained_walks,
)
from regard.labs.embedding_walk.theory import (
    choice_accuracy,
    rising_weights,
    superposition_signal,
    unrelated_displacement,
)
from regard.labs.results import Check, Result, Series, interval
from regard.labs.settings import Lab, setting

REDUNDANT = 0.05
"""Nats below which attention's association counts as not needed."""
MIXES = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True, kw_only=True)
class EmbeddingWalk(Lab):
    """Walks without training, choices by summed concepts, and attention replaced by a running mean."""

    name: ClassVar[str] = "embedding-walk"
    width: int = setting(64, "width of the untrained models", low=8, high=1024)
    layers: int = setting(6, "their layers", low=2, high=64)
    heads: int = setting(4, "their heads", low=1, high=64)
    tokens: int = setting(16, "tokens of a walk", low=2, high=512)
    seeds: int = setting(8, "models that walk", low=2, high=256)
    dimension: int = setting(64, "dimensions d of a concept", low=4, high=4096)
    words: tuple[int, ...] = setting(
        (1, 2, 4, 8, 16, 32), "words of a context", low=1, high=512, most=16
    )
    choice_words: int = setting(3, "words of a choice, one of them the context's", low=1, high=64)
    choices: int = setting(4, "choices of an item", low=2, high=64)
    sinks: tuple[float, ...] = setting(
        (0.0, 1.0, 2.0, 4.0, 8.0),
        "norms of a vector that every text begins with",
        low=0,
        high=1000,
        most=16,
    )
    sink_words: int = setting(8, "words of a context behind a sink", low=1, high=512)
    trials: int = setting(8000, "items for each measured share", low=100, high=1_000_000)
    trained_width: int = setting(32, "width of the trained models", low=8, high=512)
    steps: int = setting(300, "training steps", low=2, high=100_000)
    samples: int = setting(512, "held-out samples for each loss", low=16, high=100_000)
    seed: int = setting(0, "first of the random seeds", low=0, high=2**31)

    def check(self) -> None:
        if self.width % self.heads or self.width // self.heads % 2:
            raise InputError.of(
                "heads",
                given=self.heads,
                expected=f"to divide the width {self.width} into even parts",
            )

    def run(self) -> Result:
        parts = (self._walk, self._concepts, self._sinks, self._association)
        return Result.of(self, *(part() for part in parts))

    def _walk(self) -> tuple[list[Series], list[Check]]:
        """Untrained models: steps that do not know of one another."""
        walks = untrained_walks(
            self.width, self.layers, self.heads, self.tokens, self.seeds, self.seed
        )
        far, expected, ratios = [], [], []
        for walk in walks:
            lengths, found = displacements(walk)
            theory = unrelated_displacement(lengths)
            far.append(found.mean(0))
            expected.append(theory.mean(0))
            ratios.append((found[:, -1] / theory[:, -1]).mean())
        mean, half = interval(np.array(far))
        ratio, spread = interval(np.array(ratios))
        steps = np.arange(1, 2 * self.layers + 1)
        series = [
            Series(
                "walk",
                steps,
                mean,
                half,
                np.mean(expected, 0),
                "steps (attention, MLP, attention, ..)",
                "distance from the start",
            )
        ]
        return series, [
            Check(
                "sum",
                "The last state is the first plus all steps: the largest gap of a token, as a share of that state",
                max(walk.gap() for walk in walks),
                0.0,
                tolerance=1e-5,
                why="single precision",
            ),
            Check(
                "unrelated",
                "Displacement of untrained models over that of unrelated steps",
                float(ratio),
                1.0,
                tolerance=math.sqrt(2 / self.width),
                error=float(spread),
                why="sqrt(2/d), the spread of a single walk whose steps have cosines of 0 +- 1/sqrt(d)",
            ),
        ]

    def _concepts(self) -> tuple[list[Series], list[Check]]:
        """Choices by the mean of words and by one that grows with the place."""
        series, checks = [], []
        for index, (name, of) in enumerate(
            (("mean", lambda n: np.full(n, 1 / n)), ("w1mean", rising_weights))
        ):
            generator = torch.Generator().manual_seed(self.seed + index)
            found = [
                measured_choices(
                    of(n),
                    self.dimension,
                    self.choice_words,
                    self.trials,
                    generator,
                    choices=self.choices,
                )
                for n in self.words
            ]
            theory = [
                choice_accuracy(
                    superposition_signal(of(n), self.dimension, self.choice_words), self.choices
                )
                for n in self.words
            ]
            series.append(
                self._shares(name, self.words, found, theory, "words of a context", "concepts")
            )
            checks.append(self._agree(name, f"Right choices by {name}", self.words, found, theory))
        return series, checks

    def _sinks(self) -> tuple[list[Series], list[Check]]:
        """A vector in front of every text that says nothing."""
        weights = np.full(self.sink_words, 1 / self.sink_words)
        generator = torch.Generator().manual_seed(self.seed + 9)
        found = [
            measured_choices(
                weights,
                self.dimension,
                self.choice_words,
                self.trials,
                generator,
                choices=self.choices,
                sink=norm,
            )
            for norm in self.sinks
        ]
        theory = [
            choice_accuracy(
                superposition_signal(weights, self.dimension, self.choice_words, sink=norm),
                self.choices,
            )
            for norm in self.sinks
        ]
        return [
            self._shares("sink", self.sinks, found, theory, "norm of the sink, of a word's", "")
        ], [self._agree("sink", "Right choices behind a sink", self.sinks, found, theory)]

    def _association(self) -> tuple[list[Series], list[Check]]:
        """Attention mixed with a running mean, where counts are enough and where a pair must be found."""
        held_out = self.seed + 10**6
        easy, hard = bags(), lookups()
        curves = {
            task.name: mixing_curve(
                trained(task, self.steps, self.trained_width, self.seed),
                task,
                MIXES,
                self.samples,
                held_out,
            )
            for task in (easy, hard)
        }
        mixes, near = np.array(MIXES), np.abs(np.array(MIXES) - 0.5) < 0.3
        series = [
            Series(
                name,
                mixes,
                np.array(curve.nats),
                np.zeros(len(mixes)),
                np.where(near, curve.middle + curve.slope * (mixes - 0.5), np.nan),
                "share of uniform weights (line: to first order at 1/2)",
                "nats of an asked token",
                panel="association",
            )
            for name, curve in curves.items()
        ]
        counts, pairs = curves[easy.name], curves[hard.name]
        best = best_bag_nats(easy, self.samples, held_out)
        learnt = counts.nats[0] - best < REDUNDANT
        why = "the bound below which association counts as redundant; undecided for a model that has not learnt"
        return series, [
            Check(
                "counts",
                "A trained layer forecasts as well as counts allow: its nats, and those of the best forecast",
                counts.nats[0],
                best,
                tolerance=REDUNDANT,
                why="the bound below which a difference counts as none",
            ),
            Check(
                "bags",
                "Where counts are enough a running mean does as well: nats that it costs",
                counts.rise if learnt else math.nan,
                REDUNDANT,
                sense="<",
                why=why,
            ),
            Check(
                "lookups",
                "Where a pair must be found it does not: nats that a running mean costs",
                pairs.rise if pairs.accuracy > 0.9 else math.nan,
                REDUNDANT,
                sense=">",
                why=why,
            ),
            Check(
                "slope",
                "Nats that a little more of it costs lookups, half-way: by differences, and by differentiation",
                pairs.difference,
                pairs.slope,
                tolerance=0.02 * abs(pairs.slope),
                why="2 %: differences over 0.02 in single precision",
            ),
        ]

    def _shares(
        self,
        name: str,
        x: tuple[float, ...] | tuple[int, ...],
        found: list[tuple[float, float]],
        theory: list[float],
        x_label: str,
        panel: str,
    ) -> Series:
        log = "x" if min(x) > 0 else ""
        return Series.of(
            name, x, found, theory, x_label, "share of right choices", panel=panel, log=log
        )

    def _agree(
        self,
        name: str,
        says: str,
        x: tuple[float, ...] | tuple[int, ...],
        found: list[tuple[float, float]],
        theory: list[float],
    ) -> Check:
        worst = max(range(len(found)), key=lambda i: abs(found[i][0] - theory[i]))
        return Check(
            name,
            f"{says}, at {x[worst]:g}, the worst of all",
            found[worst][0],
            theory[worst],
            tolerance=2 / self.dimension + found[worst][1],
            error=found[worst][1],
            why="2/d for lengths that vary in d dimensions, and the error bar, as the worst of several is shown",
        )
