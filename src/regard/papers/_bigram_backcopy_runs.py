"""The laboratory runs of active-dormant: the flow of one query, and transformers trained on Bigram-Backcopy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from regard.labs.bigram_backcopy import (
    Recipe,
    Size,
    backcopy,
    drain_limit,
    drain_rate,
    extreme_velocity,
    intervene,
    sink_logit,
    sink_logit_ode,
    train,
)


@dataclass(frozen=True, slots=True)
class Scale:
    """Sizes of the trainings: the width and the sequences, and the steps with one and with three layers."""

    width: int = 32
    length: int = 32
    batch: int = 32
    steps: int = 1500
    deep_steps: int = 1200
    seeds: tuple[int, ...] = (0, 1)


RATES = {"adamw": 3e-3, "sgd": 0.3}
"""Learning rates for models this small; the paper has 3e-4 and 0.03 at eight times the width."""

ARMS = {
    "1 layer": (1, "softmax", "adamw"),
    "1 layer, ReLU": (1, "relu", "adamw"),
    "3 layers, Adam": (3, "softmax", "adamw"),
    "3 layers, SGD": (3, "softmax", "sgd"),
}
"""Layers, attention and optimiser of every arm."""


def arm(name: str, scale: Scale) -> dict[str, Any]:
    """The course of one arm, and with one layer of softmax attention what interventions change."""
    layers, attention, optimiser = ARMS[name]
    steps = scale.steps if layers == 1 else scale.deep_steps
    size = Size(layers, scale.width, scale.length)
    recipe = Recipe(size, attention, optimiser, steps, RATES[optimiser], scale.batch)
    language = backcopy()
    course, models = train(recipe, language, list(scale.seeds))
    found = {
        "steps": course.steps.tolist(),
        "measures": {k: v.tolist() for k, v in course.measures.items()},
    }
    found["maps"] = np.round(course.maps, 3).tolist()
    if name == "1 layer":
        changes = intervene(models, language)
        found["interventions"] = {
            n: {k: v.tolist() for k, v in one.items()} for n, one in changes.items()
        }
    return found


def sink_slopes(seeds: int, horizon: float) -> dict[str, Any]:
    """alpha with beta held, 16 symbols and W = 5, and the slope of alpha against log t from horizon / 20 on, per seed."""
    times = np.geomspace(horizon / 200, horizon, 12)
    late = times >= horizon / 20
    alphas, limits = [], []
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        p, xi = rng.dirichlet(np.ones(16)) + 1e-3, rng.normal(size=16) * np.sqrt(5)
        p /= p.sum()
        alphas.append(sink_logit_ode(p, xi, 5, times))
        limits.append(sink_logit(p, xi, times))
    slopes = [np.polyfit(np.log(times[late]), alpha[late], 1)[0] for alpha in alphas]
    return {"times": times, "alpha": np.array(alphas), "theory": np.array(limits), "slopes": slopes}


def drain_decay(alphas: tuple[float, ...] = (0.0, 2.0, 4.0)) -> list[dict[str, float]]:
    """For each held alpha: the fitted rate over two late decades beside the predicted one, and how far beta* is from c 1."""
    rng = np.random.default_rng(0)
    p, xi = rng.dirichlet(np.full(8, 4.0)), rng.normal(size=8) * np.sqrt(5)
    found = []
    for alpha in alphas:
        beta, rate = np.zeros(8), drain_rate(alpha, p, 5)
        limit, far, step = drain_limit(alpha, beta, xi), [], 0.2
        for count in range(int(40 / rate / step)):
            far.append((count * step, float(np.linalg.norm(beta - limit))))
            if far[-1][1] < 1e-5 * far[0][1]:
                break
            beta = beta + step * extreme_velocity(alpha, beta, p, xi, 5)[1]
        late = np.array([row for row in far if row[1] < 1e-3 * far[0][1]])
        fitted = float(-np.polyfit(late[:, 0], np.log(late[:, 1]), 1)[0])
        size = float(np.linalg.norm(limit - limit.mean()))
        found.append({"alpha": alpha, "rate": fitted, "predicted": rate, "size": size})
    return found
