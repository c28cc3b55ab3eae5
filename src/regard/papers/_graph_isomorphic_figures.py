"""Pictures of the experiment on attention as a graph."""

from __future__ import annotations

from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch

from regard.papers._graph_isomorphic_runs import Courses, Size, best_rate, course, gaps

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_training(size: Size, found: dict[str, list[dict[str, Any]]]) -> Figure:
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(
        1, 2, figsize=(10, 3.6), layout="constrained", width_ratios=[3, 2]
    )
    for place, (arm, results) in enumerate(found.items()):
        mean = [fmean(moment) for moment in zip(*(r["held out"] for r in results), strict=True)]
        at = [size.every * (1 + place) for place in range(len(mean))]
        style = {"color": "black", "lw": 2} if arm == "reference" else {"color": f"C{place}"}
        left.plot(at, mean, label=arm, **style)
        right.bar(place, fmean(gaps(results)), color=style["color"], alpha=0.7)
        right.plot([place] * len(results), gaps(results), ".", color="0.2")
    left.set(xlabel="epoch", ylabel="held-out loss, nats a byte")
    left.legend(fontsize=8)
    right.set(ylabel="held-out less training loss, nats")
    right.set_xticks(range(len(found)), list(found), rotation=30, ha="right")
    return figure


def draw_adapting(small: Courses, large: Courses) -> Figure:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for ax, found, what in (
        (axes[0], small, "byte model, English to Python"),
        (axes[1], large, "SmolLM2, word problems"),
    ):
        for place, (arm, rates) in enumerate(found.items()):
            chosen = best_rate(rates)
            for rate, results in rates.items():
                mean = course(results)
                at = [moment / (len(mean) - 1) for moment in range(len(mean))]
                style: dict[str, Any] = {"lw": 2} if rate == chosen else {"lw": 0.8, "ls": ":"}
                label = f"{arm}, rate {rate:g}" if rate == chosen else None
                ax.plot(at, mean, color=f"C{place}", marker=".", label=label, **style)
        ax.set(
            xlabel="share of the steps",
            ylabel="held-out loss, nats",
            title=f"{what} (dotted: other rates)",
        )
        if found:
            ax.legend(fontsize=8)
    return figure


def draw_graphs(layers: list[dict[str, float]], large: Courses) -> Figure:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
    at = range(len(layers))
    axes[0].bar(at, [100 * layer["density"] for layer in layers], color="C0")
    axes[0].set(xlabel="layer", ylabel="pairs with an edge, %")
    axes[1].plot(at, [100 * layer["loops"] for layer in layers], label="self-loops")
    axes[1].plot(
        at, [100 * layer["to the first token"] for layer in layers], label="from the first token"
    )
    axes[1].set(xlabel="layer", ylabel="share of the edges, %", ylim=(0, None))
    if large:
        axes[1].legend(fontsize=8)
        scales = torch.tensor(large["neighbours"][best_rate(large["neighbours"])][0]["scales"])
        axes[2].bar(range(scales.shape[1]), (scales[-1] - scales[0]).tolist(), color="C2")
    axes[2].set(xlabel="layer", ylabel="change of lambda in the training")
    return figure
