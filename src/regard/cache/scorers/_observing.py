"""Scorers that read the attention of the newest queries: the observation window of SnapKV, TOVA and CAKE.

The last `rows` queries of every text are kept on the layer (`memory["queries"]`), across chunks and decoding steps, so that a
prompt fed in chunks that fit the budget is scored as if it had come at once. The scores of the held keys are slots: they ride
with their keys through evictions, so that evicting twice keeps what evicting once would have kept.

Cost: `rows` query rows against the held keys for each call, `batch x heads x rows x dim` numbers a layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from regard.cache.layer import Layer
from regard.cache.scorer import Scorer
from regard.cache.scorers._slots import key_positions, query_positions, reach
from regard.engine import AttentionCall
from regard.ops.attention_statistics import attention_rows


@dataclass(frozen=True)
class Observing(Scorer):
    """Base: override `judge`, a function of the window's attention on the keys before the window."""

    slots: ClassVar[Mapping[str, float]] = {"score": 0.0}

    @property
    def rows(self) -> int:
        """Queries of the observation window."""
        return self.window

    def watch(self, call: AttentionCall, layer: Layer) -> None:
        self._remember(call, layer)
        rows, positions = layer.memory["queries"], layer.memory["query_positions"]
        keys = layer.keys
        assert keys is not None
        weights = attention_rows(rows, keys, positions, key_positions(layer), **reach(call, layer))
        newer = layer.valid.flip(-1).cumsum(-1).flip(-1)  # this slot included
        inside = (newer <= self.window).repeat_interleave(call.group, 1)
        layer.slots["score"] = self.judge(weights.masked_fill_(inside[:, :, None], 0), layer)

    def judge(
        self, weights: Float[Tensor, "batch heads rows keys"], layer: Layer
    ) -> Float[Tensor, "batch kv_heads keys"]:
        """The worth of every key from the attention of the window's rows; that on the window itself is set to 0."""
        raise NotImplementedError(f"{type(self).__name__} has no judge")

    def score(self, layer: Layer) -> Float[Tensor, "batch kv_heads held"]:
        return layer.slots["score"]

    def _remember(self, call: AttentionCall, layer: Layer) -> None:
        """The newest valid queries of every text, older ones from earlier calls included."""
        query, positions = call.query, query_positions(call, layer)
        if call.valid is None:
            query, positions = query[:, :, -self.rows :], positions[:, -self.rows :]
        short = call.valid is not None or query.shape[2] < self.rows
        if "queries" in layer.memory and short:
            query = torch.cat([layer.memory["queries"].to(query), query], 2)
            positions = torch.cat([layer.memory["query_positions"], positions], 1)
        if query.shape[2] > self.rows:
            newest = positions.argsort(dim=-1, stable=True)[:, -self.rows :]
            positions = positions.gather(-1, newest)
            index = newest[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3])
            query = query.gather(2, index)
        layer.memory["queries"] = query.contiguous().clone()
        layer.memory["query_positions"] = positions.contiguous().clone()
