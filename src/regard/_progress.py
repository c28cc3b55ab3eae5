"""One progress bar for the whole library.

The bar is drawn on stderr, only on a terminal, and only once the work has lasted two seconds:
pipes, notebooks, logs and quick calls stay silent.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol, TypeVar

if TYPE_CHECKING:
    from rich.progress import Progress

T = TypeVar("T")

PATIENCE = 2.0  # seconds of silence before the bar appears


class Advance(Protocol):
    """What `progress(total, ...)` hands out: call it after each finished step."""

    def __call__(self, steps: float | int = 1, description: str | None = None) -> None: ...


def track(items: Iterable[T], description: str, total: float | int | None = None) -> Iterator[T]:
    """Iterate over `items` under a progress bar.

    Args:
        items: anything that can be iterated over.
        description: what is being done, in a few words ("Ablating heads").
        total: the number of items; taken from `len(items)` when it has one.

    Yields:
        The items, unchanged and in order.

    Example:
        >>> list(track([1, 2, 3], "Counting"))
        [1, 2, 3]
    """
    if total is None and isinstance(items, Sized):
        total = len(items)
    with progress(total, description) as advance:
        for item in items:
            yield item
            advance()


@contextmanager
def progress(total: float | int | None, description: str) -> Iterator[Advance]:
    """A progress bar for work that is not a simple loop.

    Args:
        total: how many steps there are, or None when that is not known.
        description: what is being done, in a few words.

    Yields:
        A function `advance(steps=1, description=None)`.

    Example:
        >>> with progress(2, "Fetching the model") as advance:
        ...     advance()
        ...     advance(description="Unpacking")
    """
    bar = _Bar(total, description) if sys.stderr.isatty() else None
    try:
        yield bar.advance if bar else _silent
    finally:
        if bar:
            bar.close()


def _silent(steps: float | int = 1, description: str | None = None) -> None:
    return None


class _Bar:
    """A rich bar that is created on the first step after `PATIENCE` seconds."""

    def __init__(self, total: float | int | None, description: str) -> None:
        self.total, self.description = total, description
        self.done = 0.0
        self.began = time.monotonic()
        self.drawn: Progress | None = None

    def advance(self, steps: float | int = 1, description: str | None = None) -> None:
        self.done += steps
        self.description = description or self.description
        if self.drawn is None and time.monotonic() - self.began >= PATIENCE:
            self.drawn = self._draw()
        if self.drawn is not None:
            task = self.drawn.task_ids[0]
            self.drawn.update(task, completed=self.done, description=self.description)

    def _draw(self) -> Progress:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
        from rich.progress import TimeElapsedColumn as Elapsed
        from rich.progress import TimeRemainingColumn as Remaining

        drawn = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            Elapsed(),
            Remaining(),
            console=Console(stderr=True),
            transient=True,
        )
        drawn.add_task(self.description, total=self.total)
        drawn.start()
        return drawn

    def close(self) -> None:
        if self.drawn is not None:
            self.drawn.stop()
