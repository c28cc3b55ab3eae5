"""Pictures of the Elastic-Cache experiment."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from regard.papers._elastic_runs import summary

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_drift(profile: dict[str, np.ndarray]) -> Figure:
    """Drift by layer, mean and tracked token; attention to far masks by layer."""
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(8.5, 3.3), layout="constrained")
    layers = np.arange(len(profile["drift"]))
    for name, label, style in (
        ("drift", "decoded tokens, mean", "o-"),
        ("tracked", "most attended decoded token", "s--"),
    ):
        values = profile[name]
        error = np.nanstd(values, 1) / np.sqrt(values.shape[1])
        left.errorbar(layers, np.nanmean(values, 1), 2 * error, fmt=style, label=label, capsize=2)
    left.set(xlabel="layer", ylabel="drift of key + value in a step", xticks=layers)
    left.legend(frameon=False)
    right.bar(layers, np.nanmean(profile["far"], 1), color="C2", label="attention they get")
    uniform = float(np.nanmean(profile["far_keys"]))
    right.axhline(uniform, color="0.4", linestyle=":", label="their share of the keys")
    right.set(xlabel="layer", ylabel="masks behind the window", xticks=layers)
    right.legend(frameon=False)
    return figure


def draw_tradeoff(tables: dict[str, dict[str, np.ndarray]]) -> Figure:
    """Work against agreement for each window: Elastic-Cache over gamma, fixed intervals, block caches."""
    import matplotlib.pyplot as plt

    points = {name: summary(table) for name, table in tables.items()}
    windows = sorted({int(name.split("/")[1]) for name in points if name.startswith("elastic")})
    figure, axes = plt.subplots(
        1,
        len(windows),
        figsize=(3 * len(windows), 3.3),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for ax, window in zip(axes[0], windows, strict=True):
        for kind, label, style in (
            (f"elastic/{window}/", "Elastic-Cache, by gamma", "o-"),
            (f"interval/{window}/", "fixed interval", "s--"),
        ):
            found = {n.rsplit("/", 1)[1]: p for n, p in points.items() if n.startswith(kind)}
            work, agreement = (100 * np.array(v) for v in zip(*found.values(), strict=True))
            ax.plot(work, agreement, style, label=label)
            for setting, x, y in zip(found, work, agreement, strict=True):
                ax.annotate(setting, (x, y), fontsize=7, xytext=(3, -9), textcoords="offset points")
        if f"block/{window}" in points:
            work, agreement = points[f"block/{window}"]
            ax.plot(100 * work, 100 * agreement, "D", color="C3", label="block cache")
        ax.plot(100, 100, "k*", label="no cache")
        ax.set(title=f"window {window}", xlabel="rows projected, % of no cache")
    axes[0][0].set_ylabel("characters as without a cache, %")
    axes[0][-1].legend(frameon=False, fontsize=8)
    return figure
