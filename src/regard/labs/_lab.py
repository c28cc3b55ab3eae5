"""The one shape of a laboratory: settings with admissible ranges, a run, and measurements beside predictions.

A laboratory is a solvable model of how attention learns. Its file holds the model, the theorem's predictions as functions, and
one frozen dataclass of settings::

    lab = LinearICL(examples=20, seeds=8)      # or open("linear-icl", {"examples": "20"}), from texts
    result = lab.run()
    print(result)                              # what was predicted, what was measured, whether they agree
    result.plot(); result.to_frame(); result.write("out")

Theory is a line in every picture, experiment is points with bars (95 % of the mean). A `Check` compares one number with one
prediction: it holds within a tolerance that the check must justify, and it is undecided while the bar is wider than that.
"""

from __future__ import annotations

import csv
import json
import math
import numbers
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, get_args, get_origin, get_type_hints

import numpy as np
from jaxtyping import Float

from regard._errors import InputError, OutputError, nearest

if TYPE_CHECKING:
    import polars
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

State = tuple[np.ndarray, ...]
Number = float | int


@dataclass(frozen=True, slots=True)
class Listed:
    """A laboratory of the catalogue: one line about it, and where its settings are."""

    line: str
    where: str

    @property
    def config(self) -> type[Lab]:
        """The class of its settings, imported when asked for."""
        module, name = self.where.split(":")
        return getattr(import_module(f"regard.labs.{module}"), name)


LABS: dict[str, Listed] = {
    "linear-icl": Listed(
        "linear attention learns linear regression in context: gradient flow, its limit, risk under shifts",
        "linear_icl:LinearICL",
    ),
    "scan-and-snap": Listed(
        "a one-layer transformer scans for distinct tokens, then snaps: token fates, growth, two regimes",
        "scan_and_snap:ScanAndSnap",
    ),
}


def open(name: str, settings: Mapping[str, Any] | None = None) -> Lab:
    """The laboratory `name` with `settings`, whose values may be texts as typed on a command line.

    Raises:
        InputError: a name or key that does not exist, a value outside of its range, values impossible together.

    >>> open("linear-icl", {"examples": "40", "spectrum": "2,1,0.5"}).examples
    40
    """
    key = name.strip().lower().replace("_", "-")
    if key not in LABS:
        raise InputError.of(
            "laboratory", given=name, expected=f"one of {', '.join(LABS)}", fix=nearest(key, LABS)
        )
    config, settings = LABS[key].config, dict(settings or {})
    known = [row.key for row in config.settings()]
    for given in settings:
        if given not in known:
            raise InputError.of(
                f"setting of {key}",
                given=given,
                expected=f"one of {', '.join(known)}",
                fix=nearest(given, known),
            )
    return config(**config.admit(settings))


@dataclass(frozen=True, slots=True)
class Row:
    """A setting as shown to a user."""

    key: str
    default: Any
    range: str
    help: str


def setting(
    default: Any,
    help: str,
    *,
    low: Number | None = None,
    high: Number | None = None,
    above: Number | None = None,
    below: Number | None = None,
    choices: Sequence[str] = (),
    least: int = 1,
    most: int | None = None,
) -> Any:
    """A dataclass field with a range: `low` and `high` inclusive, `above` and `below` not, `least` and `most` how many values."""
    limits = {
        "low": low,
        "high": high,
        "above": above,
        "below": below,
        "choices": tuple(choices),
        "least": least,
        "most": most,
    }
    return field(default=default, metadata={"help": help, "limits": limits})


