"""Predictions beside what the worlds of a grid measured: the pictures' series and the checks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from regard.labs.filtering_storing.theory import (
    extraction_error_bound,
    pretraining_floor,
    theory_exponent,
)
from regard.labs.results import Check, Series, interval

Cell = dict[str, Any]
"""One world: what pre-training reached, and `tuned`, a row for each fine-tuning size. Lists hold one number a seed."""


def extraction_series(cells: Sequence[Cell]) -> list[Series]:
    """Extraction over K for each pool and N, beside the accuracy that the bound leaves."""
    series = []
    for pool in dict.fromkeys(cell["templates"] for cell in cells):
        own = [cell for cell in cells if cell["templates"] == pool]
        own.sort(key=lambda cell: cell["multiplicity"])
        counts = np.array([cell["multiplicity"] for cell in own], float)
        fine = np.linspace(counts.min(), counts.max(), 60)
        for index, one in enumerate(own[0]["tuned"]):
            size = one["finetuned"]
            accuracy = lambda at, n=size, r=pool: np.array(  # noqa: E731
                [1 - extraction_error_bound(n, k, r) for k in at]
            )
            mean, half = interval(np.array([cell["tuned"][index]["unseen"] for cell in own]), 1)
            series.append(
                Series(
                    f"|R| = {pool}, N = {size}",
                    counts,
                    mean,
                    half,
                    accuracy(counts),
                    "K, templates of a subject",
                    "accuracy on untouched facts (line: bound)",
                    panel=f"{pool} templates",
                    line=(fine, accuracy(fine)),
                )
            )
    return series


def acquisition_checks(cells: Sequence[Cell], filtered: Cell, noise: int) -> list[Check]:
    """Pre-training: its losses, and where attention goes."""
    above, over = largest(
        [
            np.array(cell["after subject"]) - pretraining_floor(cell["multiplicity"])
            for cell in cells
        ]
    )
    left, spread = largest([np.array(cell["after template"]) for cell in cells])
    mass, bar = mean_of(filtered["between"])
    return [
        Check(
            "floor",
            "Loss after the subject, above log K: largest of all worlds, nats",
            above,
            0.0,
            tolerance=0.02,
            error=over,
            why="0.02 nats: what a finite number of steps leaves",
        ),
        Check(
            "stored",
            "Loss after the template: largest of all worlds, nats",
            left,
            0.0,
            tolerance=0.02,
            error=spread,
            why="0.02 nats: what a finite number of steps leaves",
        ),
        Check(
            "filtered",
            f"Attention of the template on {noise} distractors before it",
            mass,
            0.1,
            sense="<",
            error=bar,
            why=f"even attention has {noise / (noise + 2):.2f} there, the limit of the theory 0",
        ),
    ]


def extraction_checks(cells: Sequence[Cell], width: int) -> list[Check]:
    """Fine-tuning: what can be extracted, and what W1 did for it."""
    rows = [
        (cell["templates"], cell["multiplicity"], one) for cell in cells for one in cell["tuned"]
    ]
    beyond, off = largest(
        [
            1 - np.array(one["unseen"]) - extraction_error_bound(one["finetuned"], count, pool)
            for pool, count, one in rows
        ]
    )
    first, first_bar = smallest([np.array(one["first"]) for _, _, one in rows])
    token, token_bar = smallest([np.array(one["token"]) for _, _, one in rows])
    spans = [np.array(one["templates"]) - pool / width for pool, _, one in rows]
    trigger, trigger_bar = mean_of(np.mean(spans, 0))
    return [
        Check(
            "seen",
            "Accuracy on the fine-tuned facts, smallest of all",
            smallest([np.array(one["seen"]) for _, _, one in rows])[0],
            1.0,
            why="fine-tuning is fitted on these",
        ),
        *axis_checks(rows),
        Check(
            "bound",
            "Error on untouched facts beyond exp(-x): largest of all worlds",
            beyond,
            0.0,
            tolerance=0.02,
            error=off,
            sense="<",
            why="2 %, about one fact; the bound is stated up to constants, and is taken without any",
        ),
        Check(
            "rank one",
            "Share of the update's squared norm in its first singular value, smallest of all",
            first,
            0.5,
            sense=">",
            error=first_bar,
            why="half: the component dominates",
        ),
        Check(
            "token",
            "Norm of the update in the question token's column over the whole, smallest of all",
            token,
            0.7,
            sense=">",
            error=token_bar,
            why="0.7: half of the squared norm",
        ),
        Check(
            "trigger",
            "Share of the question token's update in the span of the templates' features, above a random direction's "
            "|R| / width, mean",
            trigger,
            0.0,
            sense=">",
            error=trigger_bar,
            why="a direction, not a size",
        ),
    ]


def axis_checks(rows: Sequence[tuple[int, int, dict[str, Any]]]) -> list[Check]:
    """Extraction grows along K and N and falls along |R|; an axis of one value says nothing."""
    found = {(pool, count, one["finetuned"]): np.array(one["unseen"]) for pool, count, one in rows}
    checks = []
    for name, axis, says, sign in (
        (
            "more templates",
            1,
            "Gain in accuracy on untouched facts from the smallest to the largest K",
            1,
        ),
        ("more questions", 2, "Gain from the smallest to the largest N", 1),
        ("larger pool", 0, "Loss from the smallest to the largest |R|", -1),
    ):
        values = sorted({key[axis] for key in found})
        if len(values) < 2:
            continue
        low, high = values[0], values[-1]
        whole: dict[Any, Any] = {**found}
        gains = [
            sign * (whole[*key[:axis], high, *key[axis + 1 :]] - part)
            for key, part in whole.items()
            if key[axis] == low
        ]
        mean, half = mean_of(np.mean(gains, 0))
        checks.append(
            Check(
                name,
                f"{says}, mean over the grid",
                mean,
                0.0,
                sense=">",
                error=half,
                why="a direction, not a size",
            )
        )
    means = [float(part.mean()) for part in found.values()]
    if len(set(means)) > 1:
        from scipy.stats import spearmanr

        x = [theory_exponent(size, count, pool) for pool, count, size in found]
        order: Any = spearmanr(x, means)
        checks.append(
            Check(
                "order",
                "Rank correlation of that accuracy with x = N K^2 log|R| / (2 |R|^2) over the grid",
                float(order[0]),
                0.8,
                sense=">",
                why="0.8: an upper bound need not order all worlds",
            )
        )
    return checks


def mean_of(samples: Any) -> tuple[float, float]:
    """Mean over seeds and half of its 95 % interval."""
    mean, half = interval(np.array(samples))
    return float(mean), float(half)


def largest(samples: Sequence[np.ndarray]) -> tuple[float, float]:
    """The largest of several means over seeds, and half of its 95 % interval."""
    return max((mean_of(one) for one in samples), key=lambda pair: pair[0])


def smallest(samples: Sequence[np.ndarray]) -> tuple[float, float]:
    """The smallest of several means over seeds, and half of its 95 % interval."""
    return min((mean_of(one) for one in samples), key=lambda pair: pair[0])
