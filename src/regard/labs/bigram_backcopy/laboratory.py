"""The laboratory: one arm trained from several seeds, its course and what interventions change."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from regard.labs.bigram_backcopy.data import backcopy
from regard.labs.bigram_backcopy.film import animate, film
from regard.labs.bigram_backcopy.models import Size
from regard.labs.bigram_backcopy.training import Course, Recipe, intervene, train
from regard.labs.films import FilmedResult
from regard.labs.results import Check, Series, interval
from regard.labs.settings import Lab, setting

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, slots=True)
class BackcopyResult(FilmedResult):
    """What the laboratory gives, with the course itself, from which the film is made."""

    course: Course

    def film(self, frames: int = 6) -> Figure:
        """Attention, drain and peak over the steps (needs the `plot` extra)."""
        return film(self.course, frames)

    def animate(self, path: Path) -> Path:
        """The same for every measured step, as a GIF (needs the `plot` extra)."""
        return animate(self.course, path)


@dataclass(frozen=True, kw_only=True)
class BigramBackcopy(Lab):
    """The laboratory: transformers learn Bigram-Backcopy while the instruments watch."""

    name: ClassVar[str] = "bigram-backcopy"
    layers: int = setting(1, "layers", low=1, high=16)
    attention: str = setting("softmax", "attention", choices=("softmax", "relu"))
    optimiser: str = setting("adamw", "optimiser", choices=("adamw", "sgd"))
    symbols: int = setting(32, "characters of the language", low=8, high=40)
    triggers: int = setting(3, "most frequent characters that copy back, k", low=1, high=7)
    width: int = setting(32, "width of the residual stream", low=4, high=1024)
    length: int = setting(32, "tokens of a sequence", low=8, high=1024)
    batch: int = setting(32, "sequences in a step", low=1, high=1024)
    steps: int = setting(1500, "optimiser steps", low=10, high=1_000_000)
    rate: float = setting(3e-3, "learning rate", above=0, high=1)
    logs: int = setting(16, "measurements on the way", low=2, high=200)
    seeds: int = setting(2, "runs trained at once", low=2, high=64)
    seed: int = setting(0, "first of the random seeds", low=0, high=2**20)

    def run(self) -> BackcopyResult:
        language = backcopy(self.symbols, self.triggers)
        size = Size(self.layers, self.width, self.length)
        recipe = Recipe(
            size, self.attention, self.optimiser, self.steps, self.rate, self.batch, self.logs
        )
        course, models = train(recipe, language, list(range(self.seed, self.seed + self.seeds)))
        changes = intervene(models, language)
        series = [one for name in course.measures for one in _series(name, course)]
        return BackcopyResult.of(self, (series, self._checks(course, changes)), course=course)

    def _checks(self, course: Course, changes: dict[str, dict[str, np.ndarray]]) -> list[Check]:
        def end(name: str, best: str) -> tuple[float, float]:
            values = getattr(course.measures[name][-1], best)(1)  # over layers
            mean, half = interval(values)
            return float(mean), float(half)

        rows = [
            (
                "sink",
                "Attention of ordinary queries to <s>, the layer with the most",
                "ordinary to <s>",
                "max",
                ">",
                0.9,
            ),
            (
                "copy",
                "Attention of triggers to the token before, the layer with the most",
                "trigger to previous",
                "max",
                ">",
                0.9,
            ),
            (
                "drain",
                "Value of <s> over the others', the layer with the least",
                "drain",
                "min",
                "<",
                0.1,
            ),
        ]
        found = []
        for name, says, measure, best, sense, bound in rows:
            measured, error = end(measure, best)
            why = "the paper says near 1 or near 0"
            found.append(Check(name, says, measured, bound, error=error, sense=sense, why=why))
        mean, half = interval(changes["zero"]["trigger"])
        says = "Loss that zeroed heads cost at triggers, nats"
        found.append(
            Check(
                "active",
                says,
                float(mean),
                1.0,
                error=float(half),
                sense=">",
                why="copying is worth several nats",
            )
        )
        return found


def _series(name: str, course: Course) -> list[Series]:
    """A series for each layer or site of one measure."""
    values = course.measures[name]
    values = values[..., None] if values.ndim == 2 else values
    mean, half = interval(values, 1)
    place = "site" if name == "peak" else "layer"
    unit = {
        "entropy": "nats",
        "delta logit": "logits",
        "spread": "logits",
        "drain": "ratio",
        "peak": "ratio",
    }
    label = f"{name}, {'nats' if 'excess' in name else unit.get(name, 'share')}"
    x, silent = course.steps.astype(float), np.full(len(mean), np.nan)
    return [
        Series(
            f"{name} ({place} {i})", x, mean[:, i], half[:, i], silent, "step", label, panel=name
        )
        for i in range(mean.shape[1])
    ]
