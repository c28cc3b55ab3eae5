"""Attentive convolution (arXiv 2510.20092).

Checked here:

* the operator against unfolding and summing, and what inhibition leaves of a kernel's sum;
* cost on four times the pixels, beside softmax attention;
* "cued orientation": marks in the corners turn round the meaning of a pattern in the middle, out of reach of 3x3 kernels that
  are the same for all images;
* small AttNets on the digits of scikit-learn that differ in their mixer alone;
* how alike the kernels of channels are, and how constant, before and after inhibition.

Beyond our scale: ImageNet and diffusion models.
"""

from __future__ import annotations

import math
from statistics import fmean
from typing import TYPE_CHECKING, Any

from regard.metrics.bootstrap import paired
from regard.papers import Claim, Paper, Run
from regard.papers import _atconv_runs as runs
from regard.papers._atconv_runs import MIXERS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAPER = Paper(
    "atconv",
    claims=[
        Claim(
            "exact",
            "The operator is the sum over the taps of each image's own kernels: largest difference from unfold and sum",
            setting="definition",
            expect="at most 1e-5, also for sum(K') = (1 - alpha) sum(K)",
        ),
        Claim(
            "cost",
            "Linear in the pixels: time on four times the pixels over time",
            setting="linear complexity",
            paper="4",
            expect="ATConv 3.5 to 4.8, softmax attention at least 10",
            holds=lambda here: 3.5 <= here["ATConv"] <= 4.8 and here["attention"] >= 10,
        ),
        Claim(
            "routing",
            "Kernels made from the whole image carry a far cue into 3x3: lowest held-out accuracy over seeds",
            setting="the paper's argument (adaptive routing); the task is not in the paper",
            unit=" %",
            expect="at least 90 %",
            holds=lambda percent: percent >= 90,
        ),
        Claim(
            "static",
            "A depthwise convolution that is the same for all images cannot: highest held-out accuracy after training",
            setting="as above; its reach of 11 pixels joins no corner with the middle",
            unit=" %",
            expect="at most 65 %",
            holds=lambda percent: percent <= 65,
        ),
        Claim(
            "routing-alone",
            "Inhibition is not what solves it: lowest held-out accuracy of ATConv without inhibition",
            setting="as above",
            unit=" %",
            expect="at least 90 %",
            holds=lambda percent: percent >= 90,
        ),
        Claim(
            "digits",
            "On real images ATConv is at least as accurate as a static depthwise convolution: difference in points",
            setting="ImageNet-1K, AttNet-T2, 84.4 %",
            unit=" points",
            expect="interval over seeds at or above 0; undecided where it has 0 inside",
        ),
        Claim(
            "digits-inhibition",
            "Lateral inhibition makes ATConv more accurate: difference from ATConv without, in points",
            setting="the paper's argument (competition)",
            unit=" points",
            expect="interval over seeds at or above 0; undecided where it has 0 inside",
        ),
        Claim(
            "digits-attention",
            "ATConv is at least as accurate as softmax attention in the same blocks: difference in points",
            setting="comparison of mixers",
            unit=" points",
            expect="interval over seeds at or above 0; undecided where it has 0 inside",
        ),
        Claim(
            "constant",
            "Inhibition takes energy out of the mean of kernels: share of the energy that is constant",
            setting="after training; by construction",
            expect="smaller after inhibition in every layer",
        ),
        Claim(
            "redundancy",
            "Inhibition makes the kernels of channels less alike: mean |cosine|",
            setting="after training",
            expect="smaller after inhibition, on average over layers and seeds",
            holds=lambda here: here["after"] < here["before"],
        ),
        Claim(
            "imagenet",
            "AttNet-T2 reaches 84.4 % on ImageNet with 27 M parameters; SiT-XL/2 without attention has a lower FID",
            setting="ImageNet, 300 epochs; 400 k steps",
            paper="84.4 %; FID 0.15 lower",
            beyond="needs ImageNet and weeks of accelerators",
        ),
    ],
    needs=("matplotlib", "sklearn"),
)


