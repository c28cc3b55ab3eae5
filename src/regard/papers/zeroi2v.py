"""ZeroI2V: an image transformer that reads video at the cost of an image transformer (arXiv 2310.01324).

A small ViT is trained to name still digits and then frozen. Clips show one digit that moves in one of eight directions; every
test clip is there backwards too, with the opposite direction, so a model that cannot see the order of frames is right on at most
half of them. Checked here:

* merged adapters against unmerged ones, parameters and multiply-adds against the image model's;
* that order is invisible without temporal heads and an embedding of time;
* accuracy on directions with a head only, adapters, temporal heads and both, and with all weights trained.

Beyond our scale: Kinetics, Something-Something V2 and CLIP weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import TYPE_CHECKING, Any

from regard.papers import Claim, Paper, Run
from regard.papers import _zeroi2v_runs as runs
from regard.papers._zeroi2v_runs import ALL, ARMS, BLIND, COMPARED, SEES, TIMED, Scale

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAPER = Paper(
    "zeroi2v",
    claims=[
        Claim(
            "merge",
            "Merged adapters compute what they did beside the layers: largest difference of logits after training",
            setting="linear adapters, re-parametrised",
            paper="0",
            expect="below 1e-5 in float32",
            holds=lambda difference: difference < 1e-5,
        ),
        Claim(
            "free",
            "The merged video model has the parameters and multiply-adds of the image model: ratios",
            setting="inference",
            paper="1",
            expect="exactly 1",
            holds=lambda here: set(here.values()) == {1.0},
        ),
        Claim(
            "time",
            "Temporal heads take no time: wall-clock on the same frames over the image model's",
            setting="inference, 422 GFLOPs both",
            paper="1",
            unit="x",
            expect="at most 1.1",
            holds=lambda ratio: ratio <= 1.1,
        ),
        Claim(
            "blind",
            "Without temporal heads and an embedding of time the order of frames changes nothing: difference of logits",
            setting="not in the paper: follows from averaging over frames",
            expect="below 1e-5, and at most 50 % right on clips and their reversals",
        ),
        Claim(
            "order",
            "Temporal heads let adapters see motion: accuracy on directions, in points above adapters alone",
            setting="Something-Something V2, 67.7 % with ViT-B/16",
            unit=" points",
            expect="at least 20",
        ),
        Claim(
            "ceiling",
            "Adapters and temporal heads reach what training all weights reaches: difference in points",
            setting="matches or beats full fine-tuning",
            paper="at least 0",
            unit=" points",
            expect="at least -5",
        ),
        Claim(
            "embedding",
            "Temporal heads see more than an embedding of time alone: difference in points",
            setting="the model has both",
            unit=" points",
            expect="at least 5",
        ),
        Claim(
            "kinetics",
            "K400 83.0 % (ViT-B/16) and 87.2 % (ViT-L/14), Something-Something V2 67.7 % and 72.2 %",
            setting="CLIP weights",
            paper="83.0, 87.2, 67.7, 72.2 %",
            beyond="needs CLIP's weights, the data sets and days of accelerators",
        ),
    ],
    needs=("matplotlib", "sklearn"),
)


Found = Mapping[str, Sequence[Mapping[str, Any]]]
"""What was measured with each seed, by arm."""


def experiment(run: Run) -> None:
    # rates and sizes were chosen with seed 0
    seeds = run.pick(quick=[0], full=[1, 2, 3])
    for seed in seeds:
        run.seed(seed)
    scale = run.pick(
        quick=Scale(still_steps=2, steps=2, width=24, layers=1, still_batch=8, batch=4, test=40),
        full=Scale(),
    )
    digits = runs.digit_images()
    tower, named = runs.pretrain(digits, scale)
    arms = run.pick(quick=COMPARED, full=tuple(ARMS))
    trainings = [
        (name, seed) for name in arms for seed in (seeds if name in COMPARED else seeds[:1])
    ]
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in arms}
    for name, seed in run.progress(trainings, "directions"):
        one = run.partial(
            f"{name}/{seed}",
            lambda n=name, s=seed: runs.train_arm(tower, digits, n, s, scale),
        )
        found[name].append(one)
    cost = runs.inference_cost(tower, scale, run.pick(quick=1, full=20))
    own = sum(parameter.numel() for parameter in tower.parameters())
    record_cost(run, found, cost, own)
    record_accuracy(run, found, scale, named)
    run.figure("directions", draw(found))


def record_cost(run: Run, found: Found, cost: dict[str, float], own: int) -> None:
    merged = [one for all_seeds in found.values() for one in all_seeds if "merged" in one]
    run.record(
        "merge",
        here=max(one["merged"] for one in merged),
        note=f"{len(merged)} trained models, 16 clips each",
    )
    run.record(
        "free",
        here={
            "parameters": found[SEES][0]["parameters"] / own,
            "multiply-adds": cost["multiply-adds"],
        },
        note=f"{own} parameters without the head",
    )
    run.record(
        "time",
        here=round(cost["time"], 2),
        note="smallest of some repetitions; here the shift copies keys and values, and attention runs through regard's engine",
    )


def record_accuracy(run: Run, found: Found, scale: Scale, named: float) -> None:
    percent = {name: [one["accuracy"] for one in ones] for name, ones in found.items()}
    shown = "; ".join(
        f"{name} {', '.join(f'{value:.1f}' for value in values)}"
        for name, values in percent.items()
    )
    where = (
        f"ViT of width {scale.width} and {scale.layers} layers trained on still digits, {scale.frames} frames of 16x16,"
        f" {scale.steps} steps of {scale.batch} clips, {len(percent[SEES])} seeds"
    )
    differences = [max(one["reordered"], one["reversed"]) for one in found[BLIND]]
    seen = min(one["reversed"] for one in found[SEES])
    run.record(
        "blind",
        here=max(differences),
        holds=max(differences) < 1e-5 and max(percent[BLIND]) <= 50,
        setting=where,
        note=f"at most {max(percent[BLIND]):.1f} % right; with two temporal heads reversal changes logits by {seen:.2g} or more",
    )
    note = (
        f"accuracy in percent by seed (chance 12.5): {shown}; the image model names {named:.1f} % of still digits;"
        " interval: lowest and highest seed, a verdict needs all seeds to agree"
    )
    for claim, (one, other, least) in {
        "order": (SEES, BLIND, 20),
        "ceiling": (SEES, ALL, -5),
        "embedding": (SEES, TIMED, 5),
    }.items():
        gains = [a - b for a, b in zip(percent[one], percent[other], strict=True)]
        holds, reason = agreed(gains, least)
        if max(map(mean, (percent[SEES], percent[ALL]))) <= 50:
            holds, reason = None, "no model learnt the task, so nothing is decided"
        elif mean(percent[other]) <= 25:
            holds, reason = None, f"{other} stayed near chance, so nothing is decided"
        run.record(
            claim,
            here=round(mean(gains), 1),
            interval=(round(min(gains), 1), round(max(gains), 1)),
            holds=holds,
            setting=where,
            note=f"{note}; {reason}" if reason else note,
        )


def agreed(gains: Sequence[float], least: float | int) -> tuple[bool | None, str]:
    """Whether the gain is large enough with every seed (or with none), and why there is no verdict otherwise."""
    enough = {gain >= least for gain in gains}
    return (enough.pop(), "") if len(enough) == 1 else (None, f"seeds lie on both sides of {least}")


def draw(found: Found) -> Figure:
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=(6.5, 3.4), layout="constrained")
    names = list(found)[::-1]
    percent = [[one["accuracy"] for one in found[name]] for name in names]
    ax.barh(names, [mean(values) for values in percent], color="tab:blue", alpha=0.6)
    for place, values in enumerate(percent):
        ax.plot(values, [place] * len(values), "o", color="tab:blue", ms=4, mec="white", mew=0.5)
        ax.text(max(values) + 2, place, f"{mean(values):.0f}", va="center", fontsize=8)
    ax.axvline(50, color="0.4", lw=0.9, ls="--")
    ax.text(50, len(names) - 0.45, "bound without order", fontsize=8, ha="center")
    ax.axvline(12.5, color="0.4", lw=0.9, ls=":")
    ax.text(12.5, len(names) - 0.45, "chance", fontsize=8, ha="center")
    ax.set(
        xlabel="held-out accuracy on eight directions, % (bar: mean, dots: seeds)", xlim=(0, 110)
    )
    return figure
