"""Results of laboratories that can be watched: a film of the training beside its series and checks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regard.labs.results import Result

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, slots=True)
class FilmedResult(Result):
    """What a laboratory gives, with the course of its training, from which the film is made."""

    course: Any

    def film(self) -> Figure:
        """Moments of the training side by side (needs the `plot` extra)."""
        raise NotImplementedError

    def animate(self, path: Path) -> Path:
        """The whole of it as a GIF (needs the `plot` extra)."""
        raise NotImplementedError

    def write(self, directory: str | Path) -> list[Path]:
        """The files of every laboratory, and with matplotlib `film.png` and `film.gif`."""
        written = Result.write(self, directory)
        try:
            import matplotlib.pyplot as plt
        except ImportError:
            return written
        still = Path(directory) / "film.png"
        figure = self.film()
        figure.savefig(still, dpi=100)
        plt.close(figure)
        return [*written, still, self.animate(Path(directory) / "film.gif")]