def experiment(run: Run) -> None:
    run.seed(0)
    found = runs.exactness()
    run.record(
        "exact",
        here=max(found.values()),
        holds=max(found.values()) <= 1e-5,
        note="float32",
    )
    side = run.pick(quick=8, full=32)
    cost = run.partial("cost", lambda: runs.cost_ratios(side, run.pick(quick=1, full=5)))
    if not run.quick:
        run.record(
            "cost",
            here={name: round(ratio, 2) for name, ratio in cost.items()},
            setting=f"64 channels, batch 2, {side}x{side} to {2 * side}x{2 * side} pixels, forward pass",
        )
    cued(run)
    digits(run)


def cued(run: Run) -> None:
    epochs = run.pick(quick=1, full=8)
    sizes = run.pick(quick=(50, 20), full=(1500, 600))
    seeds = run.pick(quick=[0], full=[0, 1])
    plan = [("ATConv", epochs, seeds), ("ATConv without inhibition", epochs, seeds)]
    plan += [("static", epochs + 2, seeds), ("attention", epochs, seeds[:1])]
    cases = [(name, length, seed) for name, length, used in plan for seed in used]
    found: dict[str, list[dict[str, Any]]] = {}
    for name, length, seed in run.progress(cases, "cued orientation"):
        run.seed(seed)
        kept = run.partial(
            f"cued/{name}/{seed}",
            lambda n=name, e=length, s=seed: runs.train_cued(n, s, e, *sizes),
        )
        found.setdefault(name, []).append(kept)
    record_cued(run, found, sizes[0])
    run.figure("cue", draw_cued(found))


def record_cued(run: Run, found: dict[str, list[dict[str, Any]]], train: int) -> None:
    ends = {name: [one["curve"][-1] for one in results] for name, results in found.items()}
    lengths = {name: len(results[0]["curve"]) for name, results in found.items()}

    def where(name: str) -> str:
        return (
            f"cued orientation, {train} images, {lengths[name]} epochs, {len(ends[name])} seed(s)"
        )

    others = ", ".join(f"{percent:.1f}" for percent in ends["attention"])
    run.record(
        "routing",
        here=round(min(ends["ATConv"]), 1),
        setting=where("ATConv"),
        note=f"softmax attention without positions in its place reaches {others} % in as many epochs (one seed)",
    )
    run.record(
        "static",
        here=round(max(ends["static"]), 1),
        setting=where("static"),
        note="on its training images it reaches "
        + ", ".join(f"{one['fitted']:.1f}" for one in found["static"])
        + " %",
    )
    run.record(
        "routing-alone",
        here=round(min(ends["ATConv without inhibition"]), 1),
        setting=where("ATConv without inhibition"),
    )


def digits(run: Run) -> None:
    epochs, sizes = run.pick(quick=(1, (50, 20)), full=(8, (400, 1397)))
    seeds = run.pick(quick=[0], full=[0, 1, 2])
    names = run.pick(quick=["static", "ATConv"], full=list(MIXERS))
    found: dict[str, list[dict[str, Any]]] = {}
    cases = [(name, seed) for seed in seeds for name in names]
    for name, seed in run.progress(cases, "digits"):
        run.seed(seed)
        kept = run.partial(
            f"digits/{name}/{seed}", lambda n=name, s=seed: runs.train_digits(n, s, epochs, *sizes)
        )
        found.setdefault(name, []).append(kept)
    record_digits(run, found, epochs)
    record_redundancy(run, found["ATConv"])
    run.figure("kernels", draw_kernels(found["ATConv"]))


