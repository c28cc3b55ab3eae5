"""The film of a training: the map of one sequence over the steps, with sink, drain and peak below; still or moving."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from regard.labs.bigram_backcopy.training import Course

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROWS = (
    ("attention, share", ("ordinary to <s>", "trigger to <s>", "trigger to previous")),
    ("value drain, ratio", ("drain",)),
    ("residual peak, ratio", ("peak",)),
)


def film(course: Course, frames: int = 6) -> Figure:
    """Maps of the first layer (query down, key right) at `frames` steps, and three measures over all steps (needs `plot`)."""
    import matplotlib.pyplot as plt

    at = np.unique(np.linspace(0, len(course.steps) - 1, frames).round().astype(int))
    figure = plt.figure(figsize=(max(8.5, 1.5 * len(at) + 1), 4.6), layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=(1, 1.3))
    above, below = parts
    axes = above.subplots(1, len(at), sharey=True, squeeze=False)[0]
    image: Any = None
    for ax, time in zip(axes, at, strict=True):
        image = _show(ax, course.maps[time])
        ax.set_title(f"step {course.steps[time]:,}", fontsize=8)
        ax.set_xlabel("key", fontsize=8)
    axes[0].set_ylabel("query", fontsize=8)
    above.colorbar(image, ax=list(axes), shrink=0.8).set_label("attention", fontsize=8)
    curves(below.subplots(1, 3), course)
    return figure


def animate(course: Course, path: str | Path) -> Path:
    """The same as a GIF with one frame a logged step (needs the `plot` extra and pillow); the file written."""
    import matplotlib.pyplot as plt
    from matplotlib.animation import FuncAnimation, PillowWriter

    figure, axes = plt.subplots(1, 4, figsize=(12, 2.8), layout="constrained")
    image = _show(axes[0], course.maps[0])
    axes[0].set(xlabel="key", ylabel="query")
    curves(axes[1:], course)
    marks = [ax.axvline(1, color="0.3", lw=0.8) for ax in axes[1:]]

    def frame(time: int) -> list[Any]:
        image.set_data(course.maps[time])
        for mark in marks:
            mark.set_xdata([max(1, course.steps[time])] * 2)
        figure.suptitle(f"step {course.steps[time]:,}")
        return [image, *marks]

    moving = FuncAnimation(figure, frame, frames=len(course.steps), blit=False)
    moving.save(str(path), writer=PillowWriter(fps=3), dpi=80)
    plt.close(figure)
    return Path(path)


def curves(axes: Any, course: Course) -> None:
    """Attention, drain and peak over the steps, mean over seeds; a line for each layer or site."""
    x = np.maximum(course.steps, 1)
    for ax, (label, names) in zip(axes, ROWS, strict=True):
        for index, name in enumerate(names):
            lines = course.measures[name].mean(1).T
            for layer, line in enumerate(lines):
                what = (
                    f"site {layer}"
                    if name == "peak"
                    else name
                    if len(lines) == 1
                    else f"{name}, layer {layer}"
                )
                colour = f"C{index if len(names) > 1 else layer}"
                ax.plot(
                    x,
                    line,
                    color=colour,
                    ls=("-", "--", ":")[layer % 3] if len(names) > 1 else "-",
                    label=what,
                )
        ax.set(xscale="log", xlabel="step")
        ax.set_ylabel(label, fontsize=8)
        ax.legend(frameon=False, fontsize=6)


def _show(ax: Any, image: np.ndarray) -> Any:
    shown = ax.imshow(image, vmin=0, vmax=1, cmap="magma", interpolation="nearest")
    ax.tick_params(labelsize=7)
    return shown
