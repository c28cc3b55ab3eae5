"""The training part of `attention-sink-emerges`: some arms of the laboratory `sink-emergence`, their claims and their film."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from regard.labs.sink_emergence import (
    ARMS,
    FACTORS,
    PREDICTIONS,
    Arm,
    Course,
    Prediction,
    SinkEmergence,
    SinkResult,
    even_importance,
    film,
    join,
    side_by_side,
)
from regard.papers import Claim, Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TRAINED = (
    "default",
    "fixed token 1st",
    "fixed token 2nd",
    "sigmoid",
    "K biases",
)
"""The arms that the main claims need; the laboratory has the others."""
QUICK = SinkEmergence(
    factors=FACTORS,
    layers=2,
    heads=2,
    width=16,
    hidden=16,
    batch=1,
    steps=2,
    frames=1,
    sequences=2,
    seeds=2,
)
FULL = SinkEmergence(
    factors=FACTORS,
    layers=3,
    heads=2,
    rate=1e-2,
    batch=8,
    steps=2500,
    frames=8,
    seeds=3,
)
AT_ONCE = 9
"""Runs that one piece of the training takes at most, unless it is one seed of several arms."""
FAR = "the paper's sink appears after a billion tokens, and it finds none with 50 to 100 million tokens of text"
SETTING = "60 million parameters, 5 billion tokens"
STATED = {one.name: one for one in PREDICTIONS if set(one.arms) <= set(TRAINED)}


def claims() -> list[Claim]:
    """What the paper says of the training runs that are made here."""
    even = Claim(
        "trained start",
        "Before training attention is even: importance of the first key (closed form H_T / T)",
        setting=SETTING,
        paper="0.074 for T = 64, by the formula",
        expect="within 10 % of the formula",
    )
    return [even, *(_claim(one) for one in STATED.values())]


def _claim(one: Prediction) -> Claim:
    return Claim(
        f"trained {one.name}",
        one.says,
        setting=SETTING,
        paper=one.paper,
        unit=f" {one.unit}",
        expect=one.expected,
    )


def record_training(run: Run) -> None:
    """Trains the arms in pieces that an interrupted run keeps, and records the claims."""
    lab = run.pick(quick=QUICK, full=FULL)
    seeds = list(range(lab.seeds))
    for seed in seeds:
        run.seed(seed)
    result = lab.report(follow(run, lab, seeds))
    course = result.course
    tokens = lab.steps * lab.batch * lab.context
    here = (
        f"{lab.layers} layers x {lab.heads} heads, width {lab.width}, T = {lab.context}, {lab.vocabulary} byte-pair tokens, rate "
        f"{lab.rate:g}, {lab.steps:,} steps of {lab.batch} sequences ({tokens / 1e6:.2g} million tokens), {lab.seeds} seeds, "
        f"{lab.sequences} held-out sequences"
    )
    for name in ("start", *STATED):
        verdict = result.checks[name]
        # a verdict that is left open has no interval of its own
        check = STATED[name].check(course) if name in STATED else verdict
        arms = STATED[name].arms if name in STATED else ("default",)
        note = (
            f"interval: 95 % of the mean over seeds{_each(course, name)}; {_beside(course, arms)}"
        )
        if verdict.holds is None:
            why = verdict.why if math.isnan(verdict.error) else "the interval is too wide to tell"
            note = f"not shown: {why}; {note}"
        elif not verdict.holds:
            note = f"{FAR}; {note}"
        run.record(
            f"trained {name}",
            here=check.measured,
            interval=(check.measured - check.error, check.measured + check.error),
            holds=verdict.holds,
            setting=here,
            note=note,
        )
    run.figure("training", draw_curves(result, lab.context))
    run.figure(
        "film", film(course, run.pick(quick=TRAINED[:1], full=TRAINED)), format="png", dpi=100
    )


def follow(
    run: Run, lab: SinkEmergence, seeds: Sequence[int], names: Sequence[str] = TRAINED
) -> Course:
    """The arms of these names from every seed, in pieces of at most `AT_ONCE` runs."""
    groups = [[arm for arm in group if arm.name in names] for group in lab.groups()]
    pieces = []
    for group in filter(None, groups):
        whole = len(group) * len(seeds) <= AT_ONCE
        pieces += [(group, part) for part in ([seeds] if whole else [[seed] for seed in seeds])]
    done: dict[tuple[str, ...], list[Course]] = {}
    for group, part in run.progress(pieces, "training"):
        name = f"train/{group[0].name}/{'-'.join(map(str, part))}"
        kept = run.partial(name, lambda g=group, p=part: lab.follow(g, p).plain())
        done.setdefault(tuple(arm.name for arm in group), []).append(Course.of(kept))
    return join([side_by_side(courses) for courses in done.values()])


def _each(course: Course, name: str) -> str:
    """The number of every seed, where it differs from seed to seed."""
    if name not in STATED:
        return ""
    values = STATED[name].value(course)
    if np.ptp(values) == 0:
        return ""
    return f", which give {', '.join(f'{value:.3g}' for value in values)}"


def _beside(course: Course, arms: Sequence[str]) -> str:
    """The rates from which a number was made."""
    parts = []
    for arm in arms:
        row = course.row(arm)
        learnt = course.learnt[row, :, -1].mean()
        star = f"Sink_* {learnt:.1f}, " if learnt else ""
        first = ", ".join(f"{rate:.1f}" for rate in course.rates[row, :, -1].mean(0)[:3])
        importance = ", ".join(f"{a:.3f}" for a in course.importance[row, :, -1].mean(0)[:3])
        loss = course.loss[row, :, -1].mean()
        parts.append(
            f"{arm}: {star}Sink_1 to Sink_3 {first} %, a_1 to a_3 {importance}, loss {loss:.3f}"
        )
    return "; ".join(parts)


def draw_curves(result: SinkResult, context: int) -> Figure:
    """Sink rate and importance over the steps where the paper finds the sink, and the loss; bold the mean, thin each seed."""
    import matplotlib.pyplot as plt

    course = result.course
    figure, axes = plt.subplots(1, 3, figsize=(12.5, 3.8), layout="constrained")
    for index, arm in enumerate(arm for arm in ARMS if arm.name in course.arms):
        row, colour = course.row(arm.name), f"C{index}"
        _lines(axes[0], course.steps, course.sink(arm.name, arm.sink), colour, _label(arm))
        if arm.sink:
            _lines(axes[1], course.steps, course.importance[row, ..., arm.sink - 1], colour)
        _lines(axes[2], course.steps[1:], course.loss[row, :, 1:], colour)
    even = float(even_importance(context)[0])
    axes[1].axhline(even, color="0.6", lw=0.9, ls="--", label="even attention, k = 1")
    axes[1].legend(frameon=False, fontsize=8)
    axes[0].set(ylabel="sink rate, % of heads", title="who becomes a sink")
    axes[1].set(ylabel="importance a_k, mean over heads", title="what the same position is given")
    axes[2].set(ylabel="held-out loss, nats a token", title="loss")
    for ax in axes:
        ax.set(xlabel="step")
    for ax in axes[:2]:
        ax.set_ylim(0, None)
    axes[0].legend(frameon=False, fontsize=8)
    return figure


def _label(arm: Arm) -> str:
    return f"{arm.name}: Sink_{arm.sink or '*'}"


def _lines(ax: Axes, steps: np.ndarray, values: np.ndarray, colour: str, label: str = "") -> None:
    ax.plot(steps, values.T, lw=0.7, alpha=0.5, color=colour)
    ax.plot(steps, values.mean(0), "o-", ms=3, lw=1.8, color=colour, label=label or None)
