"""`python -m benchmarks.cache`: decoding speed and memory of the caches, beside transformers' own in the same run.

Writes benchmarks/results/cache.json. Decoding times are CPU milliseconds of one token on one thread, medians over steps that take
turns between the caches; caches are filled with random keys, since reading 131,072 tokens would take hours. Peak memory is
that of really reading 8,192 tokens of prose. `--parts` measures some parts and keeps the file's others.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import regard
from benchmarks.worker import extra_memory
from regard.cache import Cache, Cake, Full, budgets, scorers

RESULTS = Path(__file__).parent / "results" / "cache.json"
PARTS = ("long", "model", "bytes", "prefill")
BANDWIDTH_MB = 512


def synthetic() -> LlamaForCausalLM:
    """Four layers of four heads: a model whose decoding is nearly all attention at 128k tokens."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=200_000,
    )
    return LlamaForCausalLM(config).eval()


def fill(cache: Any, model: Any, tokens: int) -> None:
    """Random keys and values of so many tokens; some heads' keys are longer, so that a global budget is uneven."""
    config = model.config
    heads, dim = config.num_key_value_heads, config.head_dim
    longer = torch.linspace(0.97, 1.03, heads).view(1, heads, 1, 1)
    for index in range(config.num_hidden_layers):
        generator = torch.Generator().manual_seed(index)
        key = torch.randn(1, heads, tokens, dim, generator=generator) * longer
        value = torch.randn(1, heads, tokens, dim, generator=generator)
        if isinstance(cache, Cache):
            layer = cache.layers[index]
            layer.update(key, value)
            cache.attended(layer, None, None, tokens)
        else:
            cache.update(key, value, index)


def bandwidth() -> float:
    """GB/s at which one thread reads memory."""
    numbers = torch.ones(BANDWIDTH_MB * 250_000)
    times = []
    for _ in range(5):
        start = time.process_time()
        numbers.sum()
        times.append(time.process_time() - start)
    return numbers.nbytes / min(times) / 1e9


def decoding(
    model: Any, makers: dict[str, Callable[[], Any]], tokens: int, steps: int
) -> dict[str, Any]:
    """Median CPU milliseconds a token for each cache, bytes, and the time that reading them once must take."""
    caches = {}
    for name, make in makers.items():
        caches[name] = make()
        fill(caches[name], model, tokens)
    caches["bare"] = DynamicCache(config=model.config)  # what the model takes without a cache
    fill(caches["bare"], model, 1)
    token = torch.tensor([[5]])
    times: dict[str, list[float]] = {name: [] for name in caches}
    for step in range(steps + 1):
        for name, cache in caches.items():
            start = time.process_time()
            model(token, past_key_values=cache, use_cache=True)
            if step:  # the first one makes room to grow
                times[name].append((time.process_time() - start) * 1e3)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    speed = bandwidth()
    load = os.getloadavg()[0]
    found: dict[str, Any] = {"tokens": tokens, "bandwidth_gb_s": speed, "load_average": load}
    for name, cache in caches.items():
        if isinstance(cache, Cache):
            size = cache.memory()
        else:
            size = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        found[name] = {
            "ms": statistics.median(times[name]),
            "ms_least": min(times[name]),
            "bytes": size,
            "floor_ms": (size + weights) / speed / 1e6,
        }
    return found


def long() -> dict[str, Any]:
    model = synthetic()
    keep = 1024
    return decoding(
        model,
        {
            "dynamic": lambda: DynamicCache(config=model.config),
            "full": lambda: Full(model),
            "even": lambda: Cache(model, scorers.KeyNorm(), keep, sinks=0),
            "per_head": lambda: Cache(model, scorers.KeyNorm(), budgets.Global(keep), sinks=0),
        },
        131_072,
        steps=12,
    )


def real() -> dict[str, Any]:
    model = regard.load("smollm2")
    keep = 512
    return decoding(
        model,
        {
            "dynamic": lambda: DynamicCache(config=model.config),
            "full": lambda: Full(model),
            "even": lambda: Cache(model, scorers.KeyNorm(), keep, sinks=0),
            "per_head": lambda: Cache(model, scorers.KeyNorm(), budgets.Global(keep), sinks=0),
        },
        8192,
        steps=12,
    )


