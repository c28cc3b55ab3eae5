"""The film of a training: attention maps of several arms over the steps, as small multiples or as an animation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from regard.labs.sink_emergence.course import SHOWN, Course

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def film(course: Course, arms: Sequence[str] | None = None, frames: int = 6) -> Figure:
    """Small multiples: a row for each arm, a column for each of `frames` logged steps (needs the `plot` extra).

    Each panel is the attention of the first seed, mean over held-out sequences and over the heads of all layers but the first:
    every second query from the top, the learnt key (if any) and the first positions from the left.
    """
    import matplotlib.pyplot as plt

    chosen = list(arms or course.arms)
    at = np.unique(np.linspace(0, len(course.steps) - 1, frames).round().astype(int))
    figure, axes = plt.subplots(
        len(chosen),
        len(at),
        figsize=(1.35 * len(at) + 1.2, 1.55 * len(chosen) + 0.5),
        layout="constrained",
        squeeze=False,
        sharex=True,
        sharey=True,
    )
    image: Any = None
    for row, arm in enumerate(chosen):
        for column, step in enumerate(at):
            ax = axes[row, column]
            image = _show(ax, course.maps[course.row(arm), 0, step])
            if row == 0:
                ax.set_title(f"step {course.steps[step]:,}", fontsize=8)
        axes[row, 0].set_ylabel(f"{arm}\nquery", fontsize=8)
    for ax in axes[-1]:
        ax.set_xlabel("key", fontsize=8)
    bar = figure.colorbar(image, ax=axes, shrink=0.5, aspect=30)
    bar.set_label("mean attention (square-root scale)", fontsize=8)
    return figure


def animate(course: Course, path: str | Path, arms: Sequence[str] | None = None) -> Path:
    """The same as a GIF of one frame a logged step (needs the `plot` extra and pillow); the file written."""
    import matplotlib.pyplot as plt
    from matplotlib.animation import FuncAnimation, PillowWriter

    chosen = list(arms or course.arms)
    wide = min(6, len(chosen))
    tall = -(-len(chosen) // wide)
    figure, axes = plt.subplots(
        tall, wide, figsize=(1.6 * wide, 1.9 * tall + 0.4), layout="constrained", squeeze=False
    )
    images = []
    for ax in axes.flat[len(chosen) :]:
        ax.set_axis_off()
    for ax, arm in zip(axes.flat, chosen, strict=False):
        images.append(_show(ax, course.maps[course.row(arm), 0, 0]))
        ax.set_title(arm, fontsize=7)

    def frame(step: int) -> list[Any]:
        for image, arm in zip(images, chosen, strict=True):
            image.set_data(course.maps[course.row(arm), 0, step])
        figure.suptitle(f"step {course.steps[step]:,}")
        return images

    film = FuncAnimation(figure, frame, frames=len(course.steps), blit=False)
    film.save(str(path), writer=PillowWriter(fps=2), dpi=80)
    plt.close(figure)
    return Path(path)


def _show(ax: Any, image: np.ndarray) -> Any:
    from matplotlib.colors import PowerNorm

    shown = ax.imshow(
        image,
        norm=PowerNorm(0.5, 0, 1),
        cmap="magma",
        aspect="auto",
        interpolation="nearest",
        extent=(-0.5, SHOWN + 0.5, 2 * len(image) + 0.5, 0.5),
    )
    ax.set_xticks([0, 1, 8, 16], ["★", "1", "8", "16"], fontsize=7)
    ax.tick_params(labelsize=7)
    return shown
