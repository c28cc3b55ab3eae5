"""What `brain-basis` measures beside its laboratory: a phase gate in a pretrained model, and the pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from regard import texts
from regard.attach import Session
from regard.engine import Block, Method
from regard.instruments.entropy import Entropy
from regard.labs.brain_basis import BrainBasis, Walk, simulate, sparse_brain_graph, undirected
from regard.labs.brain_basis.states import outside
from regard.labs.results import Result

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PERIOD = 64


class PhaseGate(Method):
    """Adds `kappa cos(2 pi (i - j) / period)` to the scores: each token's phase is its position."""

    def __init__(self, kappa: float, period: int = PERIOD) -> None:
        self.kappa, self.period = kappa, period

    def scores(self, block: Block) -> Tensor:
        keys = torch.arange(block.keys.start, block.keys.stop, device=block.positions.device)
        apart = block.positions[:, None] - keys
        bias = self.kappa * torch.cos(2 * math.pi * apart / self.period)
        return block.scores + bias.to(block.scores.dtype)


def gate_model(
    model: nn.Module, kappas: Sequence[float], count: int, length: int
) -> dict[str, Any]:
    """Mean attention entropy under a phase gate of each kappa, on English, and what kappa = 0 changes in the logits."""
    tokenizer: Any = model.tokenizer
    ids = tokenizer(texts.prose(6 * count * length), add_special_tokens=False)["input_ids"]
    batch = torch.tensor(ids[: count * length]).view(count, length)
    entropies, changed = [], 0.0
    with torch.inference_mode():
        reading = Entropy()
        with Session(model, reading):
            plain = model(input_ids=batch).logits
        for kappa in kappas:
            reading = Entropy()
            with Session(model, PhaseGate(kappa), reading):
                logits = model(input_ids=batch).logits
            if kappa == 0:
                changed = float((logits - plain).abs().max())
            entropies.append(float(reading.compute()["entropy"].matrix().mean()))
    return {"entropy": entropies, "identity": changed, "tokens": count * length}


def roughness(kappas: Sequence[float | int], entropies: Sequence[float | int]) -> float:
    """How far a curve is from a parabola: largest residual of the best one, over the curve's total change.

    >>> round(roughness([0, 1, 2, 3], [0, 1, 4, 9]), 6)
    0.0
    """
    fit = np.polyval(np.polyfit(kappas, entropies, 2), kappas)
    return float(np.abs(fit - entropies).max() / np.ptp(entropies))


def told(walk: Walk, ranges: Sequence[tuple[float | int, float | int]]) -> str:
    """What the walks did, lowest to highest over seeds, and how many of them lie within 20 % of the ranges in everything."""
    found = (walk.distinct, walk.dwell, walk.share)
    inside = sum(
        all(
            outside(part[i : i + 1], bounds) <= 0.2
            for part, bounds in zip(found, ranges, strict=True)
        )
        for i in range(len(walk.on))
    )
    shown = "{} to {} keys, {:.0f} to {:.0f} steps each, one on for {:.0%} to {:.0%} of the time".format(
        *(end for part in found for end in (part.min(), part.max()))
    )
    return f"{shown}; {inside} of {len(walk.on)} seeds inside"


def draw_walks(walks: dict[str, Walk], steps: int = 1200) -> Figure:
    """Which key is on over the steps, a panel for each setting, the first seed."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        len(walks),
        1,
        figsize=(8.5, 1.25 * len(walks) + 0.4),
        layout="constrained",
        sharex=True,
        sharey=True,
    )
    for ax, (name, walk) in zip(axes, walks.items(), strict=True):
        on = walk.on[0, :steps]
        time = np.flatnonzero(on >= 0)
        ax.plot(time, on[time] + 1, "|", ms=4, color="C0")
        ax.set_ylabel(f"{name}\nkey", fontsize=8)
    axes[-1].set(xlabel="step", ylim=(0, 21), xlim=(0, steps))
    axes[0].set_title("which of 20 keys is on (attention above 0.7)", fontsize=10)
    return figure


def draw_spikes(lab: BrainBasis, result: Result) -> Figure:
    """Spikes over three cycles by drive, and rate and phase beside each other."""
    import matplotlib.pyplot as plt

    from regard.labs.results import draw

    drives = np.linspace(1.05, 2.0, 20)
    found = simulate(drives, 3, lab.seed)
    figure, axes = plt.subplots(1, 3, figsize=(12.5, 3.4), layout="constrained")
    neuron, at = np.nonzero(found.raster.reshape(len(drives), -1))
    axes[0].plot(at * found.step, drives[neuron], "|", ms=6, color="C0")
    length = found.raster.shape[-1] * found.step
    for cycle in range(4):
        axes[0].axvline(
            cycle * length, color="C3", lw=0.8, label="peak inhibition" if cycle == 0 else None
        )
    axes[0].set(xlabel="time, ms", ylabel="drive, thresholds", title="spikes, three cycles")
    axes[0].set_ylim(1.0, 2.05)
    axes[0].legend(frameon=False, fontsize=7, loc="lower right")
    for ax, name in zip(axes[1:], ("rate", "first-spike phase"), strict=True):
        draw(ax, [result.series[name]])
        for drawn in ax.get_lines()[:1]:
            drawn.set_label("another simulation")
        ax.legend(frameon=False, fontsize=8)
        ax.set_title(name)
    return figure


def draw_network(lab: BrainBasis, result: Result) -> Figure:
    """The network's links in ring order, its out-degrees, and its measures beside a uniform random network's."""
    import matplotlib.pyplot as plt

    links, _ = sparse_brain_graph(lab.nodes, lab.seed)
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    axes[0].imshow(undirected(links), cmap="Greys", interpolation="nearest")
    axes[0].set(xlabel="node", ylabel="node", title="links")
    axes[1].hist(links.sum(1), bins=30, color="C0")
    axes[1].set(xlabel="out-degree", ylabel="nodes", title="degrees")
    names = ("small-world index", "rich-club ratio")
    for index, label in enumerate(("sparse, skewed network", "uniform random network")):
        one = result.series[label]
        axes[2].bar(
            np.arange(2) + 0.35 * index, one.measured, 0.35, yerr=one.error, capsize=3, label=label
        )
    axes[2].axhline(1, color="0.6", lw=0.8)
    axes[2].set_xticks(np.arange(2) + 0.175, names)
    axes[2].set(ylabel="over degree-preserving shuffles", title="structure", yscale="log")
    axes[2].legend(frameon=False, fontsize=8)
    return figure


def draw_gate(kappas: Sequence[float], entropies: Sequence[float]) -> Figure:
    """Attention entropy of the pretrained model by kappa."""
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=(4.6, 3.2), layout="constrained")
    ax.plot(kappas, entropies, "o-", ms=4)
    ax.set(
        xlabel=f"kappa of a phase gate with a period of {PERIOD} tokens",
        ylabel="mean attention entropy, nats",
        title="SmolLM2-135M",
    )
    return figure
