"""Predictions beside measurements, as series and checks; all of conditioning, which needs no random numbers, is here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from regard.labs.pavlovian import theory
from regard.labs.pavlovian.conditioning import A, B, phenomena, predictions, trials
from regard.labs.pavlovian.rules import Rule, responses
from regard.labs.results import Check, Series, interval
from regard.ops import delta_rule
from regard.ops.linear_attention import causal_product


def conditioning_checks(rules: Mapping[str, Rule], first: int, second: int) -> list[Check]:
    """Every protocol for every rule against its closed form."""
    off, limits = {}, {}
    for name, rule in rules.items():
        gaps = phenomena(rule, first, second).off(predictions(rule, first, second))
        limits[name] = gaps.pop("inhibited")
        off[name] = max(gaps.values())
    return [
        Check(
            "closed forms",
            f"Protocols against closed forms, largest difference ({max(off, key=lambda k: off[k])})",
            max(off.values()),
            0.0,
            tolerance=1e-10,
            why="double precision",
        ),
        Check(
            "inhibition",
            "V_B of conditioned inhibition against its limit, largest difference",
            max(limits.values()),
            0.0,
            tolerance=1e-3,
            why="0.001: the limit is that of endless trials",
        ),
    ]


def operator_checks(rate: float, first: int, second: int) -> list[Check]:
    """Blocking through the delta rule and through linear attention of `regard.ops`."""
    keys, outcomes = trials([(A, 1.0, first), (A + B, 1.0, second)])
    key, value = keys[None, None], outcomes[None, None, :, None]
    _, delta = delta_rule(key, key, value, torch.full_like(key[..., 0], rate))
    _, sums = causal_product(key, key, rate * value)
    found = (
        ("the delta rule", delta[0, 0, 0] @ B, theory.blocked_response(rate, first, second)),
        ("linear attention", sums[0, 0, :, 0] @ B, rate * second),
    )
    return [
        Check(
            name,
            f"V_B of blocking through {name} of regard.ops",
            float(here),
            wanted,
            tolerance=1e-10,
            why="double precision",
        )
        for name, here, wanted in found
    ]


def conditioning_series(rules: Mapping[str, Rule], first: int, second: int) -> list[Series]:
    """V_B along blocking, and V_A along acquisition and extinction."""
    blocking, fading = [], []
    for name, rule in rules.items():
        course = responses(rule, *trials([(A, 1.0, first), (A + B, 1.0, second)]), B[None])
        blocking.append(
            Series.of(
                name,
                range(second + 1),
                [(float(v), 0.0) for v in course[first:, 0]],
                [predictions(rule, first, n).blocked for n in range(second + 1)],
                "trials of A and B together",
                "V_B after A was trained",
                panel="blocking",
            )
        )
        course = responses(rule, *trials([(A, 1.0, first), (A, 0.0, second)]), A[None])
        rising = [predictions(rule, n, 0).acquired if n else 0.0 for n in range(first)]
        falling = [predictions(rule, first, n).extinguished for n in range(second + 1)]
        fading.append(
            Series.of(
                f"{name}, V_A",
                range(first + second + 1),
                [(float(v), 0.0) for v in course[:, 0]],
                rising + falling,
                f"trials, {first} with the outcome and the rest without",
                "V_A",
                panel="acquisition and extinction",
            )
        )
    return blocking + fading


def mean_of(samples: torch.Tensor) -> tuple[float, float]:
    mean, half = interval(samples.numpy())
    return float(mean), float(half)


def closest(
    name: str,
    says: str,
    x: Sequence[int],
    measured: Sequence[tuple[float, float]],
    predicted: Sequence[float],
    symbol: str,
) -> Check:
    """Measured over predicted, at the point that agrees least."""
    ratios = [(mean / p, half / p) for (mean, half), p in zip(measured, predicted, strict=True)]
    worst = max(range(len(ratios)), key=lambda i: abs(ratios[i][0] - 1))
    return Check(
        name,
        f"{says} over its formula at {symbol} = {x[worst]}, the worst of all",
        ratios[worst][0],
        1.0,
        tolerance=0.05,
        error=ratios[worst][1],
        why="5 %",
    )
