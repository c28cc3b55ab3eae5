"""The settings of a laboratory: a frozen dataclass whose every field has a range, from values or from texts."""

from __future__ import annotations

import math
import numbers
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, ClassVar, get_args, get_origin, get_type_hints

import numpy as np

from regard._errors import InputError
from regard.labs.results import Result

Number = float | int


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
