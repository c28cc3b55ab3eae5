"""The laboratory: predictions of `theory` beside measurements of `experiment`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from regard._errors import InputError
from regard.labs.flows import State, descend, flow
from regard.labs.linear_icl.experiment import (
    Prompts,
    draw_prompts,
    measured_risk,
    start,
    train,
)
from regard.labs.linear_icl.theory import (
    Matrix,
    icl_gamma,
    icl_loss,
    icl_optimum,
    icl_random_covariance_limit,
    icl_random_covariance_risk,
    icl_risk,
    icl_velocity,
)
from regard.labs.results import Check, Result, Series, interval
from regard.labs.settings import Lab, setting


@dataclass(frozen=True, kw_only=True)
class LinearICL(Lab):
    """The laboratory: gradient flow and descent, the trained layer, and its risk under shifts."""

    name: ClassVar[str] = "linear-icl"
    spectrum: tuple[float, ...] = setting(
        (2.0, 1.0, 0.5, 0.25),
        "eigenvalues of the covariance Lambda; d is their number",
        above=0,
        high=100,
        most=32,
    )
    examples: int = setting(20, "labelled examples N of a training prompt", low=1, high=10_000)
    test_examples: tuple[int, ...] = setting(
        (5, 10, 20, 50, 200), "labelled examples M of a test prompt", low=1, high=10_000, most=32
    )
    training_lengths: tuple[int, ...] = setting(
        (5, 10, 20, 40, 80), "values of N for the 1/N^2 law", low=1, high=10_000, most=32
    )
    scales: tuple[float, ...] = setting(
        (0.5, 0.75, 1.0, 1.5, 2.0, 3.0),
        "covariance shifts c: prompts and queries of covariance c Lambda",
        above=0,
        high=100,
        most=32,
    )
    init_scale: float = setting(0.1, "sigma, the scale of the start", above=0, high=100)
    noise: float = setting(0.0, "variance of label noise at test", low=0, high=100)
    horizon: float = setting(100.0, "time of the gradient flow", above=0, high=100_000)
    rate: float = setting(0.02, "learning rate of descent", above=0, high=1)
    training_rate: float = setting(0.005, "learning rate of training on prompts", above=0, high=1)
    steps: int = setting(1200, "steps of training on prompts", low=10, high=1_000_000)
    batch: int = setting(128, "prompts in a training step", low=1, high=100_000)
    seeds: int = setting(4, "runs trained at once", low=2, high=1024)
    prompts: int = setting(10_000, "prompts for each measured risk", low=100, high=10_000_000)
    random_dimension: int = setting(
        3, "d for random covariances with Exp(1) eigenvalues", low=1, high=32
    )
    random_examples: int = setting(40, "N for random covariances", low=1, high=10_000)
    seed: int = setting(0, "first of the random seeds", low=0, high=2**31)

    def check(self) -> None:
        covariance = np.diag(self.spectrum)
        u, matrix = icl_optimum(covariance, self.examples)
        top = np.linalg.norm(icl_gamma(covariance, self.examples), 2) * max(self.spectrum) ** 2
        curvature = float(u**2 + (matrix**2).sum()) * top  # bounds the Hessian at the limit
        if self.rate * curvature >= 2:
            raise InputError.of(
                "rate",
                given=self.rate,
                expected=f"below {2 / curvature:.3g} for this spectrum",
                fix="descent would not be stable at the limit",
            )

    @property
    def covariance(self) -> Matrix:
        """Lambda."""
        return np.diag(self.spectrum)

    def run(self) -> Result:
        parts = (self._flow, self._train, self._risk, self._shift, self._random)
        return Result.of(self, *(part() for part in parts))

    def _begin(self) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        return start(len(self.spectrum), self.init_scale, self.seeds, generator)

    def _flow(self) -> tuple[list[Series], list[Check]]:
        """The reduced dynamics from random starts: SciPy's solver, gradient descent, and the limit."""
        value, key = self._begin()
        begin: State = (value[:, -1, -1].numpy(), key[:, :-1, :-1].numpy())
        velocity = lambda u, m: icl_velocity(u, m, self.covariance, self.examples)  # noqa: E731
        times = (
            np.unique(np.rint(np.r_[0, np.geomspace(self.rate, self.horizon, 40)] / self.rate))
            * self.rate
        )
        solved = flow(velocity, begin, times)
        walked = descend(velocity, begin, times, self.rate)
        u, matrix = icl_optimum(self.covariance, self.examples)
        far = lambda state: np.abs(state[1] - matrix).max((-2, -1)) + np.abs(state[0] - u)  # noqa: E731
        balance = lambda state: state[0] ** 2 - (state[1] ** 2).sum((-2, -1))  # noqa: E731
        mean, half = interval(walked[0], 1)
        distance, spread = interval(far(walked), 1)
        loss = lambda state: icl_loss(state[0], state[1], self.covariance, self.examples).mean(1)  # noqa: E731
        slowest = self._slowest()
        left = 2 * float(far((begin[0], begin[1])).max()) * math.exp(-slowest * self.horizon)
        series = [
            Series(
                "u",
                times,
                mean,
                half,
                solved[0].mean(1),
                "time",
                "u, corner of W_PV",
                panel="gradient flow",
                log="x",
            ),
            Series(
                "loss",
                times,
                loss(walked),
                np.zeros(len(times)),
                loss(solved),
                "time",
                "population loss",
                log="x",
            ),
            Series(
                "distance",
                times,
                distance,
                spread,
                far(solved).mean(1),
                "time",
                "distance to the closed form",
                log="xy",
            ),
        ]
        checks = [
            Check(
                "limit",
                "Gradient flow ends in the closed form: largest distance over the starts",
                float(far(solved)[-1].max()),
                0.0,
                tolerance=max(1e-4, left),
                why=f"1e-4, or what the slowest mode (rate {slowest:.3g}) leaves at time {self.horizon:g}",
            ),
            Check(
                "descent",
                "Gradient descent follows the flow: largest difference in u over all times",
                float(np.abs(solved[0] - walked[0]).max()),
                0.0,
                tolerance=2
                * self.rate
                * float(np.abs(np.gradient(solved[0], times, axis=0)).max()),
                why="Euler's method is a step of time late at most: two steps at the highest speed of u",
            ),
            Check(
                "balance",
                "u^2 - ||U||_F^2 is conserved: largest drift along the flow",
                float(np.abs(balance(solved) - balance(solved)[0]).max()),
                0.0,
                tolerance=1e-6,
                why="the solver's accuracy, 1e-9 a step",
            ),
        ]
        return series, checks

    def _slowest(self) -> float:
        """The rate at which the last mode of U approaches the limit: `u^2 gamma_i lambda_i lambda_j`, the smallest."""
        u, _ = icl_optimum(self.covariance, self.examples)
        gamma = np.diag(icl_gamma(self.covariance, self.examples))
        small = np.array(self.spectrum)
        return float(u**2 * np.outer(gamma * small, small).min())

    def _train(self) -> tuple[list[Series], list[Check]]:
        """All entries of both matrices, trained on prompts."""
        root = torch.as_tensor(np.sqrt(self.covariance))
        begin = self._begin()
        trained = train(
            lambda batch, generator: draw_prompts(root, self.examples, batch, generator),
            begin,
            steps=self.steps,
            rate=self.training_rate,
            batch=self.batch,
            seed=self.seed + 1,
        )
        optimum = np.linalg.inv(icl_gamma(self.covariance, self.examples))
        # the rate falls in the last third, so time is the integral of the rate
        step = np.arange(1, self.steps + 1)
        late = np.clip(step / self.steps - 2 / 3, 0, None) * 3
        clock = np.r_[0, np.cumsum(self.training_rate * 0.1**late)]
        times = clock[trained.steps]
        solved = flow(
            lambda u, m: icl_velocity(u, m, self.covariance, self.examples),
            (begin[0][:, -1, -1].numpy(), begin[1][:, :-1, :-1].numpy()),
            times,
        )
        expected = (solved[0][..., None, None] * solved[1]).mean(1)
        product = trained.product()
        series = []
        for i, eigenvalue in enumerate(self.spectrum[:6]):
            mean, half = interval(product[:, :, i, i], 1)
            series.append(
                Series(
                    f"lambda = {eigenvalue:g}",
                    times,
                    mean,
                    half,
                    expected[:, i, i],
                    "time, steps x rate",
                    "u U, diagonal entries",
                    panel="training on prompts",
                    log="x",
                )
            )
        predicted = (solved[0][-1][:, None, None] * solved[1][-1]).mean(0)
        mean, half = interval(product[-1], 0)
        scale = float(np.abs(optimum).max())
        off = np.abs(mean - predicted) / scale
        worst = np.unravel_index(off.argmax(), off.shape)
        checks = [
            Check(
                "trained",
                "u U of the fully trained layer, its worst entry, against the flow at the same time (as a share of "
                "the largest entry)",
                float(mean[worst]) / scale,
                float(predicted[worst]) / scale,
                tolerance=0.03,
                error=float(half[worst]) / scale,
                why="3 %: the noise of the batches at these rates",
            ),
            Check(
                "blocks",
                "The blocks w21 and w12 stay at zero: largest entry after training, over the largest of all",
                trained.stray(),
                0.0,
                tolerance=0.02,
                why="2 %: the noise of the batches",
            ),
        ]
        return series, checks

    def _risk(self) -> tuple[list[Series], list[Check]]:
        """Risk against M for the training N, and against N for a long test prompt."""
        root = torch.as_tensor(np.sqrt(self.covariance))
        best = np.linalg.inv(icl_gamma(self.covariance, self.examples))
        fine = np.geomspace(min(self.test_examples), max(self.test_examples), 60)
        found = [self._measure(best, root, m, i) for i, m in enumerate(self.test_examples)]
        theory = [
            icl_risk(self.covariance, self.examples, m, self.noise) for m in self.test_examples
        ]
        # along the line M is not a whole number; the law is affine in 1/M
        ends = [icl_risk(self.covariance, self.examples, m, self.noise) for m in (1, 10**12)]
        line = (fine, ends[1] + (ends[0] - ends[1]) / fine)
        series = [
            Series.of(
                "risk",
                self.test_examples,
                found,
                theory,
                "M, examples of a test prompt",
                "risk",
                line=line,
                log="xy",
            )
        ]
        worst = max(
            range(len(found)), key=lambda i: abs(found[i][0] - theory[i]) / max(found[i][1], 1e-12)
        )
        checks = [
            _agree(
                "risk",
                f"Risk on prompts of {self.test_examples[worst]} examples, the worst of all lengths",
                found[worst],
                theory[worst],
            )
        ]
        # the part that stays at M -> infinity, exactly: x_q^T (Gamma^-1 Lambda - I) w
        excess, exact = [], []
        for i, n in enumerate(self.training_lengths):
            bias = np.linalg.inv(icl_gamma(self.covariance, n)) @ self.covariance - np.eye(
                len(best)
            )
            generator = torch.Generator().manual_seed(self.seed + 100 + i)
            kind = {"dtype": torch.float64, "generator": generator}
            x = torch.randn(self.prompts, len(best), **kind) @ root.mT
            w = torch.randn(self.prompts, len(best), **kind)
            squares = ((x @ torch.as_tensor(bias)) * w).sum(-1).square()
            excess.append(
                (float(squares.mean()), 1.96 * float(squares.std()) / math.sqrt(self.prompts))
            )
            exact.append(icl_risk(self.covariance, n, 10**12))
        series.append(
            Series.of(
                "risk, long prompts",
                self.training_lengths,
                excess,
                exact,
                "N, examples of a training prompt",
                "risk for M -> infinity",
                log="xy",
            )
        )
        if len(self.training_lengths) > 1:
            far = sorted(self.training_lengths)[-2:]
            index = [self.training_lengths.index(n) for n in far]
            slope = lambda values: math.log(values[1] / values[0]) / math.log(far[1] / far[0])  # noqa: E731
            bar = math.hypot(*(excess[i][1] / excess[i][0] for i in index)) / math.log(
                far[1] / far[0]
            )
            checks.append(
                Check(
                    "slope",
                    f"Exponent of the risk in N between {far[0]} and {far[1]} (-2 in the limit)",
                    slope([excess[i][0] for i in index]),
                    slope([exact[i] for i in index]),
                    tolerance=max(0.1, bar),
                    error=bar,
                    why="0.1, or the error bar; the formula at these N, not only its limit, is the prediction",
                )
            )
        return series, checks

    def _measure(
        self, weight: Matrix, root: Tensor, examples: int, index: int
    ) -> tuple[float, float]:
        return measured_risk(
            weight,
            lambda count, generator: draw_prompts(
                root, examples, (count,), generator, noise=self.noise
            ),
            self.prompts,
            self.seed + 10 + index,
        )

    def _shift(self) -> tuple[list[Series], list[Check]]:
        """Prompts and queries of covariance c Lambda."""
        best = np.linalg.inv(icl_gamma(self.covariance, self.examples))
        examples = self.examples
        root = torch.as_tensor(np.sqrt(self.covariance))
        found, theory = [], []
        for i, c in enumerate(self.scales):
            found.append(self._measure(best, math.sqrt(c) * root, examples, 50 + i))
            theory.append(
                icl_risk(self.covariance, self.examples, examples, self.noise, c * self.covariance)
            )
        fine = np.linspace(min(self.scales), max(self.scales), 80)
        line = (
            fine,
            np.array(
                [
                    icl_risk(
                        self.covariance, self.examples, examples, self.noise, c * self.covariance
                    )
                    for c in fine
                ]
            ),
        )
        worst = max(
            range(len(found)), key=lambda i: abs(found[i][0] - theory[i]) / max(found[i][1], 1e-12)
        )
        series = [
            Series.of(
                "covariate shift",
                self.scales,
                found,
                theory,
                "c, covariance of the test over training",
                "risk",
                line=line,
                log="y",
            )
        ]
        return series, [
            _agree(
                "shift",
                f"Risk at a covariance {self.scales[worst]:g} times as large, the worst of all shifts",
                found[worst],
                theory[worst],
            )
        ]

    def _random(self) -> tuple[list[Series], list[Check]]:
        """A new diagonal covariance in each prompt, its entries exponential."""
        size, moments = self.random_dimension, (1.0, 2.0, 6.0)
        begin = start(
            size, self.init_scale, self.seeds, torch.Generator().manual_seed(self.seed + 2)
        )

        def draw(batch: tuple[int, ...], generator: torch.Generator, examples: int = 0) -> Prompts:
            entries = torch.empty(*batch, size, dtype=torch.float64).exponential_(
                generator=generator
            )
            root = torch.diag_embed(entries.sqrt())
            return draw_prompts(root, examples or self.random_examples, batch, generator)

        trained = train(
            draw,
            begin,
            steps=self.steps,
            rate=self.training_rate,
            batch=self.batch,
            seed=self.seed + 3,
        )
        limit = icl_random_covariance_limit(moments, size, self.random_examples)
        entries = np.diagonal(trained.product(), axis1=-2, axis2=-1).mean(-1)
        mean, half = interval(entries, 1)
        steps = np.maximum(trained.steps, 1)
        series = [
            Series(
                "random covariance",
                steps,
                mean,
                half,
                np.full(len(mean), limit),
                "step",
                "u U, mean of the diagonal",
                log="x",
            )
        ]
        found = []
        for i, examples in enumerate(self.test_examples):
            found.append(
                measured_risk(
                    limit * np.eye(size),
                    lambda count, generator, m=examples: draw((count,), generator, m),
                    self.prompts,
                    self.seed + 200 + i,
                )
            )
        theory = [
            icl_random_covariance_risk(moments, size, self.random_examples, m)
            for m in self.test_examples
        ]
        fine = np.geomspace(min(self.test_examples), max(self.test_examples), 60)
        line = (
            fine,
            np.array(
                [icl_random_covariance_risk(moments, size, self.random_examples, m) for m in fine]
            ),
        )
        series.append(
            Series.of(
                "random covariance, risk",
                self.test_examples,
                found,
                theory,
                "M, examples of a test prompt",
                "risk",
                line=line,
                log="x",
            )
        )
        worst = max(
            range(len(found)), key=lambda i: abs(found[i][0] - theory[i]) / max(found[i][1], 1e-12)
        )
        return series, [
            Check(
                "random",
                "u U after training on random covariances, mean of the diagonal",
                float(mean[-1]),
                limit,
                tolerance=0.03 * limit,
                error=float(half[-1]),
                why="3 %: the noise of the batches",
            ),
            _agree(
                "random risk",
                f"Risk on random covariances at {self.test_examples[worst]} examples, the worst of all",
                found[worst],
                theory[worst],
            ),
        ]


def _agree(name: str, says: str, found: tuple[float, float], theory: float) -> Check:
    """A measured risk equals its formula; the chosen one is the worst of several, so more than its error bar is allowed."""
    return Check(
        name,
        says,
        found[0],
        theory,
        tolerance=found[1] + max(found[1], 0.01 * theory),
        error=found[1],
        why="its 95 % interval, and as much again or 1 % of the risk, whichever is more: the worst of several is shown",
    )
