"""The laboratory: trains the arms of the chosen factors and puts the paper's statements beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from regard._errors import InputError
from regard.labs.films import FilmedResult
from regard.labs.results import Series, interval
from regard.labs.settings import Lab, setting
from regard.labs.sink_emergence.arms import FACTORS, Arm, arms_of
from regard.labs.sink_emergence.course import SHOWN, Course, join
from regard.labs.sink_emergence.data import corpus
from regard.labs.sink_emergence.film import animate, film
from regard.labs.sink_emergence.metric import even_importance
from regard.labs.sink_emergence.models import Size
from regard.labs.sink_emergence.predictions import compare
from regard.labs.sink_emergence.training import Recipe, train

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, slots=True)
class SinkResult(FilmedResult):
    """What the laboratory gives, with the course itself, from which the film is made."""

    course: Course

    def film(self, arms: Sequence[str] | None = None) -> Figure:
        """Attention maps by arm and step (needs the `plot` extra)."""
        return film(self.course, arms)

    def animate(self, path: Path) -> Path:
        """The same for every measured step, as a GIF (needs the `plot` extra)."""
        return animate(self.course, path)


@dataclass(frozen=True, kw_only=True)
class SinkEmergence(Lab):
    """The laboratory: small language models trained on text, one factor changed at a time, and their sinks on the way."""

    name: ClassVar[str] = "sink-emergence"
    factors: tuple[str, ...] = setting(("bias",), "what is varied, one at a time", choices=FACTORS)
    layers: int = setting(3, "layers", low=2, high=64)
    heads: int = setting(4, "heads of a layer", low=1, high=64)
    width: int = setting(64, "width of the residual stream", low=4, high=4096)
    hidden: int = setting(128, "width of the hidden layer of SwiGLU", low=4, high=16_384)
    vocabulary: int = setting(
        256, "tokens of the byte-pair vocabulary; 256 are bytes", low=256, high=8192
    )
    context: int = setting(64, "tokens of a sequence, T", low=SHOWN, high=1024)
    batch: int = setting(8, "sequences in a step", low=1, high=1024)
    steps: int = setting(600, "optimiser steps", low=1, high=1_000_000)
    rate: float = setting(4e-3, "learning rate of the default run", above=0, below=1)
    decay: float = setting(0.1, "weight decay of the default run", low=0, high=10)
    warmup: int = setting(100, "steps in which the rate grows", low=0, high=100_000)
    frames: int = setting(8, "measurements on the way, after the one at the start", low=1, high=100)
    sequences: int = setting(100, "held-out sequences of a measurement", low=1, high=10_000)
    eps: float = setting(0.3, "importance above which a key is a sink", above=0, below=1)
    seeds: int = setting(3, "runs of each arm", low=2, high=64)
    seed: int = setting(0, "first of the random seeds", low=0, high=2**20)

    def check(self) -> None:
        _ = self.size
        if self.eps <= even_importance(self.context)[0]:
            raise InputError.of(
                "eps",
                given=self.eps,
                expected=f"above {even_importance(self.context)[0]:.2g} for this context",
                fix="attention that spreads evenly would count as a sink",
            )

    @property
    def size(self) -> Size:
        """The size of the models."""
        return Size(self.layers, self.heads, self.width, self.hidden)

    @property
    def recipe(self) -> Recipe:
        """What all runs share."""
        early = np.geomspace(max(1, self.steps / 20), self.steps, self.frames)
        logged = tuple(np.unique(np.r_[0, early.round()]).astype(int).tolist())
        return Recipe(
            self.size,
            self.context,
            self.batch,
            self.steps,
            self.rate,
            self.decay,
            self.warmup,
            logged,
            self.sequences,
            self.eps,
        )

    def groups(self) -> list[list[Arm]]:
        """The arms, those of one architecture together: each group trains at once."""
        found: dict[tuple[str, str], list[Arm]] = {}
        for arm in arms_of(self.factors):
            found.setdefault(arm.architecture, []).append(arm)
        return list(found.values())

    def follow(self, arms: Sequence[Arm], seeds: Sequence[int] | None = None) -> Course:
        """Trains arms of one architecture, from every seed unless some are given."""
        chosen = range(self.seed, self.seed + self.seeds) if seeds is None else seeds
        return train(arms, chosen, self.recipe, corpus(self.vocabulary))

    def report(self, course: Course) -> SinkResult:
        """Series and checks of a course that has the default run."""
        arms = [arm for arm in arms_of(self.factors) if arm.name in course.arms]
        series = [_start(course, self.context)]
        for arm in arms:
            where = f"Sink_{arm.sink or '*'}"
            series.append(
                _curve(
                    arm.name if arm.sink == 1 else f"{arm.name} ({where})",
                    course,
                    course.sink(arm.name, arm.sink),
                    arm.factor or "default",
                    "sink rate, % of heads",
                )
            )
            if arm.sink != 1:
                series.append(
                    _curve(
                        f"{arm.name} (Sink_1)",
                        course,
                        course.sink(arm.name, 1),
                        f"{arm.factor}: the first token",
                        "sink rate, % of heads",
                    )
                )
        for arm in arms:
            series.append(
                _curve(
                    f"{arm.name}, loss",
                    course,
                    course.loss[course.row(arm.name)],
                    f"{arm.factor or 'default'}, loss",
                    "held-out loss, nats a token",
                )
            )
        return SinkResult.of(self, (series, compare(course, self.context)), course=course)

    def run(self) -> SinkResult:
        return self.report(join([self.follow(group) for group in self.groups()]))


def _start(course: Course, context: int) -> Series:
    """Importance of every key before training, beside that of even attention."""
    mean, half = interval(course.importance[course.row("default"), :, 0])
    keys = np.arange(1.0, len(mean) + 1)
    return Series(
        "before training",
        keys,
        mean,
        half,
        even_importance(context)[: len(mean)],
        "key position k",
        "importance a_k",
        log="x",
    )


def _curve(name: str, course: Course, values: np.ndarray, panel: str, label: str) -> Series:
    mean, half = interval(values)
    silent = np.full(len(mean), np.nan)
    return Series(name, course.steps.astype(float), mean, half, silent, "step", label, panel=panel)