def prose(model: Any, tokens: int) -> torch.Tensor:
    ids = model.tokenizer(regard.texts.prose(60_000), return_tensors="pt", verbose=False)
    row = ids["input_ids"][0]
    return row.repeat(-(-tokens // len(row)))[None, :tokens]


def sizes() -> dict[str, Any]:
    """Bytes of a 20 % per-head budget on real text, and of the full cache."""
    model = regard.load("smollm2")
    text = prose(model, 2048)
    full, cut = Full(model), Cache(model, scorers.KeyNorm(), budgets.Global(0.2))
    for cache in (full, cut):
        cache.prefill(text)
    exact = sum(2 * 4 * 64 * int(layer.lengths.sum()) for layer in full.held)
    found = {
        "tokens": 2048,
        "full_bytes": full.memory(),
        "full_bytes_without_free_slots": exact,
        "per_head_bytes": cut.memory(),
        "lengths": [layer.lengths[0].tolist() for layer in cut.held],
    }
    for _ in range(32):
        model(text[:, :1], past_key_values=cut)
        model(text[:, :1], past_key_values=full)
    return found | {"after_32_tokens": {"full": full.memory(), "per_head": cut.memory()}}


def peak(kind: str) -> float:
    """MB above the loaded model while 8,192 tokens are read."""
    model = regard.load("smollm2")
    text = prose(model, 8192)
    cache: Any
    if kind == "plain":
        cache = DynamicCache(config=model.config)
        model(text[:, :64])
        return extra_memory(lambda: model(text, past_key_values=cache, logits_to_keep=1))
    cache = Cake(model, 1024, chunk=1024)
    model(text[:, :64])
    return extra_memory(lambda: cache.prefill(text))


def reading() -> dict[str, Any]:
    found: dict[str, Any] = {"tokens": 8192, "budget": 1024, "chunk": 1024}
    for kind in (
        "cascade",
        "plain",
    ):  # each in a process of its own: memory is never quite given back
        command = [sys.executable, "-m", "benchmarks.cache", "--peak", kind]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found[f"{kind}_mb"] = float(done.stdout.split()[-1])
    return found


def ratios(results: dict[str, Any]) -> dict[str, float]:
    """What the results say, in the terms of the goals."""
    found: dict[str, float] = {}
    for part in ("long", "model"):
        if part in results:
            ms = {name: row["ms"] for name, row in results[part].items() if isinstance(row, dict)}
            found[f"{part}: full against dynamic"] = ms["dynamic"] / ms["full"]
            for kept in ("even", "per_head"):
                found[f"{part}: {kept} against full"] = ms["full"] / ms[kept]
                found[f"{part}: {kept} against dynamic"] = ms["dynamic"] / ms[kept]
            for held in ("full", "dynamic"):
                found[f"{part}: nothing held against {held}"] = ms[held] / ms["bare"]
    if "bytes" in results:
        row = results["bytes"]
        found["bytes of 20 % per head"] = (
            row["per_head_bytes"] / row["full_bytes_without_free_slots"]
        )
    return found


def timed(results: dict[str, Any], parts: list[str]) -> dict[str, Any]:
    """The ratios of times of one run, and how fast memory was in it: other tenants of a machine take their share."""
    return {
        part: {
            "bandwidth_gb_s": round(results[part]["bandwidth_gb_s"], 1),
            **{k: round(v, 2) for k, v in results["ratios"].items() if k.startswith(f"{part}: ")},
        }
        for part in ("long", "model")
        if part in parts
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cache", description=__doc__)
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--peak", choices=("plain", "cascade"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    if given.peak:
        print(peak(given.peak))
        return
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    measure = {"long": long, "model": real, "bytes": sizes, "prefill": reading}
    for part in given.parts:
        results[part] = measure[part]()
        results["ratios"] = ratios(results)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    if {"long", "model"} & set(given.parts):
        results["runs"] = [*results.get("runs", []), timed(results, given.parts)]
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    for name, ratio in results["ratios"].items():
        print(f"{name:32} {ratio:8.2f}")


if __name__ == "__main__":
    main()
