"""Evidence: what an experiment measured, as one JSON file that a reader can check.

The layout, exactly these keys::

    slug, title, arxiv, scale ("quick" | "full"), command, seconds, seeds, versions,
    claims: [{claim, setting, paper, here, interval, holds (true | false | null), note}],
    figures: [paths relative to the evidence directory]

`paper` is the paper's number as printed. `here` is a finite number, a text, or a flat mapping of
names to those. `interval` is `[low, high]` around `here`, or null. `holds` is null where our scale
cannot decide; `note` then says why.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from regard._errors import EvidenceError, OutputError

KEYS = (
    "slug",
    "title",
    "arxiv",
    "scale",
    "command",
    "seconds",
    "seeds",
    "versions",
    "claims",
    "figures",
)
CLAIM_KEYS = ("claim", "setting", "paper", "here", "interval", "holds", "note")


def plain(value: Any, *, where: str = "value", finite: bool = True) -> Any:
    """The value with tensors, arrays, tuples and numpy scalars turned into plain JSON types.

    >>> plain({"a": (1, 2.5)})
    {'a': [1, 2.5]}

    Raises:
        EvidenceError: NaN or infinity (unless `finite=False`), or a type JSON does not have.
    """
    if hasattr(value, "tolist") and not isinstance(value, (str, bytes)):
        value = value.tolist()
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        if finite and not math.isfinite(value):
            raise EvidenceError(f"{where} must be finite, got {value}; record None and say why")
        return value
    if isinstance(value, Mapping):
        return {
            str(key): plain(item, where=f"{where}[{key!r}]", finite=finite)
            for key, item in value.items()
        }
    if isinstance(value, (list, tuple, set)):
        return [plain(item, where=f"{where}[{i}]", finite=finite) for i, item in enumerate(value)]
    raise EvidenceError(
        f"{where} must be made of numbers, texts, lists and mappings, got {type(value).__name__}"
    )


def check(evidence: Mapping[str, Any]) -> None:
    """Raise `EvidenceError` at the first place where `evidence` departs from the layout."""
    _need(evidence, KEYS, "evidence")
    plain(evidence, where="evidence")
    _be("scale", evidence["scale"], evidence["scale"] in ("quick", "full"), '"quick" or "full"')
    for key in ("slug", "title", "arxiv", "command"):
        _be(key, evidence[key], _text(evidence[key]), "a text that is not empty")
    seconds = evidence["seconds"]
    _be("seconds", seconds, _number(seconds) and seconds >= 0, "a number >= 0")
    seeds = evidence["seeds"]
    _be("seeds", seeds, _all(seeds, lambda s: type(s) is int), "a list of whole numbers")
    versions = evidence["versions"]
    named = isinstance(versions, Mapping) and all(_text(text) for text in versions.values())
    _be("versions", versions, named, "a mapping of package names to version texts")
    figures = evidence["figures"]
    relative = _all(figures, lambda f: _text(f) and not f.startswith(("/", "..")))
    _be("figures", figures, relative, "a list of paths relative to the evidence directory")
    claims = evidence["claims"]
    _be("claims", claims, _all(claims, lambda c: True) and len(claims) > 0, "a list with claims")
    for number, claim in enumerate(claims):
        _check_claim(claim, f"claims[{number}]")


def _check_claim(claim: Any, where: str) -> None:
    _be(where, claim, isinstance(claim, Mapping), "a mapping")
    _need(claim, CLAIM_KEYS, where)
    _be(f"{where}.claim", claim["claim"], _text(claim["claim"]), "a text that is not empty")
    for key in ("setting", "paper", "note"):
        _be(f"{where}.{key}", claim[key], isinstance(claim[key], str), "a text")
    here, interval, holds = claim["here"], claim["interval"], claim["holds"]
    inner = list(here.values()) if isinstance(here, Mapping) else [here]
    flat = all(_number(x) or isinstance(x, str | bool) or x is None for x in inner)
    _be(f"{where}.here", here, flat, "a number, a text, null, or a flat mapping of those")
    ordered = interval is None or (
        _all(interval, _number) and len(interval) == 2 and interval[0] <= interval[1]
    )
    _be(f"{where}.interval", interval, ordered, "null or [low, high] with low <= high")
    _be(f"{where}.holds", holds, holds is None or isinstance(holds, bool), "true, false or null")
    if holds is None and not claim["note"]:
        raise EvidenceError(f"{where}.note must say why the claim was not decided, got ''")
    if holds is not None and here is None:
        raise EvidenceError(f"{where}.holds must be null where nothing was measured, got {holds}")


def read(path: Path) -> dict[str, Any]:
    """The evidence in a file, checked."""
    try:
        evidence = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EvidenceError(f"{path} is not readable evidence: {error}") from error
    check(evidence)
    return evidence


def write(evidence: Mapping[str, Any], path: Path) -> None:
    """Write evidence so that the file is either the old one or the whole new one."""
    check(evidence)
    text = json.dumps(plain(evidence), indent=1, ensure_ascii=False, allow_nan=False)
    write_text(text + "\n", path)


def write_text(text: str, path: Path) -> None:
    """Write a text file by renaming a finished one into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def check_writable(directory: Path) -> None:
    """Raise `OutputError` unless files can be created in `directory` (which is made if absent)."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=directory, prefix=".writable."):
            pass
    except OSError as error:
        raise OutputError(
            f"cannot write into {directory} ({error.strerror}); choose another place with --out"
        ) from error


def _need(mapping: Any, keys: tuple[str, ...], where: str) -> None:
    _be(where, mapping, isinstance(mapping, Mapping), "a mapping")
    missing, extra = [k for k in keys if k not in mapping], [k for k in mapping if k not in keys]
    if missing or extra:
        raise EvidenceError(
            f"{where} must have exactly the keys {', '.join(keys)}; "
            f"missing: {', '.join(missing) or 'none'}, unknown: {', '.join(extra) or 'none'}"
        )


def _be(where: str, given: object, true: bool, expected: str) -> None:
    if not true:
        raise EvidenceError.of(where, given=given, expected=expected)


def _text(value: object) -> bool:
    return isinstance(value, str) and bool(value)


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _all(values: object, rule: Any) -> bool:
    return isinstance(values, list) and all(rule(value) for value in values)
