"""Options that several commands share, and how they are read: checked before any work begins."""

from __future__ import annotations

import os
import sys
from fractions import Fraction
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from regard._errors import InputError, OutputError

SEE, SHRINK, BUILD, STUDY, PAPERS = (
    "See what attention does",
    "Shrink the cache",
    "Build models",
    "Study how attention is learnt",
    "Papers",
)
Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="smollm2, a directory, a .gguf file, or a Hugging Face id."
    ),
]


def progress_console() -> Console:
    return Console(stderr=True)


def read_text(file: str | None, prompt: str | None) -> str | None:
    """The text that --text or --prompt names; None when neither is given."""
    if file is not None and prompt is not None:
        raise InputError("give either --text FILE or --prompt TEXT, got both; leave one out")
    if prompt is not None:
        if not prompt.strip():
            raise InputError("--prompt must be a text with words, got an empty one")
        return prompt
    if file is None:
        return None
    try:
        raw = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
    except FileNotFoundError:
        raise InputError(
            f"--text must name a file, got {file!r}, which does not exist; "
            "to give the text itself use --prompt"
        ) from None
    except OSError as error:
        raise InputError(f"--text cannot read {file!r}: {error.strerror}") from error
    name = "stdin" if file == "-" else repr(file)
    if b"\0" in raw:
        raise InputError(f"--text must be a text file in UTF-8, got {name}, which is binary")
    try:
        words = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"--text must be a text file in UTF-8, got {name} with byte 0x{raw[error.start]:02x} "
            f"at position {error.start}; convert it with: iconv -t utf-8"
        ) from error
    if not words.strip():
        raise InputError(f"--text must be a text with words, got {name}, which is empty")
    return words


def split_list(given: str) -> list[str]:
    """`a, b` -> ["a", "b"]."""
    return [part.strip() for part in given.split(",") if part.strip()]


def whole(name: str, given: str) -> int:
    try:
        return int(given)
    except ValueError:
        raise InputError.of(name, given=given, expected="whole numbers such as 2048") from None


def row_share(given: str) -> float | None:
    """`auto` -> None, `exact` -> 1.0, `1/16` -> 0.0625."""
    if given == "auto":
        return None
    try:
        share = 1.0 if given == "exact" else float(Fraction(given))
    except (ValueError, ZeroDivisionError):
        share = 0.0
    if not 0 < share <= 1:
        raise InputError.of("--rows", given=given, expected="auto, exact or a share such as 1/16")
    return share


def check_out(path: Path) -> None:
    """Find out before the work whether the page can be written."""
    from regard.papers._evidence import check_writable

    if path.is_dir():
        raise OutputError(f"--out must be a file, got the directory {path}; try {path}/report.html")
    if path.exists() and not os.access(path, os.W_OK):
        raise OutputError(f"--out must be writable, got {path}, which is read-only")
    check_writable(path.parent)
