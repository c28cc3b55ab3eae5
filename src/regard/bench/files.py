"""Saving a bench: the page, and beside it `<stem>.json` (everything) and `<stem>.parquet` (tidy rows)."""

from __future__ import annotations

import importlib.util
import io
import json
import os
from pathlib import Path

from regard._errors import InputError
from regard.bench.page import render
from regard.bench.results import Results
from regard.report import check_writable
from regard.report.files import write_atomic


def save(results: Results, path: str | os.PathLike[str]) -> list[Path]:
    """Writes the page to `path` and the data beside it (Parquet when polars is installed); returns the paths.

    Every file is written whole or not at all. OutputError before anything is written when `path` cannot be.
    """
    page = check_writable(path)
    content = json.dumps(results.to_json(), ensure_ascii=False, allow_nan=False, indent=1)
    written = [
        write_atomic(page, render(results)),
        write_atomic(page.with_suffix(".json"), content + "\n"),
    ]
    if importlib.util.find_spec("polars") is not None:
        buffer = io.BytesIO()
        results.to_frame().write_parquet(buffer)
        written.append(write_atomic(page.with_suffix(".parquet"), buffer.getvalue()))
    return written


def read(path: str | os.PathLike[str]) -> Results:
    """The results in a JSON file that `save` wrote; InputError when it is none."""
    try:
        return Results.from_json(json.loads(Path(path).read_bytes()))
    except OSError as error:
        raise InputError(f"cannot read the bench {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is not the results of a bench: {error}") from None