def record_digits(run: Run, found: dict[str, list[dict[str, Any]]], epochs: int) -> None:
    points = {name: [one["accuracy"] for one in results] for name, results in found.items()}
    means = ", ".join(
        f"{name} {fmean(values):.1f} ({min(values):.1f} to {max(values):.1f})"
        for name, values in points.items()
    )
    pairs = {
        "digits": "static",
        "digits-inhibition": "ATConv without inhibition",
        "digits-attention": "attention",
    }
    for claim, name in pairs.items():
        if name not in points:
            continue
        gain = paired(points["ATConv"], points[name])
        alone = math.isnan(gain.low)
        run.record(
            claim,
            here=round(gain.mean, 2),
            interval=None if alone else (round(gain.low, 2), round(gain.high, 2)),
            holds=gain.at_least(0),
            setting="AttNet of depths 2, 2 and widths 32, 64 on 16x16 digits,"
            f" 400 images, {epochs} epochs, {len(points[name])} seed(s)",
            note=f"held-out accuracy in percent, mean (range): {means}; interval over few seeds, so too narrow",
        )


def record_redundancy(run: Run, results: list[dict[str, Any]]) -> None:
    layers = [layer for one in results for layer in one["redundancy"]]
    mean = {name: fmean(layer[name] for layer in layers) for name in layers[0]}
    alphas = [layer["alpha"] for layer in layers]
    run.record(
        "constant",
        here={when: round(mean[f"constant {when}"], 3) for when in ("before", "after")},
        holds=all(layer["constant after"] < layer["constant before"] for layer in layers),
        setting=f"{len(layers)} layers of ATConv trained on digits",
        note=f"mean alpha of a layer {min(alphas):.2f} to {max(alphas):.2f}, from 0.5 at the start",
    )
    fell = sum(layer["similarity after"] < layer["similarity before"] for layer in layers)
    run.record(
        "redundancy",
        here={when: round(mean[f"similarity {when}"], 3) for when in ("before", "after")},
        setting=f"{len(layers)} layers of ATConv trained on digits",
        note=f"smaller in {fell} of {len(layers)} layers",
    )


COLOURS = {
    "ATConv": "tab:blue",
    "ATConv without inhibition": "tab:cyan",
    "static": "tab:orange",
    "attention": "0.5",
}


def draw_cued(found: dict[str, list[dict[str, Any]]]) -> Figure:
    import matplotlib.pyplot as plt
    import torch

    figure, axes = plt.subplots(1, 3, figsize=(10, 3), layout="constrained", width_ratios=(1, 1, 2))
    images, labels = runs.cued_orientation(8, torch.Generator().manual_seed(1))
    for ax, label in zip(axes, (0, 1), strict=False):
        chosen = int((labels == label).nonzero()[0])
        ax.imshow(images[chosen, 0], cmap="gray", vmin=-2, vmax=2)
        ax.set(xticks=[], yticks=[], title=f"class {label}")
    for name, results in found.items():
        for index, one in enumerate(results):
            epochs = range(1, len(one["curve"]) + 1)
            label = name if index == 0 else None
            axes[2].plot(epochs, one["curve"], color=COLOURS[name], lw=1.2, label=label)
    axes[2].axhline(50, color="0.8", lw=0.8, ls="--")
    axes[2].set(xlabel="epoch", ylabel="held-out accuracy, %", ylim=(20, 102))
    axes[2].legend(fontsize=8, frameon=False, loc="center right")
    return figure


def draw_kernels(results: list[dict[str, Any]]) -> Figure:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(7, 3), layout="constrained")
    labels = {
        "similarity": "mean |cosine| of two channels",
        "constant": "share of energy in the mean",
    }
    for ax, (what, label) in zip(axes, labels.items(), strict=True):
        for one in results:
            for index, layer in enumerate(one["redundancy"]):
                ends = [layer[f"{what} before"], layer[f"{what} after"]]
                ax.plot([0, 1], ends, marker=".", color=f"C{index}", lw=1)
        ax.set(xticks=[0, 1], xticklabels=["before", "after"], xlim=(-0.3, 1.3), ylabel=label)
        ax.set(xlabel="inhibition", ylim=(0, None))
    handles = axes[0].get_lines()[: len(results[0]["redundancy"])]
    names = [f"layer {index + 1}" for index in range(len(handles))]
    axes[1].legend(handles, names, fontsize=8, frameon=False)
    return figure
