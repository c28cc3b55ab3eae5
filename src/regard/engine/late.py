"""Decode steps read late: the fused kernel answers at once, and the rows of many steps are read together afterwards.

A single query is too little work for the hooks of a block: reading it costs more than computing it. While a cache only
appends, the keys of a later step contain those of every step before, so the queries of up to `ROWS` steps are put aside and
read as one causal block. Methods say with `reads_late` that they do not mind.

Cost: one block of `ROWS` rows for each `ROWS` steps; memory one query and one key for each step put aside.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass, field

import torch
from torch import Tensor

from regard.engine import blockwise
from regard.engine.call import AttentionCall
from regard.engine.masks import CausalMask, FullMask
from regard.engine.method import Method, Pipeline, overrides

ROWS = 128


@dataclass(slots=True)
class Steps:
    """The steps of one site that wait: their queries, and the newest call, whose keys hold all of theirs."""

    last: AttentionCall
    queries: list[Tensor] = field(default_factory=list)

    def continues(self, call: AttentionCall) -> bool:
        """Whether `call` is the next step: one key more, of the same batch."""
        before = self.last
        return (
            call.keys == before.keys + 1
            and call.query.shape == before.query.shape
            and call.query.dtype == before.query.dtype
        )


class LateReader:
    """Puts decode steps aside for the methods of a pipeline and shows them many at a time."""

    def __init__(self, pipeline: Pipeline) -> None:
        reading = pipeline["weights"]
        self.possible = (
            bool(reading)
            and pipeline.reads_only
            and not pipeline["before"]
            and all(method.reads_late for method in reading)
        )
        self.reading: tuple[Method, ...] = reading
        self.rest = Pipeline(pipeline.methods)
        self.rest.using = {**pipeline.using, "weights": ()}
        self._waiting: dict[tuple[str, int], Steps] = {}

    def takes(self, call: AttentionCall) -> bool:
        """Whether this call can be read later: one query of plain causal attention, without padding or gradients."""
        return (
            self.possible
            and call.phase == "decode"
            and call.site.kind == "self"
            and call.query_offset == call.keys - 1
            and isinstance(call.mask, FullMask | CausalMask)
            and call.bias is None
            and call.valid is None
            and call.key_valid is None
            and not torch.is_grad_enabled()
        )

    def add(self, call: AttentionCall) -> None:
        """Puts a step aside; reads those that wait at its site when there are many or it does not continue them."""
        key = call.site.key
        steps = self._waiting.get(key)
        if steps is not None and not steps.continues(call):
            self._read(key)
            steps = None
        if steps is None:
            steps = self._waiting[key] = Steps(call)
        steps.last = call
        steps.queries.append(call.query)
        if len(steps.queries) >= ROWS:
            self._read(key)

    def keep(self, places: Collection[int]) -> None:
        """Reads the sites whose keys are no longer where they were: `places` are the `data_ptr` of the cache's keys.

        A cache whose rows changed places (beams) or that was replaced no longer holds the keys of the steps that wait;
        the tensor that waits with them does, and while it lives its place is nobody else's.
        """
        for site, steps in list(self._waiting.items()):
            if steps.last.key.data_ptr() not in places:
                self._read(site)

    def flush(self, key: tuple[str, int] | None = None) -> None:
        """Reads what waits, at one site or at all."""
        for waiting in [key] if key is not None else list(self._waiting):
            if waiting in self._waiting:
                self._read(waiting)

    @torch.no_grad()
    def _read(self, key: tuple[str, int]) -> None:
        steps = self._waiting.pop(key)
        last, rows = steps.last, len(steps.queries)
        offset = last.keys - rows
        call = dataclasses.replace(
            last,
            query=torch.cat(steps.queries, 2),
            mask=CausalMask(last.keys, offset),
            query_offset=offset,
            output=None,
        )
        blockwise.attend(call, (), self.reading, rows=torch.arange(rows, device=call.query.device))
        for method in self.reading:
            if overrides(method, "after"):
                method.after(call)
