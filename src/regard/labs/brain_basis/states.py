"""Latching attention and its sequences beside what is expected of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from regard.labs.brain_basis import latching
from regard.labs.brain_basis.comparing import mean_of, over_seeds
from regard.labs.results import Check, Series

if TYPE_CHECKING:
    from regard.labs.brain_basis.laboratory import BrainBasis

REGIMES = {
    # gain: distinct tokens, dwell in steps, share of the time on, each from 5 seeds
    0.5: ((3, 11), (49, 114), (0.89, 0.93)),
    1.0: ((12, 19), (20, 21), (0.66, 0.79)),
}
"""What latching attention did when it was measured before, lowest and highest over seeds."""
GROUPS, EACH = 5, 4
CHANCE = (EACH - 1) / (GROUPS * EACH - 1)
"""Share of successors in the own group if all were alike."""


def latching_part(lab: BrainBasis) -> tuple[list[Series], list[Check]]:
    walks = lab.regimes()
    over = [walks[f"g = {gain:g}"] for gain in lab.gains]
    series = [
        over_seeds(
            "distinct tokens",
            lab.gains,
            [w.distinct for w in over],
            "g, weight of fatigue",
            "different keys that were on",
        ),
        over_seeds(
            "dwell", lab.gains, [w.dwell for w in over], "g, weight of fatigue", "steps on one key"
        ),
        over_seeds(
            "time on",
            lab.gains,
            [w.share for w in over],
            "g, weight of fatigue",
            "share of time with a key on",
        ),
    ]
    checks = []
    if 0.0 in lab.gains:
        still = walks["g = 0"]
        checks.append(
            Check(
                "retrieval",
                "Without fatigue one key is held for ever: most different keys",
                float(still.distinct.max()),
                1.0,
            )
        )
    for gain, ranges in REGIMES.items():
        if gain in lab.gains:
            walk = walks[f"g = {gain:g}"]
            off = max(
                outside(v, r)
                for v, r in zip((walk.distinct, walk.dwell, walk.share), ranges, strict=True)
            )
            checks.append(
                Check(
                    f"regime {gain:g}",
                    f"At g = {gain:g} keys come and go as measured before: furthest outside of distinct keys {ranges[0]}, "
                    f"dwell {ranges[1]} and time on {ranges[2]}, as a share",
                    off,
                    0.2,
                    sense="<",
                    why="20 %: ranges of five other seeds",
                )
            )
    if 2.0 in lab.gains:
        mixed = walks["g = 2"]
        checks.append(
            Check(
                "mixtures",
                "At g = 2 no key wins: largest share of time with one on",
                float(mixed.share.max()),
                0.012,
                sense="<",
                why="1 % before, and 20 %",
            )
        )
    warm, quiet = walks["beta = 3"], walks["g = 0.5, no noise"]
    checks += [
        Check(
            "warm",
            "At beta = 3 no key is ever on: largest share of time",
            float(warm.share.max()),
            0.0,
        ),
        Check(
            "noise-free",
            "Fatigue drives it, not noise: share of the seeds that move on without noise",
            float((quiet.distinct > 1).mean()),
            0.5,
            sense=">",
            why="4 of 5 before; most of them",
        ),
    ]
    return series, checks


def sequences_part(lab: BrainBasis) -> tuple[list[Series], list[Check]]:
    """Where the walk goes when keys come in groups."""
    staying, distinct = [], []
    for index, c in enumerate(lab.correlations):
        generator = torch.Generator().manual_seed(lab.seed + 100 + index)
        keys = latching.grouped_keys(lab.seeds, generator, GROUPS, EACH, correlation=c)
        walked = latching.walk(keys, lab.steps, generator, gain=0.6, tau=40.0)
        staying.append(walked.staying(EACH))
        distinct.append(walked.distinct.astype(float))
    series = [
        over_seeds(
            "within the group",
            lab.correlations,
            staying,
            "c, overlap within a group",
            "share of transitions",
        ),
        over_seeds(
            "keys visited",
            lab.correlations,
            distinct,
            "c, overlap within a group",
            "different keys that were on",
        ),
    ]
    checks = []
    at = {
        c: (s[np.isfinite(s)], d)
        for c, s, d in zip(lab.correlations, staying, distinct, strict=True)
    }
    if 0.0 in at:
        mean, half = mean_of(at[0.0][0])
        checks.append(
            Check(
                "unrelated",
                "Keys without groups: transitions within a group, share",
                mean,
                CHANCE,
                tolerance=0.15,
                error=half,
                why="0.15: keys overlap by chance",
            )
        )
    if 0.2 in at:
        mean, half = mean_of(at[0.2][0])
        checks.append(
            Check(
                "related",
                "Keys with an overlap of 0.2 follow each other: transitions within the group, share",
                mean,
                0.6,
                error=half,
                sense=">",
                why="0.75 to 1 before, and 20 %",
            )
        )
        free, bar = mean_of(at[0.2][1])
        checks.append(
            Check(
                "free",
                "... and still reach other groups: different keys",
                free,
                float(EACH),
                error=bar,
                sense=">",
                why="more than one group has",
            )
        )
    if 0.5 in at:
        checks.append(
            Check(
                "trapped",
                "At an overlap of 0.5 the walk never leaves its group: most different keys",
                float(at[0.5][1].max()),
                float(EACH),
                sense="<",
            )
        )
    return series, checks


def outside(values: np.ndarray, bounds: tuple[float | int, float | int]) -> float:
    """How far the furthest value lies outside of a range, as a share of the end it passes; 0 inside."""
    low, high = bounds
    return float(np.maximum(0, np.maximum((low - values) / low, (values - high) / high)).max())
