"""`python -m benchmarks.prefill`: a whole prefill under each cache, eviction included, over a plain one with `DynamicCache`.

The plain prefill is transformers' own, of the untouched model. CPU time of one thread; all methods take turns in every round, and
a ratio is taken between neighbours in time, then the median over rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import DynamicCache

import regard
from regard import cache as caches
from regard.cache import scorers
from regard.cache.budgets import Calibrated
from regard.texts import default_text

OUT = Path(__file__).parent / "results" / "prefill.json"
BUDGET = 0.2


def ways(model: Any) -> dict[str, Callable[[], Any]]:
    """A fresh cache of each kind, by the names of the quality benchmark."""
    held = caches.calibrate(model)
    rule = Calibrated(BUDGET, calibration=held)
    return {
        "full": lambda: caches.Full(model),
        "streaming": lambda: caches.Streaming(model, budget=BUDGET),
        "snapkv": lambda: caches.SnapKV(model, budget=BUDGET),
        "cake": lambda: caches.Cake(model, budget=BUDGET),
        "h2o": lambda: caches.H2O(model, budget=BUDGET),
        "h2o+calibrated": lambda: caches.Cache(model, scorers.H2O(), rule),
        "h2o sampled+calibrated": lambda: caches.Cache(model, scorers.H2O(sample=8), rule),
        "expected": lambda: caches.ExpectedAttention(model, budget=BUDGET),
        "expected+calibrated": lambda: caches.Calibrated(model, BUDGET, held),
        "kvzip": lambda: caches.KVzip(model, budget=BUDGET),
    }


def plain(model: Any, ids: torch.Tensor) -> float:
    start = time.process_time()
    held = DynamicCache(config=model.config)
    model(ids, past_key_values=held, use_cache=True, logits_to_keep=1)
    return time.process_time() - start


def cached(make: Callable[[], Any], ids: torch.Tensor) -> tuple[float, int]:
    """Seconds of a prefill and the bytes held after it."""
    with make() as cache:
        start = time.process_time()
        cache.prefill(ids)
        return time.process_time() - start, cache.memory()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.prefill", description=__doc__)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    model: Any = regard.load("smollm2")
    text = default_text(model.tokenizer, given.length)
    ids = model.tokenizer(text, return_tensors="pt").input_ids[:, : given.length]
    start = time.process_time()
    makers = ways(model)
    calibrating = time.process_time() - start
    plain(model, ids)
    ratios: dict[str, list[float]] = {name: [] for name in makers}
    held: dict[str, int] = {}
    for _ in range(given.rounds):
        for name, make in makers.items():
            base = plain(model, ids)
            seconds, held[name] = cached(make, ids)
            ratios[name].append(seconds / base)
            print(f"{name:24} {ratios[name][-1]:.3f}", flush=True)
    found = {
        "length": given.length,
        "budget": BUDGET,
        "rounds": given.rounds,
        "calibration_cpu_seconds": round(calibrating, 1),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "rows": [
            {
                "method": name,
                "ratio": round(statistics.median(found), 4),
                "low": round(min(found), 4),
                "high": round(max(found), 4),
                "bytes": held[name],
            }
            for name, found in ratios.items()
        ],
    }
    scratch = OUT.with_suffix(".tmp")
    scratch.write_text(json.dumps(found, indent=1) + "\n")
    scratch.replace(OUT)


if __name__ == "__main__":
    main()
