"""Saving a report's data: `<stem>.json` (everything) and `<stem>.parquet` (one row for each
number of a head).

Every file is written beside its target and renamed into place, so that an interrupted run
leaves the old file or none, never half of one.
"""

from __future__ import annotations

import importlib.util
import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from regard._errors import InputError, OutputError
from regard.report.codec import decode, encode
from regard.report.schema import SCHEMA_VERSION, ReportData

if TYPE_CHECKING:
    import polars


def check_writable(path: str | os.PathLike[str]) -> Path:
    """Return `path` as a `Path`, or say why nothing can be written there (`OutputError`)."""
    target = Path(path).expanduser()
    folder = target.parent
    if target.is_dir():
        raise OutputError(
            f"cannot write {target}: it is a directory; name a file, e.g. {target}/report.html"
        )
    if not folder.is_dir():
        raise OutputError(f"cannot write {target}: there is no directory {folder}; create it first")
    if target.exists() and not os.access(target, os.W_OK):
        raise OutputError(f"cannot write {target}: the file is not writable")
    try:
        descriptor, probe = tempfile.mkstemp(prefix=".regard-", dir=folder)
    except OSError as error:
        raise OutputError(
            f"cannot write {target}: {error.strerror or error} in {folder}; choose another --out"
        ) from error
    os.close(descriptor)
    os.unlink(probe)
    return target


def write_atomic(path: str | os.PathLike[str], content: str | bytes) -> Path:
    """Write `content` to `path` in one step: a temporary file beside it, then a rename."""
    target = Path(path).expanduser()
    data = content.encode() if isinstance(content, str) else content
    descriptor, name = tempfile.mkstemp(prefix=f".{target.name}-", dir=target.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    return target


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def to_json(data: ReportData) -> str:
    """The whole report as JSON text (NaN as null)."""
    return json.dumps(encode(data), ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def from_json(text: str | bytes) -> ReportData:
    """Read a report back from `to_json`; `InputError` when it is not a report of this version."""
    value = json.loads(text)
    if not isinstance(value, dict) or value.get("schema") != SCHEMA_VERSION:
        found = value.get("schema") if isinstance(value, dict) else type(value).__name__
        raise InputError(f"expected a report of schema {SCHEMA_VERSION}, got {found}")
    return decode(ReportData, value)


def read_data(path: str | os.PathLike[str]) -> ReportData:
    """Read a report's JSON file."""
    return from_json(Path(path).read_bytes())


def to_frame(data: ReportData) -> polars.DataFrame:
    """One row a number: stack, layer, head, measure, value, se (null when exact)."""
    try:
        import polars as pl
    except ImportError as error:
        raise ImportError("report frames need polars: pip install 'regard[frames]'") from error
    rows: dict[str, list] = {k: [] for k in ("stack", "layer", "head", "measure", "value", "se")}
    for stack in data.stacks:
        for measure in stack.measures:
            layers, heads = measure.values.shape
            rows["stack"] += [stack.name] * (layers * heads)
            rows["layer"] += [layer for layer in range(layers) for _ in range(heads)]
            rows["head"] += list(range(heads)) * layers
            rows["measure"] += [measure.key] * (layers * heads)
            rows["value"] += measure.values.astype(float).ravel().tolist()
            error = measure.error
            rows["se"] += (
                [None] * (layers * heads) if error is None else error.astype(float).ravel().tolist()
            )
    types = {
        "stack": pl.String, "layer": pl.Int32, "head": pl.Int32,
        "measure": pl.String, "value": pl.Float64, "se": pl.Float64,
    }  # fmt: skip
    frame = pl.DataFrame(rows, schema=types)
    return frame.filter(pl.col("value").is_not_nan())


def write_data(
    data: ReportData, stem: str | os.PathLike[str], parquet: bool | None = None
) -> list[Path]:
    """Write `<stem>.json` and `<stem>.parquet`; return the paths written.

    An existing directory as `stem` stands for `<stem>/report`. `parquet=None` writes the
    Parquet file when polars is installed, `True` requires it, `False` leaves it out.
    """
    base = Path(stem).expanduser()
    base = base / "report" if base.is_dir() else base
    if parquet is None:
        parquet = importlib.util.find_spec("polars") is not None
    targets = [base.with_name(base.name + end) for end in (".json", ".parquet")[: 1 + parquet]]
    for target in targets:
        check_writable(target)
    written = []
    if parquet:
        import io

        buffer = io.BytesIO()
        to_frame(data).write_parquet(buffer)
        written.append(write_atomic(targets[1], buffer.getvalue()))
    written.insert(0, write_atomic(targets[0], to_json(data)))
    return written
