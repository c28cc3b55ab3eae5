"""Named values of a long experiment, kept on disk so that an interrupted run can go on."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from regard.papers._evidence import plain, write_text


class Partial:
    """A JSON file of values, rewritten whole after each new one; `Partial(None)` keeps nothing.

    The file remembers a fingerprint of the experiment's code. Values measured by other code are
    not reused: `stale` is then true and the run starts afresh.
    """

    def __init__(self, path: Path | None, *, fingerprint: str = "", resume: bool = False) -> None:
        self.path = path
        self.fingerprint = fingerprint
        self.values: dict[str, Any] = {}
        self.stale = False
        self.seconds_before = 0.0
        self._seeds_before: list[int] = []
        self._start = time.perf_counter()
        if resume and path is not None and path.is_file():
            self._read(path)

    def _read(self, path: Path) -> None:
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            kept = {}
        if kept.get("fingerprint") != self.fingerprint:
            self.stale = True
            return
        self.values = kept["values"]
        self.seconds_before = float(kept["seconds"])
        self._seeds_before = kept["seeds"]

    @property
    def seconds(self) -> float:
        """Seconds spent so far, with those of the interrupted runs it continues."""
        return self.seconds_before + time.perf_counter() - self._start

    def get(self, name: str, compute: Callable[[], Any], seeds: list[int]) -> Any:
        """The kept value of `name`, or `compute()`, kept from now on."""
        if name not in self.values:
            self.values[name] = plain(compute(), where=f"partial {name!r}", finite=False)
            self._write(seeds)
        for seed in self._seeds_before:
            if seed not in seeds:
                seeds.append(seed)
        return self.values[name]

    def _write(self, seeds: list[int]) -> None:
        if self.path is None:
            return
        kept = {
            "fingerprint": self.fingerprint,
            "seconds": self.seconds,
            "seeds": sorted({*seeds, *self._seeds_before}),
            "values": self.values,
        }
        write_text(json.dumps(kept), self.path)

    def clear(self) -> None:
        """Forget everything, because the run is finished."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def fingerprint(module: ModuleType, scale: str) -> str:
    """A short hash of the experiment's source and scale."""
    path = getattr(module, "__file__", None)
    source = Path(path).read_bytes() if path else repr(module).encode()
    return hashlib.sha256(scale.encode() + b"\0" + source).hexdigest()[:16]
