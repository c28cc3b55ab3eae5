"""The sparse network and gated learning beside what is expected of them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from regard.labs.brain_basis import gating, graphs
from regard.labs.brain_basis.comparing import mean_of, over_seeds
from regard.labs.results import Check, Series, interval

if TYPE_CHECKING:
    from regard.labs.brain_basis.laboratory import BrainBasis


def networks_part(lab: BrainBasis) -> tuple[list[Series], list[Check]]:
    drawn = [graphs.sparse_brain_graph(lab.nodes, lab.seed + i) for i in range(lab.networks)]
    ours = [
        graphs.graph_measures(links, lab.shuffles, lab.seed + i)
        for i, (links, _) in enumerate(drawn)
    ]
    even = [
        graphs.graph_measures(
            graphs.random_graph(lab.nodes, one.density, lab.seed + 50 + i),
            lab.shuffles,
            lab.seed + i,
        )
        for i, one in enumerate(ours)
    ]
    uneven = np.array([graphs.gini(weights[weights > 0]) for _, weights in drawn])
    lognormal = math.erf(0.5)
    x = np.arange(4.0)
    names = ("small_world", "club")
    series = []
    for label, measured in (("sparse, skewed network", ours), ("uniform random network", even)):
        pairs = [interval(np.array([getattr(one, name) for one in measured])) for name in names]
        series.append(
            Series(
                label,
                x[:2],
                np.array([p[0] for p in pairs]),
                np.array([p[1] for p in pairs]),
                np.ones(2),
                "0: small-world index, 1: rich-club ratio",
                "over degree-preserving shuffles",
                panel="network",
                log="y",
            )
        )
    checks = []
    for name, word, bound in (
        ("small_world", "small-world index", 3.0),
        ("club", "rich-club ratio of the top decile", 1.3),
    ):
        mean, half = mean_of(np.array([getattr(one, name) for one in ours]))
        other, bar = mean_of(np.array([getattr(one, name) for one in even]))
        checks += [
            Check(
                name.replace("_", " "),
                f"The network's {word}, over degree-preserving shuffles",
                mean,
                bound,
                error=half,
                sense=">",
            ),
            Check(
                f"{name.replace('_', ' ')} of chance",
                f"... and a uniform random network's {word}",
                other,
                bound,
                error=bar,
                sense="<",
            ),
        ]
    mean, half = mean_of(uneven)
    checks.append(
        Check(
            "skewed",
            "Gini coefficient of the weights, 2 Phi(1 / sqrt 2) - 1",
            mean,
            lognormal,
            tolerance=0.03,
            error=half,
            why="0.03: a sample of five thousand",
        )
    )
    sparse, bar = mean_of(np.array([one.density for one in ours]))
    checks.append(
        Check(
            "sparse",
            "Share of the possible edges",
            sparse,
            0.0197,
            tolerance=0.004,
            error=bar,
            why="20 % of what was measured before",
        )
    )
    return series, checks


def learning_part(lab: BrainBasis) -> tuple[list[Series], list[Check]]:
    stream = gating.make_stream(lab.seeds, lab.updates, lab.seed + 300)
    always = gating.learn_always(stream)
    gated, guessed = [], []
    for index, k in enumerate(lab.thresholds):
        gated.append(gating.event_gated_learning(stream, k))
        guessed.append(
            gating.learn_at_random(stream, gated[-1].updates.mean(1), lab.seed + 400 + index)
        )
    every = float(always.errors.mean())
    series = [
        over_seeds(
            "gated by events",
            lab.thresholds,
            [one.errors.mean(1) for one in gated],
            "k, standard deviations",
            "mean squared error",
            "learning",
            every,
        ),
        over_seeds(
            "gated at random",
            lab.thresholds,
            [one.errors.mean(1) for one in guessed],
            "k, standard deviations",
            "mean squared error",
            "learning",
        ),
        over_seeds(
            "updates",
            lab.thresholds,
            [one.updates.mean(1) for one in gated],
            "k, standard deviations",
            "share of steps with an update",
        ),
    ]
    checks = []
    if 0.0 in lab.thresholds:
        at = lab.thresholds.index(0.0)
        own, chance = gated[at].errors.mean(1), guessed[at].errors.mean(1)
        for name, says, values, bound in (
            (
                "gated error",
                "Learning from surprising steps only (k = 0): error over that of every step",
                own / always.errors.mean(1),
                1.25,
            ),
            (
                "gated updates",
                "... with few updates: share of the steps",
                gated[at].updates.mean(1),
                0.22,
            ),
            ("gated by chance", "... over the error of as many random updates", own / chance, 0.5),
        ):
            mean, half = mean_of(values)
            checks.append(Check(name, says, mean, bound, error=half, sense="<"))
    return series, checks
