"""The head analysis of vision transformers on a planted model and on three small ViTs trained on scikit-learn's digits.

Ranks heads by four importance metrics on one set of images and prunes them on another, follows the distance of attention
through the layers, encodes and groups the heads' maps, and asks whether distance and pattern explain importance.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from regard.papers import Claim, Paper, Run
from regard.papers._vit_heads import (
    linking,
    pattern_numbers,
    planted_numbers,
    train_and_measure,
)

ABSTRACT = "abstract; image classification ViTs"
HERE = "ViTs (4 layers x 4 heads, 8x8 patches + CLS) trained on scikit-learn's digits at 32x32"
METRICS = ("probability", "divergence", "embedding", "accuracy")

PAPER = Paper(
    "vit-visual-analytics",
    claims=[
        Claim(
            "planted",
            "The analysis recovers heads set by hand: names, hop profile, content dependence, "
            "and no importance for a silent head",
            setting="not in the paper: a check of the instrument",
            expect="all names, S_1 and S_0 > 0.99, content dependence < 0.01 and > 0.5, importance < 1e-6",
        ),
        Claim(
            "importance",
            "Only some heads matter: pruning from the least important keeps accuracy longer than a random order",
            setting=ABSTRACT,
            expect="for every metric and seed: area of the ascending order > 95th percentile of 50 random orders > descending",
        ),
        Claim(
            "metrics",
            "The importance metrics agree without coinciding: rank correlations between pairs of metrics",
            setting=ABSTRACT,
            expect="all six pairs between 0.4 and 0.95, mean over seeds",
        ),
        Claim(
            "reliable",
            "Importance is a property of the head: rank correlation of two halves of the images",
            setting="not in the paper",
            expect="above 0.8 (divergence metric)",
            holds=lambda correlation: correlation > 0.8,
        ),
        Claim(
            "distance",
            "Attention strength has a spatial profile that changes across layers: mean hop of the last minus the first layer",
            setting=ABSTRACT,
            unit=" patches",
            expect="above 0 in every seed; shares of hops and CLS sum to 1 within 1e-6",
        ),
        Claim(
            "code",
            "Head maps fall into a small set: a 16-number convolutional code reconstructs held-out maps as well as 16 "
            "principal components (ratio of squared errors)",
            setting=ABSTRACT,
            expect="at most 1.1",
            holds=lambda ratio: ratio <= 1.1,
        ),
        Claim(
            "clusters",
            "The patterns form stable groups: silhouette, and agreement of groups from two seeds (adjusted Rand index)",
            setting=ABSTRACT,
            expect="silhouette > 0.2 and adjusted Rand index > 0.5",
        ),
        Claim(
            "grouped",
            "Heads of one group have closer hop profiles than heads of different groups",
            setting=ABSTRACT,
            expect="permutation p < 0.01",
            holds=lambda p: p < 0.01,
        ),
        Claim(
            "linking",
            "Importance can be explained by strength and pattern: cross-validated R2 of a regression on mean hop, S_0, "
            "CLS share and content dependence",
            setting=ABSTRACT,
            expect="above 0",
            holds=lambda r2: r2 > 0,
        ),
        Claim(
            "multilabel",
            "The same on a ViT of 6 x 6 heads for multi-label scenes",
            setting="our second model for this paper",
            beyond="that model (the vision tower of the small vision-language model) is not part of the project yet",
        ),
        Claim(
            "imagenet",
            "Findings of the paper's case studies on ImageNet ViTs, read by experts",
            setting="ViT-B on ImageNet",
            beyond="no ImageNet model or images at hand, and expert readings are not a measurement",
        ),
    ],
    needs=("sklearn", "scipy", "matplotlib"),
)


def experiment(run: Run) -> None:
    run.seed(0)
    planted = run.partial("planted", planted_numbers)
    run.record(
        "planted",
        here=planted["here"],
        holds=planted["holds"],
        setting="one layer of six heads over 8x8 patches, 64 images",
        note=f"names found: {', '.join(planted['names'])}",
    )
    seeds = run.pick(quick=(0,), full=(0, 1, 2))
    models = []
    for seed in run.progress(seeds, "training and pruning"):
        run.seed(seed)
        models.append(
            run.partial(f"vit/{seed}", lambda s=seed: train_and_measure(s, quick=run.quick))
        )
    accuracy = "/".join(f"{100 * m['accuracy']:.1f}" for m in models)
    setting = f"{len(models)} {HERE}; held-out accuracy {accuracy} %"
    _record_importance(run, models, setting)
    _record_strength(run, models, setting)
    numbers = run.partial("patterns", lambda: pattern_numbers(models, quick=run.quick))
    _record_patterns(run, numbers, setting)
    link = linking(models)
    run.record(
        "linking",
        here=link["r2"],
        interval=link["interval"],
        setting=setting,
        note=f"ridge regression on the log of the divergence metric over {link['heads']} heads, five folds drawn 50 times "
        f"(interval: 5th to 95th percentile of the draws); with the layer as a fifth number {link['with_layer']:.2f}; "
        f"coefficients: {link['coefficients']}",
    )
    run.figure("pruning", _draw_pruning(models))
    run.figure("strength", _draw_strength(models))
    run.figure("patterns", _draw_patterns(models, numbers))


def _record_importance(run: Run, models: list[dict[str, Any]], setting: str) -> None:
    rows, better = {}, []
    for metric in METRICS:
        ascending = [m["area"][metric]["ascending"] for m in models]
        descending = [m["area"][metric]["descending"] for m in models]
        high = [float(np.percentile(m["random"], 95)) for m in models]
        median = [float(np.median(m["random"])) for m in models]
        rows[f"{metric}, ascending"] = float(np.mean(ascending))
        rows[f"{metric}, descending"] = float(np.mean(descending))
        rows["random, 95th percentile"] = float(np.mean(high))
        rows["random, median"] = float(np.mean(median))
        better.append(sum(a > h > d for a, h, d in zip(ascending, high, descending, strict=True)))
    run.record(
        "importance",
        here=rows,
        holds=all(count == len(models) for count in better),
        setting=f"{setting}; heads ranked on {models[0]['ranked']} images, pruned on {models[0]['pruned']} others",
        note="area under accuracy against the share of heads pruned, mean over seeds; seeds in which the order holds: "
        + ", ".join(f"{m} {c} of {len(models)}" for m, c in zip(METRICS, better, strict=True)),
    )
    pairs = {
        pair: float(np.mean([m["correlations"][pair] for m in models]))
        for pair in models[0]["correlations"]
    }
    run.record(
        "metrics",
        here=pairs,
        holds=all(0.4 <= value <= 0.95 for value in pairs.values()),
        setting=setting,
        note="Spearman over the 16 heads, mean over seeds",
    )
    halves = [m["halves"]["divergence"] for m in models]
    others = ", ".join(f"{k} {np.mean([m['halves'][k] for m in models]):.2f}" for k in METRICS)
    run.record(
        "reliable",
        here=float(np.mean(halves)),
        interval=(min(halves), max(halves)),
        setting=setting,
        note=f"mean over 20 halvings and over seeds, interval: range over seeds; by metric: {others}",
    )


def _record_strength(run: Run, models: list[dict[str, Any]], setting: str) -> None:
    rises, sums = [], []
    for model in models:
        hop = np.array(model["strength"]["mean_hop"])
        rises.append(float(hop[-1].mean() - hop[0].mean()))
        sums.append(model["sum_error"])
    layers = np.mean([np.array(m["strength"]["mean_hop"]).mean(1) for m in models], 0)
    run.record(
        "distance",
        here=float(np.mean(rises)),
        interval=(min(rises), max(rises)),
        holds=min(rises) > 0 and max(sums) < 1e-6,
        setting=setting,
        note=f"mean hop by layer {', '.join(f'{x:.2f}' for x in layers)}; interval: range over seeds; "
        f"largest deviation of the sums from 1: {max(sums):.0e}",
    )


def _record_patterns(run: Run, numbers: dict[str, Any], setting: str) -> None:
    run.record(
        "code",
        here=numbers["ratio"],
        interval=(min(numbers["ratios"]), max(numbers["ratios"])),
        setting=f"{setting}; {numbers['maps']} relative maps, half of the images held out",
        note="interval: range over autoencoder seeds",
    )
    run.record(
        "clusters",
        here={"silhouette": numbers["silhouette"], "adjusted Rand": numbers["rand"]},
        holds=numbers["silhouette"] > 0.2 and numbers["rand"] > 0.5,
        setting=setting,
        note=f"{numbers['groups']} groups by silhouette, tried 6 to 12; two seeds of autoencoder and k-means; "
        f"names by rule: {numbers['names']}",
    )
    run.record(
        "grouped",
        here=numbers["p"],
        setting=setting,
        note=f"1000 permutations of the heads' groups; mean distance of hop profiles within {numbers['within']:.3f}, "
        f"across {numbers['across']:.3f}",
    )


def _draw_pruning(models: list[dict[str, Any]]) -> Any:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        1,
        len(models),
        figsize=(4 * len(models), 3.6),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for ax, model in zip(axes[0], models, strict=True):
        sizes = model["sizes"]
        random = np.array(model["random_curves"])
        low, high = np.percentile(random, [5, 95], axis=0)
        ax.fill_between(sizes, low, high, color="grey", alpha=0.3, label="random, 5 to 95 %")
        for number, metric in enumerate(METRICS):
            ax.plot(sizes, model["curves"][metric]["ascending"], color=f"C{number}", label=metric)
            ax.plot(sizes, model["curves"][metric]["descending"], color=f"C{number}", ls=":")
        ax.set(xlabel="heads pruned", title=f"seed {model['seed']}")
    axes[0, 0].set(ylabel="held-out accuracy")
    axes[0, -1].legend(frameon=False, fontsize=8)
    return figure


def _draw_strength(models: list[dict[str, Any]]) -> Any:
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    heads = [h for m in models for layer in m["share"] for h in layer]
    specials = [s for m in models for layer in m["strength"]["cls_share"] for s in layer]
    hops = [d for m in models for layer in m["strength"]["mean_hop"] for d in layer]
    order = np.argsort(hops)
    shares = np.array(heads)[order].T
    stacked = np.vstack([np.array(specials)[order], shares])
    colours = ["#999999", *plt.get_cmap("viridis")(np.linspace(0, 1, len(shares)))]
    left.stackplot(
        range(len(order)), stacked, colors=colours, labels=["CLS", *map(str, range(len(shares)))]
    )
    left.set(xlabel="heads, sorted by mean hop", ylabel="share of attention", ylim=(0, 1))
    left.legend(title="hop", fontsize=7, loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    for model in models:
        table = np.array(model["strength"]["mean_hop"])
        right.plot(range(len(table)), table.mean(1), "o-", label=f"seed {model['seed']}")
        for layer, row in enumerate(table):
            right.scatter([layer] * len(row), row, s=12, color="grey")
    right.set(xlabel="layer", ylabel="mean hop, patches", xticks=range(len(models[0]["share"])))
    right.legend(frameon=False)
    return figure


def _draw_patterns(models: list[dict[str, Any]], numbers: dict[str, Any]) -> Any:
    import matplotlib.pyplot as plt

    axes: Any
    layers, heads = np.array(models[0]["strength"]["mean_hop"]).shape
    figure, axes = plt.subplots(
        layers,
        heads * len(models),
        figsize=(1.1 * heads * len(models), 1.3 * layers + 0.4),
        layout="constrained",
    )
    pictures = iter(numbers["pictures"])
    names = iter([name for m in models for name in m["names"]])
    groups = iter(numbers["group"])
    for number in range(len(models)):
        for layer in range(layers):
            for head in range(heads):
                ax = axes[layer, number * heads + head]
                ax.imshow(np.log(1e-4 + np.array(next(pictures))), cmap="viridis")
                ax.set(xticks=[], yticks=[])
                ax.set_title(f"L{layer}H{head} {next(names)}\ngroup {next(groups)}", fontsize=6)
    return figure
