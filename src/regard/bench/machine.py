"""What the machine can do, and what a piece of work took: read bandwidth, peak memory, times.

A decoding step reads every weight and every held key and value once, so bytes over bandwidth is the
least time it can take. Printed beside each measured time, it tells how much of a speed-up is less
work and how much is only the removal of waste.
"""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

_STATUS, _REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def read_bandwidth(device: torch.device | str = "cpu", megabytes: int = 256) -> float:
    """Bytes that a second reads, on `device`, with the threads torch uses now: the best of seven sums over a large array.

    Cost: about half a second, and the array's memory.
    """
    data = torch.ones(megabytes * 250_000, device=device)
    best = min(_timed(lambda: data.sum().item(), torch.device(device)) for _ in range(7))
    return data.nbytes / best


def decode_bytes(model: nn.Module) -> int:
    """Bytes of weights that one decoding step reads: all of them, but of an embedding that is not also the output only a row."""
    output = getattr(model, "get_output_embeddings", lambda: None)()
    entry = getattr(model, "get_input_embeddings", lambda: None)()
    total = sum(parameter.nbytes for parameter in model.parameters())
    shared = (
        output is not None
        and entry is not None
        and output.weight.data_ptr() == entry.weight.data_ptr()
    )
    return total - (0 if shared or entry is None else entry.weight.nbytes)


@dataclass
class Measured:
    """Seconds, and the largest memory above what was in use before in bytes (None where it cannot be known)."""

    seconds: float = 0.0
    peak: int | None = None


@contextmanager
def measured(device: torch.device) -> Iterator[Measured]:
    """Measures a block: its wall time and peak memory (Linux resident set, or the CUDA allocator's)."""
    result = Measured()
    before = _reset_peak(device)
    _wait(device)
    start = time.perf_counter()
    yield result
    _wait(device)
    result.seconds = time.perf_counter() - start
    result.peak = None if before is None else max(0, _peak(device) - before)


def _timed(work: Any, device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _reset_peak(device: torch.device) -> int | None:
    """Forgets the peak so far; returns the bytes in use, None where peaks cannot be read."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    if device.type != "cpu" or sys.platform != "linux":
        return None
    try:
        ctypes.CDLL(None).malloc_trim(0)  # freed memory that the allocator holds would hide a peak
        _REFS.write_text("5")
    except (OSError, AttributeError):
        return None
    return _status("VmRSS")


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status("VmHWM")


def _status(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    return 0
