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
from regard.labs.flows import flow


@dataclass(frozen=True, slots=True)
class Scale:
    """Sizes of the trainings: the width and the sequences, the steps of each kind of arm, measurements on the way."""

    width: int = 32
    length: int = 32
    batch: int = 32
    steps: int = 3000
    relu_steps: int = 1500
    deep_steps: int = 1200
    logs: int = 24
    seeds: tuple[int, ...] = (0, 1, 2)


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
    shallow = scale.steps if attention == "softmax" else scale.relu_steps
    steps = shallow if layers == 1 else scale.deep_steps
    size = Size(layers, scale.width, scale.length)
    recipe = Recipe(size, attention, optimiser, steps, RATES[optimiser], scale.batch, scale.logs)
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


def sink_slopes(
    seeds: int, *, symbols: int = 16, others: int = 5, euler: float = 1e3
) -> dict[str, Any]:
    """alpha with beta held, by SciPy's solver: its local slopes against log t from t = 1e4 on, and how far Euler is off."""
    times = np.array([0.0, *np.geomspace(10, 2e5, 44)])
    alphas, limits, off = [], [], []
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        p, xi = rng.dirichlet(np.ones(symbols)) + 1e-3, rng.normal(size=symbols) * np.sqrt(others)
        p /= p.sum()

        def push(alpha: np.ndarray, p: np.ndarray = p, xi: np.ndarray = xi) -> tuple[np.ndarray]:
            held = np.zeros(symbols)
            return (np.asarray(extreme_velocity(float(alpha), held, p, xi, others)[0]),)

        (alpha,) = flow(push, (np.zeros(()),), times)
        alphas.append(alpha[1:])
        limits.append(sink_logit(p, xi, times[1:]))
        at = times[1:][times[1:] <= euler]
        off.append(np.abs(sink_logit_ode(p, xi, others, at) - alpha[1 : len(at) + 1]).max())
    times = times[1:]
    late = times >= 1e4
    slopes = np.diff(np.array(alphas)[:, late], axis=1) / np.diff(np.log(times[late]))
    return {
        "times": times,
        "alpha": np.array(alphas),
        "theory": np.array(limits),
        "slopes": slopes,
        "euler": max(off),
    }


def drain_decay(alphas: tuple[float, ...] = (0.0, 2.0, 4.0)) -> list[dict[str, float]]:
    """For each held alpha: the fitted rate over two late decades beside the predicted one, and how far beta ends from c 1."""
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
        end = {"size": float(np.linalg.norm(beta - beta.mean())), "left": far[-1][1] / far[0][1]}
        found.append({"alpha": alpha, "rate": fitted, "predicted": rate, **end})
    return found
