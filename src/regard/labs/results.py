"""What a laboratory gives: measured series beside predicted ones, and single numbers beside what theory says of them."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from regard._errors import InputError, OutputError

if TYPE_CHECKING:
    import polars
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from regard.labs.settings import Lab

Number = float | int
R = TypeVar("R", bound="Result")


@dataclass(frozen=True, slots=True)
class Series:
    """One measured curve with its prediction.

    Attributes:
        name: short name, a column of the frame.
        x, measured, error, predicted: one number a point; `error` is half of the 95 % interval (0 when exact), `predicted` is NaN
            where the theory is silent.
        x_label, y_label: with units.
        panel: series of one panel are drawn together; "" for a panel of its own.
        line: the prediction on a finer grid, for the picture.
        log: axes on a logarithmic scale: "", "x", "y" or "xy".
    """

    name: str
    x: np.ndarray
    measured: np.ndarray
    error: np.ndarray
    predicted: np.ndarray
    x_label: str
    y_label: str
    panel: str = ""
    line: tuple[np.ndarray, np.ndarray] | None = None
    log: str = ""

    @classmethod
    def of(
        cls,
        name: str,
        x: Sequence[Number] | np.ndarray,
        found: Sequence[tuple[Number, Number]],
        predicted: Sequence[Number] | np.ndarray,
        x_label: str,
        y_label: str,
        **more: Any,
    ) -> Series:
        """The series whose points were `found` as pairs of mean and half of an interval; `more` are the other attributes.

        >>> Series.of("risk", [1, 2], [(0.5, 0.1), (0.3, 0.1)], [0.5, 0.25], "n", "risk").error
        array([0.1, 0.1])
        """
        measured, error = np.array(found, float).T
        points = (np.array(x, float), measured, error, np.array(predicted, float))
        return cls(name, *points, x_label, y_label, **more)

    def __post_init__(self) -> None:
        sizes = {
            key: np.shape(getattr(self, key)) for key in ("x", "measured", "error", "predicted")
        }
        if len(set(sizes.values())) != 1 or len(np.shape(self.x)) != 1:
            raise InputError(
                f"series {self.name} needs one number a point in each row, got shapes {sizes}"
            )


@dataclass(frozen=True, slots=True)
class Check:
    """One prediction beside one measurement.

    Attributes:
        name: short name.
        says: the sentence that is checked.
        measured: the number found; `error` is half of its 95 % interval, 0 when exact.
        predicted: the number expected, or the bound.
        tolerance: how far off may it be; `why` justifies it.
        sense: "=" equal within the tolerance, "<" or ">" a bound on that side.
    """

    name: str
    says: str
    measured: Number
    predicted: Number
    tolerance: Number = 0.0
    why: str = ""
    error: Number = 0.0
    sense: str = "="

    @property
    def off(self) -> Number:
        """How far the measurement is on the wrong side; for "=" how far at all."""
        signed = self.measured - self.predicted
        return {"=": abs(signed), "<": signed, ">": -signed}[self.sense]

    @property
    def holds(self) -> bool | None:
        """Whether the prediction is met; None while the error bar cannot tell.

        A measurement that is off by more than the tolerance never holds; one whose error bar alone is wider shows nothing.

        >>> Check("a", "", measured=1.02, predicted=1.0, tolerance=0.05).holds
        True
        >>> Check("a", "", measured=1.02, predicted=1.0, tolerance=0.01).holds
        False
        >>> Check("a", "", measured=1.02, predicted=1.0, tolerance=0.01, error=0.5).holds is None
        True
        """
        if not math.isfinite(self.measured) or not math.isfinite(self.error):
            return None
        if self.off - self.error > self.tolerance:
            return False
        room = self.error if self.sense == "=" else self.off + self.error
        return True if max(self.off, room) <= self.tolerance else None

    def row(self) -> dict[str, Any]:
        """As one row of a table."""
        keys = ("name", "says", "measured", "error", "sense", "predicted", "tolerance", "why")
        return {key: getattr(self, key) for key in keys} | {"holds": self.holds}


@dataclass(frozen=True, slots=True)
class Result:
    """What a laboratory measured and predicted.

    Attributes:
        lab: its name.
        settings: what it was run with.
        series: curves, by name.
        checks: predictions beside measurements, by name.
    """

    lab: str
    settings: dict[str, Any]
    series: dict[str, Series]
    checks: dict[str, Check]

    @classmethod
    def of(
        cls: type[R], lab: Lab, *parts: tuple[Sequence[Series], Sequence[Check]], **more: Any
    ) -> R:
        """The result of a laboratory from the series and checks of its parts; `more` is what a subclass adds.

        Raises:
            InputError: two series, or two checks, of one name.
        """
        series = [one for found, _ in parts for one in found]
        checks = [one for _, found in parts for one in found]
        for kind in (series, checks):
            names = [one.name for one in kind]
            if len(set(names)) < len(names):
                raise InputError(f"{lab.name}: names must differ, got {', '.join(names)}")
        by_name = {one.name: one for one in series}
        return cls(lab.name, lab.values(), by_name, {one.name: one for one in checks}, **more)

    def rows(self) -> list[dict[str, Any]]:
        """Tidy: a row for each point of each series."""
        return [
            {"series": one.name, "x": x, "measured": m, "error": e, "predicted": p}
            for one in self.series.values()
            for x, m, e, p in zip(
                *(
                    np.asarray(v, float).tolist()
                    for v in (one.x, one.measured, one.error, one.predicted)
                ),
                strict=True,
            )
        ]

    def to_frame(self) -> polars.DataFrame:
        """Columns `series, x, measured, error, predicted` (needs the `frames` extra)."""
        import polars

        return polars.DataFrame(self.rows())

    def __str__(self) -> str:
        marks = {True: "holds", False: "does not hold", None: "cannot tell"}
        lines = [
            f"{self.lab}: {sum(c.holds is True for c in self.checks.values())} of {len(self.checks)} predictions met"
        ]
        for one in self.checks.values():
            bar = f" +- {one.error:.2g}" if one.error else ""
            lines.append(
                f"  {marks[one.holds]:13} {one.says}: {one.measured:.4g}{bar} {one.sense} {one.predicted:.4g}"
            )
        return "\n".join(lines)

    def plot(self, panels: Sequence[str] | None = None) -> Figure:
        """A panel for each measured quantity: theory as a line, experiment as points with bars (needs the `plot` extra).

        Args:
            panels: which, by name; all by default.

        Raises:
            InputError: a panel that does not exist.
        """
        import matplotlib.pyplot as plt

        groups: dict[str, list[Series]] = {}
        for one in self.series.values():
            groups.setdefault(one.panel or one.name, []).append(one)
        unknown = [name for name in panels or () if name not in groups]
        if unknown:
            raise InputError.of("panels", given=unknown[0], expected=f"one of {', '.join(groups)}")
        chosen = list(panels or groups)
        wide = min(3, len(chosen))
        tall = math.ceil(len(chosen) / wide)
        figure, axes = plt.subplots(
            tall, wide, figsize=(4.2 * wide, 3.2 * tall), layout="constrained", squeeze=False
        )
        for ax in axes.flat[len(chosen) :]:
            ax.set_axis_off()
        for ax, name in zip(axes.flat, chosen, strict=False):
            draw(ax, groups[name])
            ax.set_title(name, fontsize=10)
        return figure

    def write(self, directory: str | Path) -> list[Path]:
        """Write `series.csv`, `checks.csv`, `settings.json` and, with matplotlib, `figure.svg`; the files written.

        Raises:
            OutputError: a place that cannot be written.
        """
        place = Path(directory)
        try:
            place.mkdir(parents=True, exist_ok=True)
            written = [place / name for name in ("series.csv", "checks.csv", "settings.json")]
            _write_csv(written[0], self.rows())
            _write_csv(written[1], [one.row() for one in self.checks.values()])
            written[2].write_text(json.dumps({"lab": self.lab, **self.settings}, indent=2) + "\n")
            try:
                import matplotlib.pyplot as plt
            except ImportError:
                return written
            figure = self.plot()
            figure.savefig(place / "figure.svg", bbox_inches="tight", metadata={"Date": None})
            plt.close(figure)
        except OSError as error:
            raise OutputError(f"cannot write to {place}: {error}") from error
        return [*written, place / "figure.svg"]


def draw(ax: Axes, group: Sequence[Series]) -> None:
    """The series of one panel: theory as lines, experiment as points with bars, one colour each."""
    for index, one in enumerate(group):
        colour, single = f"C{index}", len(group) == 1
        x, y = one.line if one.line is not None else (one.x, one.predicted)
        if np.isfinite(y).any():
            ax.plot(x, y, color=colour, lw=1.2, label="theory" if single else None)
        seen = np.where(one.error > 0, one.error, 0.0)
        ax.errorbar(
            one.x,
            one.measured,
            yerr=seen if seen.any() else None,
            fmt="o",
            ms=3.5,
            color="C1" if single else colour,
            capsize=2,
            lw=1,
            label="experiment" if single else one.name,
        )
    first = group[0]
    if "x" in first.log:
        ax.set_xscale("log")
    if "y" in first.log:
        ax.set_yscale("log")
    ax.set(xlabel=first.x_label, ylabel=first.y_label)
    ax.legend(frameon=False, fontsize=8)


def _write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]) if rows else [])
        writer.writeheader()
        writer.writerows(rows)


def interval(samples: np.ndarray, axis: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Mean and half of its 95 % interval along `axis` (Student's t; NaN for a single sample).

    >>> mean, half = interval(np.array([1.0, 2.0, 3.0]))
    >>> round(float(mean), 3), round(float(half), 3)
    (2.0, 2.484)
    """
    from scipy.stats import t

    samples = np.asarray(samples, float)
    count = samples.shape[axis]
    mean = np.asarray(samples.mean(axis))
    if count < 2:
        return mean, np.full_like(mean, np.nan)
    return mean, np.asarray(t.ppf(0.975, count - 1) * samples.std(axis, ddof=1) / math.sqrt(count))
