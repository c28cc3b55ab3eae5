"""Pictures of the DHSA experiment."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

SHOWN = (
    "best possible",
    "tokens",
    "teacher, own layer",
    "teacher, layer 0",
    "predicted",
    "shuffled",
    "fixed, as many",
    "fixed 8",
    "window and sinks",
)


def draw_mass(recall: dict[str, Any], shares: Sequence[float]) -> Any:
    """Attention mass caught by each way to choose keys; a dot a text."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 4), layout="constrained", sharey=True)
    for ax, share in zip(axes, map(str, shares), strict=True):
        for y, name in enumerate(SHOWN):
            values = recall[name][share]
            color = "C0" if name == "predicted" else "grey"
            ax.plot(values, [y] * len(values), "o", color=color, alpha=0.5)
            ax.plot(np.mean(values), y, "|", ms=18, mew=2, color="black")
        ax.set(xlabel="% of attention mass caught", title=f"budget {float(share):.1%} of the text")
    axes[0].set_yticks(range(len(SHOWN)), SHOWN)
    return figure


def draw_layers(studies: list[dict[str, Any]], share: float) -> Any:
    """Attention mass caught in each layer."""
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=(7, 3.5), layout="constrained")
    for name in ("best possible", "predicted", "fixed 8"):
        ax.plot(100 * np.mean([s["layers"][name] for s in studies], 0), label=name)
    ax.set(xlabel="layer", ylabel="% of attention mass", title=f"budget {share:.1%} of the text")
    ax.legend(frameon=False)
    return figure


def draw_loss(loss: dict[str, list[float]]) -> Any:
    """Loss above that of dense attention, for each way to choose keys and budget."""
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=(7, 3.5), layout="constrained")
    names = list(dict.fromkeys(k.split("/")[1] for k in loss if not k.endswith("/dense")))
    for x, share in enumerate(sorted({k.split("/")[0] for k in loss})):
        rise = [np.mean(np.subtract(loss[f"{share}/{n}"], loss[f"{share}/dense"])) for n in names]
        ax.bar(np.arange(len(names)) + 0.4 * x, rise, 0.38, label=f"budget {float(share):.1%}")
    ax.set_xticks(np.arange(len(names)) + 0.2, names, rotation=15)
    ax.set(ylabel="loss above dense, nats per token")
    ax.legend(frameon=False)
    return figure
