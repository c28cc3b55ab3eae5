"""The laboratory: predictions of `theory` beside the trained layer of `experiment`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from regard._errors import InputError
from regard.labs.flows import flow
from regard.labs.mesa_optimization.capability import Answers, answers
from regard.labs.mesa_optimization.experiment import (
    Trained,
    begin,
    draw,
    train,
)
from regard.labs.mesa_optimization.theory import (
    STARTS,
    Moments,
    balanced_limit,
    curvature,
    diagonal_loss,
    diagonal_velocity,
    mesa_step_size,
    position_error,
    start_moments,
)
from regard.labs.results import Check, Result, Series, interval
from regard.labs.settings import Lab, setting


@dataclass(frozen=True, kw_only=True)
class MesaOptimization(Lab):
    """The laboratory: training of all entries beside the flow of a and b, and what the trained layer can predict."""

    name: ClassVar[str] = "mesa-optimization"
    start: str = setting("gaussian", "law of the first token", choices=STARTS)
    dimension: int = setting(5, "d", low=1, high=64)
    length: int = setting(20, "tokens T of a sequence", low=4, high=1000)
    scale: float = setting(1.0, "sigma or c, size of the first token", above=0, high=100)
    share: float = setting(0.5, 'for "signs": probability of an entry', above=0, high=1)
    a: tuple[float, ...] = setting((0.1, 0.5, 2.0), "a0 of each start", above=0, high=100, most=16)
    b: tuple[float, ...] = setting((0.1, 1.5, 2.0), "b0 of each start", above=0, high=100, most=16)
    masked: bool = setting(False, "no gradient for entries that the theorem keeps at zero")
    rate: float = setting(0.1, "step size over the inverse curvature along a b", above=0, below=1)
    steps: int = setting(200, "steps of training", low=10, high=1_000_000)
    sequences: int = setting(200, "sequences of a step", low=1, high=100_000)
    seeds: int = setting(3, "runs of each start", low=2, high=256)
    tests: int = setting(2000, "sequences for what the trained layer predicts", low=10, high=10**7)
    seed: int = setting(0, "first of the random seeds", low=0, high=2**31)

    def check(self) -> None:
        if len(self.a) != len(self.b):
            raise InputError(
                f"a and b must name as many starts as each other, got {len(self.a)} and {len(self.b)}"
            )

    @property
    def moments(self) -> Moments:
        return start_moments(self.start, self.dimension, self.scale, self.share)

    @property
    def limit(self) -> float:
        """The predicted a b."""
        return mesa_step_size(self.moments, self.length)

    @property
    def kept(self) -> bool:
        """Whether theory keeps the other entries at zero: odd moments vanish, or they get no gradient."""
        return self.masked or self.start != "ones"

    def draw(self, batch: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Sequences of this law."""
        return draw(
            self.start,
            self.dimension,
            self.length,
            batch,
            generator,
            scale=self.scale,
            share=self.share,
        )

    def trained(self) -> Trained:
        """The layer trained from every start, every seed on its own sequences."""
        return train(
            lambda generator: self.draw((self.seeds, self.sequences), generator),
            begin(self.a, self.b, self.dimension, self.seeds),
            rate=self.rate,
            curvature=curvature(self.moments, self.length),
            limit=self.limit,
            steps=self.steps,
            seed=self.seed,
            masked=self.masked,
        )

    def predicted(self, trained: Trained) -> tuple[np.ndarray, np.ndarray]:
        """a b and the loss by the flow at the logged times, `[logs, seeds, starts]`."""
        ends = trained.time[-1].max(0).astype(float)  # each start has its own pace
        grid = np.concatenate([[0.0], np.geomspace(1e-4, 1, 400)])

        def velocity(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, ...]:
            to_a, to_b = diagonal_velocity(a, b, self.moments, self.length)
            return to_a * ends, to_b * ends

        a, b = flow(velocity, (np.array(self.a), np.array(self.b)), grid, accuracy=1e-7)
        losses = diagonal_loss(a, b, self.moments, self.dimension, self.length)
        product, loss = np.empty_like(trained.time), np.empty_like(trained.time)
        for i, end in enumerate(ends):
            share = trained.time[..., i] / end
            product[..., i] = np.interp(share, grid, a[:, i] * b[:, i])
            loss[..., i] = np.interp(share, grid, losses[:, i])
        return product, loss

    def answers(self, trained: Trained) -> Answers:
        """The trained layer on new sequences, beside one step of descent on their least squares."""
        return answers(
            trained,
            lambda count, generator: self.draw((self.seeds, count), generator),
            self.tests,
            chunk=max(1, 20_000 // self.length),
            seed=self.seed + 1,
        )

    def run(self) -> Result:
        return self.compare(self.trained())

    def compare(self, trained: Trained) -> Result:
        """A trained layer beside the predictions."""
        found = self.answers(trained)
        product, loss = self.predicted(trained)
        if not self.kept:  # theory is silent
            product, loss = np.full_like(product, np.nan), np.full_like(loss, np.nan)
        steps = np.maximum(trained.steps, 1)
        positions = np.arange(2, self.length)
        final = position_error(self.limit, self.moments, positions)
        wanted = self.limit * self.moments.second / self.moments.support
        series = []
        for i, pair in enumerate(zip(self.a, self.b, strict=True)):
            name = f"a0 = {pair[0]:g}, b0 = {pair[1]:g}"
            rows = (
                ("step size", trained.product, product.mean(1), "a b", "x"),
                ("loss", trained.loss, loss.mean(1), "loss, summed over positions", "x"),
                (
                    "other entries",
                    trained.stray,
                    0 * product.mean(1),
                    "their norm over a's and b's",
                    "x",
                ),
            )
            for panel, measured, theory, label, log in rows:
                mean, half = interval(measured[..., i], 1)
                series.append(
                    Series(
                        f"{panel}, {name}",
                        steps,
                        mean,
                        half,
                        theory[:, i],
                        "step",
                        label,
                        panel,
                        log=log,
                    )
                )
        for panel, measured, theory, label in (
            ("ratio", found.ratio, np.full(len(positions), wanted), "prediction over truth, mean"),
            ("error", found.error, final, "squared error over the truth's square"),
        ):
            mean, half = interval(measured.mean(1))
            theory = theory if self.kept else np.full(len(positions), np.nan)
            series.append(
                Series(panel, positions.astype(float), mean, half, theory, "t, tokens seen", label)
            )
        return Result.of(self, (series, self._checks(trained, found, product)))

    def _checks(self, trained: Trained, found: Answers, product: np.ndarray) -> list[Check]:
        stray = trained.stray[-1].mean(1)
        mean, half = (float(part) for part in interval(stray))
        checks = [
            Check(
                "descent",
                "Without the other entries the layer is one step of descent of size a b: distance over its predictions",
                float(found.diagonal_gap.max()),
                0.0,
                tolerance=0.02,
                why="2 %: every coordinate has its own a_j and b_j, which differ by the noise of the batches",
            ),
            Check(
                "stray",
                "The other entries stay at zero: their norm over that of a and b"
                if self.kept
                else "The other entries grow: their norm over that of a and b",
                mean,
                0.05 if self.kept else 0.1,
                error=half,
                why="the noise of the batches"
                if self.kept
                else "more than the noise of the batches makes",
                sense="<" if self.kept else ">",
            ),
        ]
        if not self.kept:
            return checks
        here, bar = interval(trained.product[-1])
        worst = int(np.abs(here - self.limit).argmax())
        gap = np.abs(interval(trained.product - product, 1)[0])
        scale = self._scale()
        drift = np.abs(interval(trained.balance[-1] - trained.balance[0])[0]) / scale
        ratio, spread = (float(part) for part in interval(found.ratio[..., -1].mean(1)))
        wanted = self.limit * self.moments.second / self.moments.support
        return [
            Check(
                "step size",
                f"a b after training from a0 = {self.a[worst]:g}, b0 = {self.b[worst]:g}, the worst start",
                float(here[worst]),
                self.limit,
                tolerance=0.03 * self.limit,
                error=float(bar[worst]),
                why="3 %: the noise of the batches",
            ),
            Check(
                "flow",
                "a b follows the flow: largest distance over all steps, over the larger of both ends",
                float((gap.max(0) / np.maximum(np.multiply(self.a, self.b), self.limit)).max()),
                0.1,
                why="10 %: steps are finite, and batches small",
                sense="<",
            ),
            Check(
                "balance",
                "a^2 - b^2 is conserved: largest drift over the larger of both ends' a^2 + b^2",
                float(drift.max()),
                0.05,
                why="5 %: steps are finite",
                sense="<",
            ),
            *checks,
            Check(
                "ratio",
                f"Prediction over truth at t = {self.length - 1}, mean",
                ratio,
                wanted,
                tolerance=0.03 * wanted,
                error=spread,
                why="3 %, as for a b",
            ),
        ]

    def _scale(self) -> np.ndarray:
        """a^2 + b^2 of each start, at the start or in the limit, whichever is larger."""
        ends = [
            max(a * a + b * b, sum(part**2 for part in balanced_limit(a, b, self.limit)))
            for a, b in zip(self.a, self.b, strict=True)
        ]
        return np.array(ends)
