"""`python -m benchmarks.sparse`: attention of a prefill under each pattern beside dense attention; writes results/sparse.json.

One attention layer, 9 query heads of 64 dimensions, float32, blocks of 128, one thread: once with 9 KV heads, once with 3 (the
layout of SmolLM2). All ways of one length run in turns (A B C A B C ...), every pattern's ratio is taken against the dense call
of the same turn, and the median is kept. Times are the process's own, so that other processes disturb them less. `ideal` is
the ratio of the block pairs of the causal half to those the pattern names.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from regard.engine import AttentionCall, CausalMask, Pipeline, attend
from regard.sparse import (
    Dilated,
    LongNet,
    Pattern,
    Power,
    Sliding,
    SlidingTokens,
    Strided,
    TopKBlocks,
)

HEADS, DIM, BLOCK = 9, 64, 128
OUT = Path(__file__).parent / "results" / "sparse.json"

PATTERNS: dict[str, Callable[[], Pattern]] = {
    "sliding window 512": lambda: Sliding(window=5, sinks=0),
    "sliding window 512, 4 sink tokens": lambda: SlidingTokens(window=512, sinks=4),
    "powers of two, 1 sink block": lambda: Power(window=1, sinks=1),
    "powers of two, window 5, 1 sink block": lambda: Power(window=5, sinks=1),
    "dilated window": lambda: Dilated(window=5, dilation=2, sinks=1),
    "strided": lambda: Strided(window=4, stride=16, sinks=1),
    "LongNet": lambda: LongNet(segments=(4, 16, 64), dilations=(1, 4, 16)),
    "top 8 blocks": lambda: TopKBlocks(count=8),
}


def ideal(pattern: Pattern, length: int) -> float | None:
    """Causal block pairs over named ones, averaged over the heads; None where they depend on the text."""
    if not pattern.static:
        return None
    named = [
        sum(map(len, pattern.of_head(head, HEADS).lists(length, length))) for head in range(HEADS)
    ]
    count = -(-length // BLOCK)
    return count * (count + 1) / 2 / (sum(named) / HEADS)


def measure(length: int, kv_heads: int, rounds: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(length)
    query = torch.randn(1, HEADS, length, DIM, generator=generator)
    key, value = (torch.randn(1, kv_heads, length, DIM, generator=generator) for _ in range(2))
    patterns = {name: make() for name, make in PATTERNS.items()}

    def run(*methods: Pattern) -> float:
        start = time.process_time()
        call = AttentionCall(query, key, value, CausalMask(length), DIM**-0.5)
        attend(call, Pipeline(methods))
        return time.process_time() - start

    for pattern in patterns.values():
        run(pattern)  # makes the lists, once for each shape
    times: dict[str, list[float]] = {name: [] for name in ("dense", *patterns)}
    for _ in range(rounds):
        times["dense"].append(run())
        for name, pattern in patterns.items():
            times[name].append(run(pattern))
    rows = []
    for name, taken in times.items():
        ratios = [d / t for d, t in zip(times["dense"], taken, strict=True)]
        density = None if name == "dense" else ideal(patterns[name], length)
        rows.append(
            {
                "length": length,
                "kv_heads": kv_heads,
                "pattern": name,
                "seconds": round(statistics.median(taken), 5),
                "speedup": round(statistics.median(ratios), 2),
                "low": round(min(ratios), 2),
                "high": round(max(ratios), 2),
                "ideal": None if density is None else round(density, 1),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sparse", description=__doc__)
    parser.add_argument(
        "--lengths", type=int, nargs="*", default=[512, 1024, 2048, 4096, 8192, 16384]
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    rows: list[dict[str, Any]] = []
    for length in given.lengths:
        for kv_heads in (HEADS, 3):
            rounds = max(given.rounds, min(30, given.rounds * 4096 // length))
            rows += measure(length, kv_heads, rounds)
            for row in rows[-1 - len(PATTERNS) :]:
                print(json.dumps(row), flush=True)
    found = {
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "load": round(os.getloadavg()[0], 1),
        },
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "rows": rows,
    }
    given.out.parent.mkdir(parents=True, exist_ok=True)
    scratch = given.out.with_suffix(".tmp")
    scratch.write_text(json.dumps(found, indent=1) + "\n")
    scratch.replace(given.out)


if __name__ == "__main__":
    main()
