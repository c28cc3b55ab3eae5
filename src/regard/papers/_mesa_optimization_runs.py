"""Experiments of `mesa-optimization`: training from several laws and sizes of the first token, kept as plain values."""

from __future__ import annotations

from typing import Any

import numpy as np

from regard.labs.mesa_optimization import (
    MesaOptimization,
    Trained,
    diagonal_part,
    linear_causal_attention,
    one_step_ols_gd,
)
from regard.labs.results import Check, interval


def course(lab: MesaOptimization) -> dict[str, Any]:
    """A training from every start: a b and what else the theorem speaks of by step, and the flow's a b at the same times.

    `limit` is the closed form; `loss` has the first and the last value of each start, means over seeds.
    """
    trained = lab.trained()
    product, _ = lab.predicted(trained)
    answers = lab.answers(trained)
    return {
        "limit": lab.limit,
        "steps": trained.steps.tolist(),
        "product": trained.product.tolist(),
        "flow": product.tolist(),
        "balance": trained.balance.tolist(),
        "stray": trained.stray[-1].tolist(),
        "loss": trained.loss[[0, -1]].mean(1).tolist(),
        "ratio": answers.ratio.tolist(),
        "error": answers.error.tolist(),
        "gap": answers.gap.tolist(),
        "size": _sizes(trained),
    }


def _sizes(trained: Trained) -> dict[str, Any]:
    """Mean size over seeds of every entry at the end, for the first start."""
    return {
        "value": trained.value[:, 0].abs().mean(0).tolist(),
        "key": trained.key[:, 0].abs().mean(0).tolist(),
    }


def worst(courses: list[dict[str, Any]]) -> tuple[Check, str]:
    """a b over the closed form at the end, of the course and start where it agrees least; with all of them in words.

    It agrees when it is within 3 %, and is undecided when the 95 % interval over seeds is wider than that.
    """
    checks, shown = [], []
    for one in courses:
        mean, half = interval(np.array(one["product"])[-1] / one["limit"])
        for value, bar in zip(mean.tolist(), half.tolist(), strict=True):
            checks.append(Check("step", "", value, 1.0, tolerance=0.03, error=bar))
        shown.append(f"{one['limit']:.4f}: " + ", ".join(f"{v:.3f}" for v in mean))
    return max(checks, key=lambda c: c.off), "; ".join(shown)


def flow_gap(one: dict[str, Any]) -> float:
    """Largest distance of a b, mean over seeds, from the flow at the same time, over the larger end of each start's course."""
    product, flow = np.array(one["product"]).mean(1), np.array(one["flow"]).mean(1)
    ends = np.maximum(np.abs(flow[0]), np.abs(flow[-1]))
    return float((np.abs(product - flow).max(0) / ends).max())


def drift(one: dict[str, Any], lab: MesaOptimization) -> float:
    """Largest drift of a^2 - b^2, mean over seeds, over a^2 + b^2 of the start."""
    balance = np.array(one["balance"]).mean(1)
    size = np.square(lab.a) + np.square(lab.b)
    return float((np.abs(balance - balance[0]).max(0) / np.maximum(size, 2 * lab.limit)).max())


def exactness(lab: MesaOptimization, count: int) -> float:
    """A layer with a_j = a, b_j = b and no other entries beside a step of descent of size a b: largest difference,
    over the largest prediction."""
    import torch

    from regard.labs.mesa_optimization import begin

    generator = torch.Generator().manual_seed(3)
    trained = lab.trained()
    gap = 0.0
    in_value, in_key = diagonal_part(lab.dimension)
    for s in range(lab.seeds):
        b = float(trained.value[s, 0, in_value].real.mean())
        a = float(trained.key[s, 0, in_key].real.mean())
        value, key = (part.to(torch.complex128) for part in begin((a,), (b,), lab.dimension, 1))
        x = lab.draw((1, count), generator).to(torch.complex128)
        expected = one_step_ols_gd(x, a * b)
        found = linear_causal_attention(value, key, x)[:, 0]
        gap = max(gap, float((found - expected).abs().max() / expected.abs().max()))
    return gap
