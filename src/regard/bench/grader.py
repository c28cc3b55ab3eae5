"""Grading one document: the cells of every setting, from one prefill."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from transformers import DynamicCache

from regard.bench import machine, speed
from regard.bench.exam import Exam
from regard.bench.replay import Prefill, Watched
from regard.bench.results import FULL, LIBRARY
from regard.bench.scoring import agreement, answers, branch, continuation, held_bytes
from regard.bench.store import Store
from regard.cache import Cache, Full
from regard.cache.calibration import Calibration
from regard.plan import Named
from regard.plan.methods import Size

Numbers = list[tuple[str, float, float | None]]  # measure, value, depth


class Grader:
    """Grades caches on one document and writes their cells to the store."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        store: Store,
        exam: Exam,
        prefill: Prefill,
        advance: Callable[..., None],
    ) -> None:
        self.model, self.tokenizer, self.store = model, tokenizer, store
        self.exam, self.prefill, self.advance = exam, prefill, advance
        self.reference = continuation(model, prefill.full, exam)
        self.states = sum(
            layer.keys.nbytes + layer.values.nbytes  # type: ignore[union-attr]
            for layer in prefill.full.held
        )

    def baselines(self, timed: bool) -> None:
        """The full cache, and with `timed` transformers' own."""
        self.quality(FULL, "1", self.prefill.full)
        if timed:
            config: Any = self.model.config
            self.time(LIBRARY, "1", self._library_cache, lambda: DynamicCache(config=config))
            self.time(FULL, "1", lambda: branch(self.prefill.full), lambda: Full(self.model))

    def scorer(
        self,
        methods: list[Named],
        sizes: Sequence[Size],
        calibrated: Callable[[], Calibration],
        timed: bool,
    ) -> None:
        """All methods that share a scorer, at all sizes: it watches once. A real prefill is timed at the first size."""
        wanted = [(method, size) for method in methods for size in sizes]
        names = [self.name(str(method), str(size)) for method, size in wanted]
        if all(name + end in self.store for name in names for end in ("", "/time")[: 1 + timed]):
            return
        watched = self._watched(methods[0])
        try:
            for method, size in wanted:
                calibration = calibrated() if method.calibrated else None
                cache, seconds = watched.evicted(method.make_budget(size, calibration))
                self.quality(str(method), str(size), cache, seconds)
                if timed:
                    make = None
                    if size == sizes[0]:
                        make = _maker(method, self.model, size, calibration)
                    self.time(str(method), str(size), _brancher(cache), make)
                cache.close()
        finally:
            watched.close()

    def _watched(self, method: Named) -> Watched:
        if method.scorer == "kvzip":
            return self.prefill.repeated(self.tokenizer)
        return self.prefill.watched(method.make_scorer())

    # cells

    def name(self, method: str, budget: str) -> str:
        return f"{self.exam.length}/{self.exam.name}/{method}/{budget}"

    def _put(self, name: str, method: str, budget: str, numbers: Numbers, **more: Any) -> None:
        exam = self.exam
        place = [exam.name, exam.kind, exam.length, method, budget]
        self.store.put(name, {"rows": [[*place, m, v, d] for m, v, d in numbers], **more})
        self.advance()

    def quality(self, method: str, budget: str, cache: Cache, seconds: float | None = None) -> None:
        """Quality and memory of one setting."""
        name = self.name(method, budget)
        if name in self.store:
            return
        model, exam = self.model, self.exam
        logits = self.reference if method == FULL else continuation(model, cache, exam)
        near = agreement(logits, self.reference, exam)
        numbers: Numbers = [(measure, value, None) for measure, value in near.items()]
        numbers += [
            (measure, value, depth) for measure, depth, value in answers(model, cache, exam)
        ]
        numbers += self._memory(cache.memory())
        if seconds is not None:
            numbers.append(("evict", seconds, None))
        self._put(name, method, budget, numbers)

    def _memory(self, held: int) -> Numbers:
        return [("bytes", held / 1e6, None), ("kept", held / self.states, None)]

    def time(
        self, method: str, budget: str, filled: Callable[[], Any], empty: Callable[[], Any] | None
    ) -> None:
        """Decoding from a filled cache, and a real prefill of an empty one where that is asked for."""
        name = self.name(method, budget) + "/time"
        if name in self.store:
            return
        device = next(self.model.parameters()).device
        bandwidth = self.store.get("bandwidth", lambda: machine.read_bandwidth(device))
        cache = filled()
        weights = machine.decode_bytes(self.model)
        numbers: Numbers = [("floor", speed.floor(weights, cache, bandwidth), None)]
        if method == LIBRARY:
            numbers += self._memory(held_bytes(cache))
        written = speed.write(self.model, cache, int(self.prefill.logits.argmax()))
        numbers.append(("decode", written.milliseconds, None))
        _close(cache)
        if empty is not None:
            fresh = empty()
            took = speed.prefill(self.model, fresh, self.exam.context)
            _close(fresh)
            numbers.append(("prefill", took.seconds, None))
            if took.peak is not None:
                numbers.append(("peak", took.peak / 1e6, None))
        text = self.tokenizer.decode(written.tokens)
        place = {"method": method, "budget": budget, "document": self.exam.name}
        self._put(name, method, budget, numbers, text={**place, "text": text})

    def _library_cache(self) -> DynamicCache:
        """transformers' own cache after the same prefill."""
        config: Any = self.model.config
        cache = DynamicCache(config=config)
        if self.prefill.replays:
            for index, layer in enumerate(self.prefill.full.held):
                cache.update(layer.keys.clone(), layer.values.clone(), index)  # type: ignore[union-attr]
        else:
            speed.prefill(self.model, cache, self.prefill.tokens)
        return cache


def _brancher(cache: Cache) -> Callable[[], Any]:
    return lambda: branch(cache)


def _maker(
    method: Named, model: nn.Module, size: Size, calibration: Calibration | None
) -> Callable[[], Any]:
    return lambda: method.make_cache(model, size, calibration)


def _close(cache: Any) -> None:
    if isinstance(cache, Cache):
        cache.close()
