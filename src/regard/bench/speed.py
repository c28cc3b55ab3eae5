"""What a cache costs on this machine: a real prefill, its peak memory, and real decoding steps beside their floor."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from regard.attach.cache_names import cache_argument, takes
from regard.bench.machine import Measured, measured
from regard.bench.scoring import held_bytes, read
from regard.cache import Cache

STEPS = 24


@dataclass(frozen=True)
class Written:
    """Tokens that a model went on with, and the median time of a step in milliseconds."""

    tokens: list[int]
    milliseconds: float


@torch.inference_mode()
def prefill(model: nn.Module, cache: Any, tokens: Tensor) -> Measured:
    """Reads `tokens` `[tokens]` into an empty cache, eviction included."""
    device = next(model.parameters()).device
    with measured(device) as result:
        if isinstance(cache, Cache):
            cache.prefill(tokens[None].to(device))
        else:
            extra = {"logits_to_keep": 1} if takes(model, "logits_to_keep") else {}
            model(tokens[None].to(device), **{cache_argument(model): cache}, **extra)
    return result


@torch.inference_mode()
def write(model: nn.Module, cache: Any, first: int, steps: int = STEPS) -> Written:
    """Greedy decoding on top of a cache (which grows), from the token `first` on; the first step is not timed."""
    tokens, times = [first], []
    for _ in range(steps):
        start = time.perf_counter()
        logits = read(model, cache, torch.tensor([tokens[-1:]]))
        tokens.append(int(logits[0, -1].argmax()))  # waits for an accelerator, too
        times.append(time.perf_counter() - start)
    return Written(tokens, 1000 * statistics.median(times[1:]))


def floor(weights: int, cache: Any, bandwidth: float) -> float:
    """The least milliseconds of a decoding step: bytes of weights and cache over the read bandwidth."""
    return 1000 * (weights + held_bytes(cache)) / bandwidth
