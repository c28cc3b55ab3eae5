"""Pictures of the retrieval-head experiment."""

from __future__ import annotations

from typing import Any

import numpy as np

from regard.papers._retrieval_runs import head_name

THRESHOLD = 0.1


def draw_scores(table: np.ndarray) -> Any:
    import matplotlib.pyplot as plt

    mean = table.mean(0)
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 5), layout="constrained")
    picture = left.imshow(mean.reshape(-1, 9), aspect="auto", cmap="viridis")
    left.set(xlabel="head", ylabel="layer", title="retrieval score")
    figure.colorbar(picture, ax=left)
    right.plot(np.arange(1, len(mean) + 1), np.sort(mean)[::-1], lw=2)
    right.axhline(THRESHOLD, color="grey", ls=":")
    right.set(xscale="log", xlabel="head, sorted", ylabel="retrieval score")
    right.set_title(
        f"{int((mean >= THRESHOLD).sum())} of {len(mean)} heads at or above {THRESHOLD}"
    )
    return figure


def draw_masking(masking: dict[str, Any]) -> Any:
    import matplotlib.pyplot as plt

    runs, counts = masking["runs"], list(masking["counts"])
    figure, axes = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    for ax, key, label in (
        (axes[0], "recall", "ROUGE-1 recall"),
        (axes[1], "logprob", "answer log-probability, nats per token"),
    ):
        base = float(np.mean(runs["none"][key]))
        top = [float(np.mean(runs[f"top/{k}"][key])) for k in counts]
        ax.plot([0, *counts], [base, *top], "o-", lw=2, label="best heads masked")
        drawn = np.array(
            [
                [np.mean(runs[f"random/{k}/{d}"][key]) for d in range(masking["draws"])]
                for k in counts
            ]
        )
        ax.plot([0, *counts], [base, *drawn.mean(1)], "s-", lw=2, label="random, same layers")
        ax.fill_between(
            [0, *counts], [base, *drawn.min(1)], [base, *drawn.max(1)], alpha=0.2, color="C1"
        )
        ax.set(xlabel="heads masked", ylabel=label)
        ax.legend(frameon=False)
    return figure


def draw_elsewhere(mean: np.ndarray, copying: np.ndarray, induction: np.ndarray) -> Any:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 4), layout="constrained", sharey=True)
    for ax, other, label in (
        (axes[0], copying, "retrieval score, copying random strings"),
        (axes[1], induction, "induction score"),
    ):
        ax.scatter(other, mean, s=14)
        for index in np.argsort(-mean)[:6]:
            ax.annotate(str(head_name(int(index))), (other[index], mean[index]), fontsize=8)
        ax.set(xlabel=label)
    axes[0].set(ylabel="retrieval score, needles")
    return figure
