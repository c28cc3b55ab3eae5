"""How the time and memory of mixers grow with the text; `python -m benchmarks.build` writes results/build.json and its page.

Every mixer has the same width and heads and reads the same random states on one thread. CPU seconds of the process, the least
of some runs; a mixer stops at the length after which a run would take too long. The slope is that of a line through
log(seconds) over log(tokens) of the lengths from `FROM` on; softmax attention runs on PyTorch's fused kernel.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HERE = Path(__file__).parent
WIDTH, HEADS = 128, 4
FROM = 2048
LIMIT = 12.0
"""CPU seconds that one run may take."""

MIXERS: dict[str, tuple[dict[str, Any], float | None]] = {
    "softmax": ({}, None),
    "sliding": ({"window": 256}, 1.15),
    "linear": ({}, 1.15),
    "flow": ({}, 1.15),
    "delta": ({}, 1.15),
    "aaren": ({}, 1.15),
    "ssd": ({}, 1.15),
    "s6": ({}, 1.15),
    "memory": ({}, 1.15),
    "routing": ({}, 1.65),
    "dma": ({"window": 256}, None),
}
"""Name -> (options, the largest slope that is the goal). The rule of routing takes sqrt(tokens) clusters."""


def options(name: str, tokens: int) -> dict[str, Any]:
    given = dict(MIXERS[name][0])
    if name == "routing":
        clusters = max(2, round(math.sqrt(tokens)))
        given |= {"clusters": clusters, "window": tokens // clusters}
    return given


def keep_memory() -> None:
    """Tells glibc to keep what is freed.

    It gives blocks of 32 MB and more back to the system, so that every tensor of 64k tokens would be paid for in page faults;
    a program that runs for long sets the same by `MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=2000000000`.
    """
    most, trim = -4, -1  # M_MMAP_MAX, M_TRIM_THRESHOLD of malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(most, 0)
        mallopt(trim, 2_000_000_000)


def seconds(run: Any) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def timed(name: str, tokens: int, *, backward: bool) -> float:
    """CPU seconds of one pass, the least of three (of one, when a run takes over two seconds)."""
    from regard.nn import make_mixer

    torch.manual_seed(0)
    mixer = make_mixer(name, WIDTH, HEADS, **options(name, tokens))
    hidden = torch.randn(1, tokens, WIDTH, requires_grad=backward)

    def forward() -> None:
        with torch.no_grad():
            mixer.eval()(hidden)

    def both() -> None:
        mixer.train()(hidden).square().mean().backward()

    run = both if backward else forward
    found = [seconds(run)]
    while found[0] < 2 and len(found) < 4:
        found.append(seconds(run))
    return min(found)


def step(name: str, before: int, steps: int = 32) -> float:
    """CPU milliseconds of one more token after `before` tokens."""
    from regard.nn import make_mixer

    torch.manual_seed(0)
    mixer = make_mixer(name, WIDTH, HEADS, **options(name, before)).eval()
    state: dict[str, Tensor] = {}
    with torch.no_grad():
        mixer(torch.randn(1, before, WIDTH), state=state)
        token = torch.randn(1, 1, WIDTH)
        mixer(token, state=state)
        return min(seconds(lambda: mixer(token, state=state)) for _ in range(steps)) * 1000


def slope(by_length: dict[int, float]) -> float | None:
    points = [(math.log(n), math.log(s)) for n, s in by_length.items() if n >= FROM and s > 0]
    if len(points) < 3:
        return None
    x = [p[0] - sum(q[0] for q in points) / len(points) for p in points]
    return sum(a * p[1] for a, p in zip(x, points, strict=True)) / sum(a * a for a in x)


def crossover(by_length: dict[int, float], softmax: dict[int, float]) -> int | None:
    """The first measured length from which on the mixer is faster than softmax attention."""
    shared = [n for n in sorted(by_length) if n in softmax]
    for n in shared:
        if all(by_length[m] < softmax[m] for m in shared if m >= n):
            return n
    return None


def peak(name: str, tokens: int = 8192) -> float:
    """Peak MB of a forward pass above what was there; to be asked of a process of its own."""
    from benchmarks.worker import extra_memory
    from regard.nn import make_mixer

    mixer = make_mixer(name, WIDTH, HEADS, **options(name, tokens)).eval()
    hidden = torch.randn(1, tokens, WIDTH)
    with torch.no_grad():
        mixer(hidden[:, :256])
        return extra_memory(lambda: mixer(hidden))


def memory(name: str) -> float:
    command = [sys.executable, "-m", "benchmarks.build", "--peak", name]
    return float(subprocess.check_output(command, text=True, cwd=HERE.parent))


def measure(name: str, lengths: list[int]) -> dict[str, Any]:
    row: dict[str, Any] = {"mixer": name, "options": MIXERS[name][0], "goal": MIXERS[name][1]}
    for part, backward in (("forward", False), ("both", True)):
        found: dict[int, float] = {}
        for tokens in lengths:
            found[tokens] = timed(name, tokens, backward=backward)
            if found[tokens] > LIMIT / 4:
                break
        row[part], row[f"{part}_slope"] = found, slope(found)
    row["step_ms"] = {n: step(name, n) for n in (256, 8192)}
    row["memory_mb"] = memory(name)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.build", description=__doc__)
    parser.add_argument("--mixers", nargs="*", default=list(MIXERS), choices=list(MIXERS))
    parser.add_argument("--longest", type=int, default=65536)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "build.json")
    parser.add_argument("--keep", action="store_true", help="keep what the file has of others")
    parser.add_argument("--peak", choices=list(MIXERS), help="print a mixer's memory, nothing else")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.peak:
        print(peak(given.peak))
        return
    keep_memory()
    lengths = [1024 * 2**k for k in range(20) if 1024 * 2**k <= given.longest]
    rows: list[dict[str, Any]] = []
    if given.keep and given.out.is_file():
        held = json.loads(given.out.read_text())["rows"]
        rows = [row for row in held if row["mixer"] not in given.mixers]
    for name in given.mixers:
        rows.append(measure(name, lengths))
        print(json.dumps(rows[-1]), flush=True)
    rows.sort(key=lambda row: list(MIXERS).index(row["mixer"]))
    held = {
        "width": WIDTH,
        "heads": HEADS,
        "threads": 1,
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "rows": rows,
    }
    scratch = given.out.with_suffix(".tmp")
    scratch.write_text(json.dumps(held, indent=1))
    scratch.replace(given.out)
    write(given.out)


def write(results: Path, out: Path = HERE.parent / "docs" / "benchmarks-build.md") -> None:
    """The page of the figures in `results`."""
    held = json.loads(results.read_text())
    rows = held["rows"]
    by_name = {row["mixer"]: row for row in rows}

    def times(row: dict[str, Any], part: str) -> dict[int, float]:
        return {int(n): s for n, s in row[part].items()}

    lengths = sorted({n for row in rows for n in times(row, "forward")})
    lines = [
        "# Building: time and memory by length",
        "",
        f"Mixers of width {held['width']} with {held['heads']} heads on one thread; milliseconds of CPU time for one sequence. "
        "`python -m benchmarks.build` repeats it. Softmax attention is PyTorch's fused kernel. The allocator keeps what is freed "
        "(`MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=2000000000`): otherwise glibc returns blocks of 32 MB to the system, "
        "and tensors of 64k tokens cost up to twice the time in page faults.",
        "",
    ]
    for part, title in (("forward", "Forward"), ("both", "Forward and backward")):
        lines += [f"## {title}", ""]
        lines.append(
            "| mixer | "
            + " | ".join(f"{n // 1024}k" for n in lengths)
            + " | slope | goal | faster than softmax from |"
        )
        lines.append("|---" * (len(lengths) + 4) + "|")
        for row in rows:
            found = times(row, part)
            cells = [f"{1000 * found[n]:,.0f}" if n in found else "" for n in lengths]
            steep, goal = row[f"{part}_slope"], row["goal"]
            bound = (
                ""
                if goal is None or steep is None
                else f"{goal:g}, {'met' if steep <= goal else '**missed**'}"
            )
            cross = crossover(found, times(by_name["softmax"], part))
            cells += [
                "" if steep is None else f"{steep:.2f}",
                bound,
                "" if row["mixer"] == "softmax" else f"{cross:,} tokens" if cross else "not here",
            ]
            lines.append(f"| `{row['mixer']}` | " + " | ".join(cells) + " |")
        lines.append("")
    lines += [
        "## One more token, and memory",
        "",
        "| mixer | ms after 256 tokens | ms after 8,192 | extra memory of an 8k forward pass |",
        "|---|---|---|---|",
    ]
    for row in rows:
        early, late = row["step_ms"].values()
        lines.append(
            f"| `{row['mixer']}` | {early:.2f} | {late:.2f} | {row['memory_mb']:,.0f} MB |"
        )
    out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
