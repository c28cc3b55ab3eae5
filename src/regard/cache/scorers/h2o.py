"""H2O, heavy hitters: the keys that received most attention from all queries so far, and the most recent ones.

    score_j = sum over queries i >= j of A[i, j],   summed over the heads of a group,

over the prompt and every decoded token. Half of a head's slots are reserved for its newest tokens. Early keys have had
more queries; `normalise` divides by the number of queries that could see the key.

Source: Zhang et al. 2023, "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models", arXiv
2306.14048.
Cost: one more pass of query-key products and softmax over the prompt, a quarter of its prefill at 2048 tokens of SmolLM2. With
`sample=2` about 15 %, and ranks that correlate with the exact ones to 0.97; fewer rows lose much, since heads that look at their
neighbours spread a key's mass over few rows (`sample=8`: 6 %, 0.80; benchmarks/statistics.py). When the cache evicts while
decoding, one more row a step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from regard._errors import InputError
from regard.cache.layer import Layer
from regard.cache.scorer import Scorer
from regard.cache.scorers._slots import key_positions, query_positions, reach
from regard.engine import AttentionCall
from regard.ops.attention_statistics import received_attention, sampled_rows


@dataclass(frozen=True)
class H2O(Scorer):
    """Attention received from all queries.

    Args:
        normalise: divide by the number of queries that could see the key; the paper sums.
        recent: share of each head's slots that is reserved for its newest tokens.
        sample: read one query row in `sample` (and the last 64 of each call); 1 reads all.

    Raises:
        InputError: `recent` outside [0, 1) or `sample` below 1.
    """

    slots: ClassVar[Mapping[str, float]] = {"mass": 0.0, "queries": 0.0}
    normalise: bool = False
    recent: float = 0.5
    sample: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.recent < 1:
            raise InputError.of("recent", given=self.recent, expected="a share in [0, 1)")
        if self.sample < 1:
            raise InputError.of("sample", given=self.sample, expected="a whole number >= 1")

    def watch(self, call: AttentionCall, layer: Layer) -> None:
        positions, keys = query_positions(call, layer), layer.keys
        assert keys is not None
        query, rows, each = call.query, positions, None
        if self.sample > 1:
            index, each = sampled_rows(call.queries, self.sample)
            query, rows = query[:, :, index], rows[:, index]
        held = key_positions(layer)
        received = received_attention(
            query, keys, rows, held, row_weights=each, **reach(call, layer)
        )
        layer.slots["mass"] = layer.slots["mass"] + received
        layer.slots["queries"] = layer.slots["queries"] + _seeing(positions, held)

    def score(self, layer: Layer) -> Float[Tensor, "batch kv_heads held"]:
        mass = layer.slots["mass"]
        return mass / layer.slots["queries"].clamp_min(1) if self.normalise else mass


def _seeing(queries: Tensor, keys: Tensor) -> Tensor:
    """How many of the call's queries see each key `[batch, kv_heads, held]`, by causality."""
    valid = queries >= 0
    total = valid.sum(-1)[:, None, None]
    # queries stand in ascending columns, so those before a key are a cumulative count
    ordered = torch.where(valid, queries, torch.iinfo(queries.dtype).max).sort(-1).values
    shape = keys.shape
    before = torch.searchsorted(ordered, keys.reshape(shape[0], -1).contiguous()).view(shape)
    return torch.where(keys >= 0, total - before, 0).float()
