"""One prefill, read by many caches.

The model reads a document once, with the full cache. `Prefill` keeps what each layer's attention was called with; a
compressed cache is then filled from it, layer by layer, exactly as a model would have filled it: new keys in, the scorer
watches the call, and nothing else of the model is run. A scorer watches once and serves every budget: the filled cache
is branched, given another rule, and told to compress.

A prefill holds the queries of all layers, `layers x heads x tokens x dim` numbers, beside the full cache.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from regard.attach import Session
from regard.cache import Budget, Cache, Full, Layer, Scorer, scorers
from regard.cache.reconstruction import reconstruct
from regard.engine import AttentionCall, CausalMask, Method


class _Calls(Method):
    """Keeps the attention calls of one forward pass by layer."""

    reads_only = True

    def __init__(self) -> None:
        self.calls: dict[int, AttentionCall] = {}

    def after(self, call: AttentionCall) -> None:
        layer = getattr(call.module, "layer_idx", call.site.layer)
        if call.site.kind == "self" and call.site.stack == "":
            self.calls.setdefault(layer, replace(call, output=None))


class Prefill:
    """One text, read once by a model with the full cache.

    Args:
        model: a causal language model.
        tokens: `[tokens]`.

    Attributes:
        full: the full cache after it.
        logits: of the last token, `[vocabulary]`.
        seconds: what the forward pass took, keeping the queries included.
        replays: whether caches are filled from the kept calls; False for models that keep more than keys and values
            (recurrent states, shared or sliding layers), where each scorer needs a forward pass of its own.
    """

    def __init__(self, model: nn.Module, tokens: Tensor) -> None:
        self.model, self.tokens = model, tokens
        self.full = Full(model)
        held = self.full.layers
        self.replays = all(type(one) is Layer and one.sliding_window is None for one in held)
        self.replays = self.replays and not self.full.shares
        calls = _Calls()
        start = time.perf_counter()
        with torch.inference_mode():
            if self.replays:
                with Session(model, calls):
                    self.logits = self._run(self.full)
            else:
                self.logits = self._run(self.full)
        self.seconds = time.perf_counter() - start
        self.replays = self.replays and sorted(calls.calls) == list(range(len(held)))
        self.calls: Mapping[int, AttentionCall] = calls.calls if self.replays else {}

    def _run(self, cache: Cache) -> Tensor:
        device = next(self.model.parameters()).device
        return cache.prefill(self.tokens[None].to(device)).logits[0, -1].float()

    @torch.inference_mode()
    def watched(self, scorer: Scorer) -> Watched:
        """A cache that has seen the text and evicted nothing yet, and the time that watching took."""
        cache = Cache(self.model, scorer, 1.0)
        start = time.perf_counter()
        with cache.paused():
            if self.replays:
                fill(cache, self.full, self.calls, self.tokens)
            else:
                self._run(cache)
        seconds = time.perf_counter() - start
        return Watched(cache, seconds if self.replays else max(0.0, seconds - self.seconds))

    @torch.inference_mode()
    def repeated(self, tokenizer: Any) -> Watched:
        """The same for KVzip, which makes the model repeat the text rather than watch it being read."""
        start = time.perf_counter()
        device = next(self.model.parameters()).device
        ids = self.tokens[None].to(device)
        peaks = reconstruct(self.model, ids, tokenizer=tokenizer, cache=self.full)
        repeating = time.perf_counter() - start
        watched = self.watched(scorers.KVzip())
        for layer, own in zip(watched.cache.held, peaks, strict=True):
            layer.slots["peak"] = own[None].expand_as(layer.slots["peak"])
        return Watched(watched.cache, repeating + watched.seconds)

    def close(self) -> None:
        """Lets go of the model and of what was kept."""
        self.full.close()
        self.calls = {}


class Watched:
    """A cache that its scorer has watched being filled; `evicted` gives compressed branches of it."""

    def __init__(self, cache: Cache, seconds: float) -> None:
        self.cache, self.seconds = cache, seconds

    @torch.inference_mode()
    def evicted(self, budget: Budget) -> tuple[Cache, float]:
        """A branch within `budget`, and the seconds that watching and evicting took together."""
        twin = self.cache.branch()
        twin.budget = budget
        start = time.perf_counter()
        twin.compress()
        return twin, self.seconds + time.perf_counter() - start

    def close(self) -> None:
        self.cache.close()


def fill(cache: Cache, full: Cache, calls: Mapping[int, AttentionCall], tokens: Tensor) -> None:
    """Fills an empty cache with the keys and values of `full`, its scorer watching the kept calls."""
    cache.entering({"input_ids": tokens[None]})
    try:
        for index, call in sorted(calls.items()):
            source: Any = full.layers[index]
            key, value = cache.update(source.keys, source.values, index)
            mask = CausalMask(call.keys, 0)
            here = replace(call, key=key, value=value, mask=mask, query_offset=0)
            tag: Any = key.held  # type: ignore[attr-defined]
            tag.done(tag.place(here, None), None)
    except BaseException:
        cache.leaving(failed=True)
        raise
    cache.leaving(failed=False)
