"""The pictures of `sinklora`."""

from __future__ import annotations

from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch

from regard.papers import _sinklora_characters as characters
from regard.papers._sinklora_characters import perplexity

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_perplexity(found: dict[str, Any]) -> Figure:
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=(6.4, 3), layout="constrained")
    names = list(characters.ARMS)
    for index, name in enumerate(names):
        values = perplexity(found, name)
        ax.plot(values, [index] * len(values), ".", color="0.6", markersize=6)
        ax.plot(fmean(values), index, "|", color="tab:blue", markersize=14, markeredgewidth=2)
    ax.set(yticks=range(len(names)), xlabel="perplexity per character, full attention")
    ax.set_yticklabels(names)
    ax.invert_yaxis()
    ax.set_title("a character model extended from 128 to 512, one dot a seed")
    return figure


def draw_positions(found: dict[str, Any]) -> Figure:
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=(6.4, 3.2), layout="constrained")
    full = course(found, "full")
    for name in ("S2", "S2 + sinks", "S&R", "SF", "block-local"):
        above = [a - b for a, b in zip(course(found, name), full, strict=True)]
        ax.plot([32 * i + 16 for i in range(len(above))], above, marker=".", label=name)
    ax.axhline(0, color="0.7", linewidth=0.8)
    for border in range(128, characters.LONG, 128):
        ax.axvline(border, color="0.85", linewidth=0.8)
    ax.set(
        xlabel="position (groups of training divided by lines)",
        ylabel="loss above full attention, nats",
        title="what a pattern loses, by position",
    )
    ax.legend(frameon=False, fontsize=8)
    return figure


def course(found: dict[str, Any], name: str, width: int = 32) -> list[float]:
    """Mean loss over seeds in stretches of `width` positions."""
    mean = torch.tensor([seed[name]["positions"] for seed in found["seeds"]]).mean(0)
    return [float(part.mean()) for part in mean.split(width)]


def draw_first_token(found: dict[str, Any], pretrained: dict[str, Any]) -> Figure:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(10, 3), layout="constrained")
    names = ("full", "S2", "SF")
    for name in names:
        axes[0].plot(pretrained["views"][name], marker=".", label=name)
        if name in pretrained["tuned"]:
            axes[1].plot(pretrained["tuned"][name]["first token"], marker=".", label=name)
        curves = [seed[name]["first token"] for seed in found["seeds"]]
        axes[2].plot(
            [fmean(values) for values in zip(*curves, strict=True)], marker=".", label=name
        )
    titles = (
        "SmolLM2, attention replaced",
        "SmolLM2, fine-tuned, full attention",
        "character model, extended, full attention",
    )
    for ax, title in zip(axes, titles, strict=True):
        for border in (4, 8, 12):
            ax.axvline(border - 0.5, color="0.85", linewidth=0.8)
        ax.set(xlabel="query, sixteenths of the sequence", ylim=(0, None))
        ax.set_title(title, fontsize=9)
    axes[0].set_ylabel("attention on token 0")
    axes[0].legend(frameon=False)
    return figure
