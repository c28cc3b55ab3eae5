"""The laboratory: settings, and its two parts, the reduced flow and trained networks beside the predictors theory names."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from regard._errors import InputError
from regard.labs.flows import descend, flow
from regard.labs.results import Check, Result, Series, interval
from regard.labs.settings import Lab, setting
from regard.labs.softmax_icl.experiment import (
    Networks,
    Task,
    Trained,
    measured_errors,
    pattern_scores,
    train,
)
from regard.labs.softmax_icl.flow_checks import group_checks, one_head_checks
from regard.labs.softmax_icl.predictors import debiased_gd, kernel_heads
from regard.labs.softmax_icl.theory import (
    debiased_risk,
    debiased_step,
    reduced_loss,
    reduced_velocity,
    single_head,
)


@dataclass(frozen=True, kw_only=True)
class SoftmaxICL(Lab):
    """The laboratory: the reduced flow, trained networks, and both on prompts of other lengths."""

    name: ClassVar[str] = "softmax-icl"
    dimension: int = setting(5, "d", low=1, high=64)
    examples: int = setting(40, "examples L of a training prompt", low=2, high=4096)
    noise: float = setting(0.1, "s2, variance of label noise", low=0, high=100)
    heads: tuple[int, ...] = setting(
        (1, 2, 4), "heads of the trained networks", low=1, high=32, most=8
    )
    lengths: tuple[int, ...] = setting(
        (10, 20, 40, 100), "examples of a test prompt", low=2, high=4096, most=16
    )
    spread: float = setting(0.05, "standard deviation of the reduced flow's start", above=0, high=1)
    starts: int = setting(16, "starts of the reduced flow", low=2, high=4096)
    horizon: float = setting(400.0, "time of the reduced flow", above=0, high=1e6)
    step: float = setting(0.02, "step size of reduced descent", above=0, high=1)
    steps: int = setting(1500, "training steps of the networks", low=10, high=10_000_000)
    batch: int = setting(128, "prompts of a training step", low=1, high=100_000)
    rate: float = setting(5e-3, "Adam's learning rate", above=0, high=1)
    seeds: int = setting(3, "networks of each number of heads", low=2, high=64)
    prompts: int = setting(10_000, "prompts for each measured error", low=100, high=10_000_000)
    seed: int = setting(0, "first of the random seeds", low=0, high=2**31)

    def check(self) -> None:
        if self.spread**2 * self.dimension > 5:
            raise InputError.of(
                "spread",
                given=self.spread,
                expected=f"at most {math.sqrt(5 / self.dimension):.3g} for this d",
                fix="exp(d omega^2) overflows",
            )

    @property
    def place(self) -> tuple[int, int, float]:
        """d, L and s2."""
        return self.dimension, self.examples, self.noise

    @property
    def task(self) -> Task:
        return Task.regression(*self.place)

    def run(self) -> Result:
        return Result.of(self, self.flows(), self.compare(self.trained()))

    def flows(self) -> tuple[list[Series], list[Check]]:
        """The reduced model with one head and with four, from small random starts."""
        rng = np.random.default_rng(self.seed)
        velocity = lambda omega, mu: reduced_velocity(omega, mu, *self.place)  # noqa: E731
        grid = np.r_[0, np.geomspace(0.1, self.horizon, 40)]
        times = np.unique(np.rint(grid / self.step)) * self.step
        alone, best = single_head(*self.place), debiased_step(*self.place)
        series, checks = [], []
        for count, limit in ((1, alone[2]), (4, best[1])):
            omega, mu = self.spread * rng.standard_normal((2, self.starts, count))
            solved = flow(velocity, (omega, mu), times)
            walked = descend(velocity, (omega, mu), times, self.step)
            mean, half = interval(reduced_loss(walked[0], walked[1], *self.place), 1)
            theory = reduced_loss(solved[0], solved[1], *self.place)
            series.append(
                Series(
                    _heads(count),
                    times,
                    mean,
                    half,
                    theory.mean(1),
                    "time",
                    "reduced loss",
                    panel="reduced flow",
                    log="x",
                )
            )
            speed = float(np.abs(np.gradient(theory, times, axis=0)).max())
            checks += [
                Check(
                    f"flow, {count}",
                    f"Reduced flow, {_heads(count)}: loss at the end, the worst start, against the closed form",
                    float(theory[-1].max()),
                    limit,
                    tolerance=1e-4 if count == 1 else 0.005,
                    why="1e-4"
                    if count == 1
                    else "0.005: omega shrinks like a logarithm along a flat valley, where the infimum lies",
                ),
                Check(
                    f"descent, {count}",
                    f"Reduced descent follows the flow, {_heads(count)}: largest difference of the mean loss",
                    float(np.abs(mean - theory.mean(1)).max()),
                    0.0,
                    tolerance=2 * self.step * speed,
                    why="Euler's method is a step of time late at most: two steps at the highest speed",
                ),
            ]
            checks += (
                one_head_checks(solved[0][-1], solved[1][-1], self.place)
                if count == 1
                else group_checks(solved[0], solved[1], theory)
            )
        return series, checks

    def trained(self) -> Trained:
        """Networks with every number of heads from every seed, trained together."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        networks = Networks.start(self.heads, self.task, self.seeds, generator)
        return train(
            networks,
            self.task,
            steps=self.steps,
            batch=self.batch,
            rate=self.rate,
            seed=self.seed + 2,
        )

    def errors(self, trained: Trained) -> dict[int, dict[str, tuple[np.ndarray, np.ndarray]]]:
        """By length of prompt: errors of the networks ("network"), of debiased descent ("step") and the best head ("single")."""
        alone, (eta, _) = single_head(*self.place), debiased_step(*self.place)
        predictors = {
            "network": trained.networks.predict,
            "step": lambda p: debiased_gd(p.x, p.y, p.query, eta),
            "single": lambda p: kernel_heads(alone[:1], alone[1:2], p.x, p.y, p.query),
        }
        return {
            length: measured_errors(
                predictors, self.task.of_length(length), self.prompts, self.seed + 10 + length
            )
            for length in sorted({*self.lengths, self.examples})
        }

    def compare(self, trained: Trained) -> tuple[list[Series], list[Check]]:
        """Trained networks beside the predictors that theory names, on prompts of every length."""
        found, scores = self.errors(trained), pattern_scores(trained.networks)
        alone, (eta, _) = single_head(*self.place), debiased_step(*self.place)
        x, series, checks = np.array(self.lengths, float), [], []
        for i, count in enumerate(self.heads):
            rows = [interval(found[n]["network"][0][:, i]) for n in self.lengths]
            mean, half = (np.array(part) for part in zip(*rows, strict=True))
            theory = [
                float(found[n]["single"][0])
                if count == 1
                else debiased_risk(self.dimension, n, self.noise, eta)
                for n in self.lengths
            ]
            series.append(
                Series(
                    f"{_heads(count)}, trained",
                    x,
                    mean,
                    half,
                    np.array(theory),
                    "examples of a test prompt",
                    "mean squared error",
                    panel="error by length",
                    log="xy",
                )
            )
            here = found[self.examples]
            beside = here["network"][0][:, i] / here["single" if count == 1 else "step"][0]
            ratio, bar = interval(beside)
            name = "the best softmax head" if count == 1 else "debiased descent"
            checks.append(
                Check(
                    f"trained, {count}",
                    f"{_heads(count)}, trained: error at L = {self.examples} over that of {name}",
                    float(ratio),
                    1.0,
                    tolerance=0.05,
                    error=float(bar),
                    why="5 %: theory is for large d and L, and training ends early",
                )
            )
            if count > 1:
                checks.append(
                    Check(
                        f"zero sum, {count}",
                        f"{_heads(count)}, trained: |sum mu| / sum |mu|, the worst seed",
                        float(scores["sum"][:, i].max()),
                        0.1,
                        why="a tenth",
                        sense="<",
                    )
                )
            mean, half = interval(trained.eta(i), 1)
            series.append(
                Series(
                    f"{_heads(count)}, step",
                    np.maximum(trained.steps, 1),
                    mean,
                    half,
                    np.full(len(mean), alone[0] * alone[1] if count == 1 else eta),
                    "training step",
                    "sum of omega mu",
                    panel="step of descent",
                    log="x",
                )
            )
        return series, checks


def _heads(count: int) -> str:
    return f"{count} head{'s' if count > 1 else ''}"
