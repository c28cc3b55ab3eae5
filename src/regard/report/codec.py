"""Dataclasses of numpy arrays to plain JSON values and back, driven by their annotations.

Floats keep 7 significant digits; NaN and infinities become null (JSON has neither) and read
back as NaN. Byte and boolean arrays are written as `{"shape", "dtype", "zlib"}` with base64
text, all others as lists.
"""

from __future__ import annotations

import base64
import dataclasses
import math
import types
import typing
import zlib
from typing import Any, TypeVar

import numpy as np

T = TypeVar("T")


def encode(value: Any) -> Any:
    """Turn a dataclass, or a part of one, into values that strict JSON can hold."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: encode(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, np.ndarray):
        return _encode_array(value)
    if isinstance(value, dict):
        return {str(key): encode(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [encode(item) for item in value]
    if isinstance(value, bool | np.bool_):
        return bool(value)
    if isinstance(value, int | np.integer):
        return int(value)
    if isinstance(value, float | np.floating):
        return _number(float(value))
    if value is None or isinstance(value, str):
        return value
    raise TypeError(
        f"a report holds numbers, strings, lists and arrays, got {type(value).__name__}"
    )


def decode(kind: type[T], value: Any) -> T:
    """Rebuild an object of the annotated type `kind` from the output of `encode`."""
    return _decode(kind, value)


def _number(value: float) -> float | None:
    return float(f"{value:.7g}") if math.isfinite(value) else None


def _encode_array(array: np.ndarray) -> Any:
    if array.dtype == np.uint8 or array.dtype == np.bool_:
        packed = base64.b64encode(zlib.compress(np.ascontiguousarray(array).tobytes(), 9)).decode()
        return {"shape": list(array.shape), "dtype": str(array.dtype), "zlib": packed}
    return encode(array.tolist())


def _decode_array(value: Any, kind: Any) -> np.ndarray:
    if isinstance(value, dict):
        raw = zlib.decompress(base64.b64decode(value["zlib"]))
        return np.frombuffer(raw, dtype=value["dtype"]).reshape(value["shape"]).copy()
    names = getattr(kind, "dtypes", ("float64",))
    if any(name.startswith("int") for name in names):
        return np.array(value, dtype=np.int64)
    return np.array(value, dtype=np.float64)  # None becomes NaN


def _decode(kind: Any, value: Any) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        return _decode(next(a for a in arguments if a is not type(None)), value)
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        names = {f.name for f in dataclasses.fields(kind)}
        return kind(**{k: _decode(hints[k], v) for k, v in value.items() if k in names})  # type: ignore[misc]
    if hasattr(kind, "array_type") or kind is np.ndarray:
        return _decode_array(value, kind)
    if origin is list:
        return [_decode(arguments[0], item) for item in value]
    if origin is tuple:
        return tuple(_decode(a, item) for a, item in zip(arguments, value, strict=True))
    if origin is dict:
        return {key: _decode(arguments[1], item) for key, item in value.items()}
    if kind is float:
        return math.nan if value is None else float(value)
    return value
