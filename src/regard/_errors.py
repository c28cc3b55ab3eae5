"""The errors that `regard` raises on purpose.

Every message says what was given, what was expected and the nearest fix, so that the command line
can print it as one line and a notebook user needs no traceback to act on it::

    >>> from regard._errors import InputError
    >>> raise InputError.of("rows", given=1.5, expected="a share in (0, 1] or None")
    Traceback (most recent call last):
    ...
    regard._errors.InputError: rows must be a share in (0, 1] or None, got 1.5
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import TypeVar

E = TypeVar("E", bound="RegardError")


class RegardError(Exception):
    """Base of every error that `regard` raises on purpose."""

    @classmethod
    def of(cls: type[E], name: str, *, given: object, expected: str, fix: str = "") -> E:
        """An error in the form of all: ``<name> must be <expected>, got <given>; <fix>``."""
        shown = repr(given)
        if len(shown) > 120:
            shown = shown[:117] + "..."
        return cls(f"{name} must be {expected}, got {shown}" + (f"; {fix}" if fix else ""))

    @classmethod
    def unknown(cls: type[E], name: str, *, given: object, known: Iterable[str]) -> E:
        """The error for a name that is none of `known`, with those that are close.

        >>> raise InputError.unknown("mixer", given="flwo", known=["flow", "linear"])
        Traceback (most recent call last):
        ...
        regard._errors.InputError: mixer must be one of flow, linear, got 'flwo'; did you mean flow?
        """
        known = list(known)
        fix = nearest(str(given), known)
        return cls.of(name, given=given, expected=f"one of {', '.join(known)}", fix=fix)


class InputError(RegardError, ValueError):
    """An argument, a text or a file that cannot be used as given."""


class ModelError(RegardError, RuntimeError):
    """A model that cannot be found, read or run (missing weights, NaN weights, a bad file)."""


class AttachError(RegardError, RuntimeError):
    """A model whose attention cannot be hooked, or a hook that changed what it must not change."""


class OutputError(RegardError, OSError):
    """A place where the result cannot be written."""


class EvidenceError(RegardError, ValueError):
    """A paper's experiment that recorded something its evidence file cannot hold."""


def at_least_one(**sizes: int) -> None:
    """Raises InputError for the first of these sizes that is below 1, by its name.

    >>> at_least_one(width=8, chunk=0)
    Traceback (most recent call last):
    ...
    regard._errors.InputError: chunk must be 1 or more, got 0
    """
    for name, value in sizes.items():
        if value < 1:
            raise InputError.of(name, given=value, expected="1 or more")


def nearest(given: str, known: Iterable[str], *, most: int = 3) -> str:
    """``did you mean a, b?`` for a misspelt name, or an empty string when nothing is close.

    >>> nearest("retreival-head", ["retrieval-head", "cake"])
    'did you mean retrieval-head?'
    """
    known = list(known)
    close = get_close_matches(given.lower(), known, n=most, cutoff=0.6)
    close += [name for name in known if given.lower() in name and name not in close]
    return f"did you mean {', '.join(close[:most])}?" if close and given else ""