@dataclass(frozen=True, kw_only=True)
class Lab(ABC):
    """Settings of a laboratory; a subclass adds them by `setting(...)` and implements `run`."""

    name: ClassVar[str] = ""

    def __post_init__(self) -> None:
        for key, value in self.admit(self.values()).items():
            object.__setattr__(self, key, value)
        self.check()

    @classmethod
    def admit(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """Settings as values of their types, texts included, each within its range."""
        hints = get_type_hints(cls)
        return {
            one.name: _admit(one, hints[one.name], given[one.name])
            for one in fields(cls)
            if one.name in given
        }

    def check(self) -> None:
        """Raise `InputError` for settings that are impossible together."""
        return

    @abstractmethod
    def run(self) -> Result:
        """Measure, and compare with the predictions."""

    @classmethod
    def settings(cls) -> list[Row]:
        """Every setting with its default, its range in words, and what it is."""
        hints = get_type_hints(cls)
        return [
            Row(
                one.name,
                one.default,
                _words(hints[one.name], one.metadata["limits"]),
                one.metadata["help"],
            )
            for one in fields(cls)
        ]

    def values(self) -> dict[str, Any]:
        """The settings as plain values."""
        return {one.name: getattr(self, one.name) for one in fields(self)}


def _admit(one: Field[Any], hint: Any, given: Any) -> Any:
    """`given` as the type of its setting, or an error that names the range."""
    limits = one.metadata["limits"]
    refused = InputError.of(one.name, given=given, expected=_words(hint, limits))
    if given is MISSING:
        raise refused
    if get_origin(hint) is tuple:
        parts = given.split(",") if isinstance(given, str) else given
        if isinstance(parts, numbers.Number):
            parts = (parts,)
        if not isinstance(parts, Sequence | np.ndarray):
            raise refused
        values = tuple(_one(get_args(hint)[0], part, limits) for part in parts)
        most = limits["most"] or math.inf
        if None in values or not limits["least"] <= len(values) <= most:
            raise refused
        return values
    value = _one(hint, given, limits)
    if value is None:
        raise refused
    return value


def _one(hint: type, given: Any, limits: Mapping[str, Any]) -> Any:
    """One value, or None when it is not admissible."""
    if isinstance(given, str):
        given = given.strip()
    if hint is bool:
        words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
        return given if isinstance(given, bool) else words.get(str(given).lower())
    if hint is str:
        return given if not limits["choices"] or given in limits["choices"] else None
    if isinstance(given, bool):
        return None
    try:
        value = float(given)
    except (TypeError, ValueError):
        return None
    if not math.isfinite(value) or (hint is int and value != int(value)):
        return None
    low, high, above, below = (limits[key] for key in ("low", "high", "above", "below"))
    inside = (
        (low is None or value >= low)
        and (high is None or value <= high)
        and (above is None or value > above)
        and (below is None or value < below)
    )
    return hint(value) if inside else None


def _words(hint: Any, limits: Mapping[str, Any]) -> str:
    """A range in words: "a whole number from 1 to 64"."""
    several = get_origin(hint) is tuple
    kind = get_args(hint)[0] if several else hint
    if kind is bool:
        return "yes or no"
    if kind is str:
        return f"one of {', '.join(limits['choices'])}" if limits["choices"] else "a text"
    noun = "whole number" if kind is int else "number"
    low, high, above, below = (limits[key] for key in ("low", "high", "above", "below"))
    parts = []
    if low is not None and high is not None:
        parts.append(f"from {low:g} to {high:g}")
    else:
        parts += [f"of at least {low:g}"] if low is not None else []
        parts += [f"above {above:g}"] if above is not None else []
        parts += [f"of at most {high:g}"] if high is not None else []
        parts += [f"below {below:g}"] if below is not None else []
    limit = " and ".join(parts)
    if not several:
        return f"a {noun} {limit}".rstrip()
    least, most = limits["least"], limits["most"]
    count = f"{least} to {most} " if most else f"{least} or more " if least > 1 else ""
    return f"{count}{noun}s {limit}".rstrip() + ", separated by commas"


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

        >>> Check("a", "", measured=1.02, predicted=1.0, tolerance=0.05).holds
        True
        >>> Check("a", "", measured=1.02, predicted=1.0, tolerance=0.01).holds
        False
        >>> Check("a", "", measured=1.02, predicted=1.0, tolerance=0.01, error=0.5).holds is None
        True
        """
        if not math.isfinite(self.measured) or not math.isfinite(self.error):
            return None
        if self.sense == "=" and self.error > self.tolerance:
            return None if self.off <= self.tolerance + self.error else False
        if self.sense == "=":
            return self.off <= self.tolerance + self.error
        if self.off - self.error > self.tolerance:
            return False
        return True if self.off + self.error <= self.tolerance else None

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


def flow(
    velocity: Callable[..., State],
    start: State,
    times: Float[np.ndarray, " times"],
    *,
    accuracy: float = 1e-9,
) -> State:
    """The solution of d state / dt = velocity(*state) at `times` by SciPy's DOP853; a new first axis is time.

    `state` is a tuple of arrays of any shapes, so a whole batch of runs is one system. `times` begins with the start.

    Raises:
        InputError: SciPy is missing, or the solution cannot be continued (it diverges, say).
    """
    try:
        from scipy.integrate import solve_ivp
    except ImportError as error:
        raise InputError("gradient flow needs scipy; pip install 'regard[experiments]'") from error
    shapes = [part.shape for part in start]
    cuts = np.cumsum([part.size for part in start])[:-1]

    def unpack(flat: np.ndarray) -> State:
        return tuple(p.reshape(s) for p, s in zip(np.split(flat, cuts), shapes, strict=True))

    def pack(state: State) -> np.ndarray:
        return np.concatenate([np.ravel(part) for part in state])

    found = solve_ivp(
        lambda _, flat: pack(velocity(*unpack(flat))),
        (times[0], times[-1]),
        pack(start).astype(float),
        method="DOP853",
        t_eval=times,
        rtol=accuracy,
        atol=accuracy * 1e-3,
    )
    if not found.success:
        raise InputError(f"the flow cannot be integrated to time {times[-1]:g}: {found.message}")
    states = [unpack(flat) for flat in found.y.T]
    return tuple(np.stack(parts) for parts in zip(*states, strict=True))


def descend(
    velocity: Callable[..., State], start: State, times: Float[np.ndarray, " times"], step: float
) -> State:
    """Gradient descent with step size `step`: Euler's method, read off at the steps nearest to `times`."""
    wanted = np.rint(np.asarray(times) / step).astype(int)
    state, done, kept = tuple(np.array(part, float) for part in start), 0, []
    for target in wanted:
        for _ in range(int(target) - done):
            moves = zip(state, velocity(*state), strict=True)
            state = tuple(np.asarray(p + step * v) for p, v in moves)
        done = int(target)
        kept.append(state)
    return tuple(np.stack(parts) for parts in zip(*kept, strict=True))
