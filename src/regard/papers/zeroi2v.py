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

from typing import TYPE_CHECKING, Any

from regard.papers import Claim, Paper, Run
from regard.papers import _zeroi2v_runs as runs
from regard.papers._zeroi2v_runs import ARMS, BLIND, SEES, Scale

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


def experiment(run: Run) -> None:
    run.seed(0)
    scale = run.pick(
        quick=Scale(still_steps=2, steps=2, width=24, layers=1, batch=4, test=40), full=Scale()
    )
    names = run.pick(quick=["adapters", "adapters + time", SEES], full=list(ARMS))
    names = [*names, "all weights + 2 heads"] if run.quick else names
    digits = runs.digit_images()
    tower, named = runs.pretrain(digits, scale)
    found: dict[str, dict[str, Any]] = {}
    for name in run.progress(names, "directions"):
        found[name] = run.partial(name, lambda n=name: runs.train_arm(tower, digits, n, 0, scale))
    cost = runs.inference_cost(tower, scale, run.pick(quick=1, full=20))
    own = sum(parameter.numel() for parameter in tower.parameters())
    record_cost(run, found, cost, own)
    record_accuracy(run, found, scale, named)
    run.figure("directions", draw(found))


def record_cost(
    run: Run, found: dict[str, dict[str, Any]], cost: dict[str, float], own: int
) -> None:
    merged = {name: one for name, one in found.items() if "merged" in one}
    run.record(
        "merge",
        here=max(one["merged"] for one in merged.values()),
        note=f"{len(merged)} trained models, 16 clips each",
    )
    run.record(
        "free",
        here={
            "parameters": merged[SEES]["parameters"] / own,
            "multiply-adds": cost["multiply-adds"],
        },
        note=f"{own} parameters without the head",
    )
    run.record(
        "time",
        here=round(cost["time"], 2),
        note="smallest of some repetitions; here the shift copies keys and values, and attention runs through regard's engine",
    )


def record_accuracy(run: Run, found: dict[str, dict[str, Any]], scale: Scale, named: float) -> None:
    percent = {name: one["accuracy"] for name, one in found.items()}
    shown = ", ".join(f"{name} {value:.1f}" for name, value in percent.items())
    where = (
        f"ViT of width {scale.width} and {scale.layers} layers, {scale.frames} frames of 16x16, {scale.steps} steps of"
        f" {scale.batch} clips, one seed"
    )
    blind = found[BLIND]
    run.record(
        "blind",
        here=max(blind["reordered"], blind["reversed"]),
        holds=max(blind["reordered"], blind["reversed"]) < 1e-5 and percent[BLIND] <= 50,
        setting=where,
        note=f"{percent[BLIND]:.1f} % right; with two temporal heads reversal changes logits by {found[SEES]['reversed']:.2g}",
    )
    full = percent["all weights + 2 heads"]
    learnt = max(full, percent[SEES]) > 50
    note = f"accuracy in percent (chance 12.5): {shown}; the image model names {named:.1f} % of still digits"
    gains = {
        "order": (percent[SEES] - percent[BLIND], 20),
        "ceiling": (percent[SEES] - full, -5),
        "embedding": (percent[SEES] - percent["adapters + time"], 5),
    }
    for claim, (gain, least) in gains.items():
        run.record(
            claim,
            here=round(gain, 1),
            holds=gain >= least if learnt else None,
            setting=where,
            note=note if learnt else f"{note}; no model learnt the task, so nothing is decided",
        )


def draw(found: dict[str, dict[str, Any]]) -> Figure:
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=(6.5, 3), layout="constrained")
    names = list(found)[::-1]
    bars = ax.barh(names, [found[name]["accuracy"] for name in names], color="tab:blue")
    ax.bar_label(bars, fmt="%.0f", padding=2, fontsize=8)
    ax.axvline(50, color="0.4", lw=0.9, ls="--")
    ax.text(50, len(names) - 0.45, "bound without order", fontsize=8, ha="center")
    ax.axvline(12.5, color="0.7", lw=0.9, ls=":")
    ax.set(xlabel="held-out accuracy on eight directions, %", xlim=(0, 105))
    return figure
