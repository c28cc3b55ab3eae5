"""Pictures of softmax attention on regression: errors by length, and what each head reads and writes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from regard.labs.softmax_icl import SoftmaxICL, heads_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_lengths(
    lab: SoftmaxICL, lengths: Any, found: dict[str, np.ndarray], exact: np.ndarray
) -> Figure:
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=(5.6, 3.8), layout="constrained")
    ax.plot(lengths, exact, color="black", lw=1.2, label="debiased descent, exact")
    for i, count in enumerate(lab.heads):
        values = found["network"][..., i]
        _points(ax, lengths, values, f"C{i}", f"{count} head{'s' if count > 1 else ''}")
    _points(ax, lengths, found["linear"], "C6", "linear attention, weights kept")
    ax.axvline(lab.examples, color="grey", lw=0.8, ls=":")
    ax.text(lab.examples, ax.get_ylim()[1], " trained here", va="top", fontsize=8, color="grey")
    ax.set(
        xscale="log", yscale="log", xlabel="examples of a test prompt", ylabel="mean squared error"
    )
    ax.set_xticks(lengths, [str(n) for n in lengths])
    ax.minorticks_off()
    ax.legend(frameon=False, fontsize=8)
    return figure


def _points(ax: Any, x: Any, values: np.ndarray, colour: str, label: str) -> None:
    """The mean over seeds with their range."""
    middle = values.mean(1)
    bars = [middle - values.min(1), values.max(1) - middle]
    ax.errorbar(x, middle, yerr=bars, fmt="o", ms=4, capsize=2, color=colour, label=label)


def draw_heads(lab: SoftmaxICL, trained: Any) -> Figure:
    """K^T Q of each head of the first seed, and what its output reads."""
    import matplotlib.pyplot as plt

    pair, read = (part.numpy()[0] for part in trained.networks.circuits())
    counts = [count for count in lab.heads if count <= 4]
    wide = max(counts)
    figure, axes = plt.subplots(
        2 * len(counts),
        wide,
        figsize=(2.0 * wide, 2.5 * len(counts)),
        layout="constrained",
        squeeze=False,
        height_ratios=[5, 1] * len(counts),
    )
    for ax in axes.flat:
        ax.set_axis_off()
    for row, count in enumerate(counts):
        own = heads_of(lab.heads, lab.heads.index(count))
        most, far = np.abs(pair[own, :, :-1]).max(), np.abs(read[own]).max()
        for h, (circuit, out) in enumerate(zip(pair[own], read[own], strict=True)):
            above, below = axes[2 * row, h], axes[2 * row + 1, h]
            above.imshow(circuit[:, :-1], cmap="RdBu_r", vmin=-most, vmax=most)
            above.set_title(f"{count} head{'s' if count > 1 else ''}, head {h + 1}", fontsize=8)
            below.imshow(out, cmap="RdBu_r", vmin=-far, vmax=far)
            for ax, ylabel in ((above, "key: x, y"), (below, "OV")):
                ax.set_axis_on()
                ax.set(xticks=[], yticks=[])
                ax.set_ylabel(ylabel if h == 0 else "", fontsize=8)
            above.set_xlabel("query: x", fontsize=7)
            below.set_xlabel("reads x, y", fontsize=7)
    return figure
