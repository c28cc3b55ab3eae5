"""Scorers that only a bench needs: chance, perfect knowledge, and scores that were computed elsewhere.

`Given` scores by position, so one table of numbers made after a prefill (KVzip's reconstruction, random numbers, the planted
facts themselves) is evicted by the same rules and stores as any method.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from regard.bench.exam import Exam
from regard.cache import Layer, Scorer


@dataclass(frozen=True, eq=False)
class Given(Scorer):
    """`table` `[layers, kv_heads, tokens]` says what each key is worth; `window` newest tokens are kept in any case."""

    table: Float[Tensor, "layers kv_heads tokens"] | None = None

    def score(self, layer: Layer) -> Float[Tensor, "batch kv_heads held"]:
        assert self.table is not None
        own = self.table[layer.index].to(layer.positions.device)
        positions = layer.positions.long().clamp(0, own.shape[1] - 1)
        return own.expand(len(positions), -1, -1).gather(-1, positions)


def chance(layers: int, kv_heads: int, tokens: int, seed: int = 0) -> Given:
    """A random order of keys, another one for each head."""
    generator = torch.Generator().manual_seed(seed)
    return Given(table=torch.rand(layers, kv_heads, tokens, generator=generator))


def oracle(exam: Exam, layers: int, kv_heads: int, window: int = 32) -> Given:
    """The planted facts, then the newest tokens: what a method could keep if it knew the questions."""
    worth = torch.linspace(0, 0.5, exam.length)
    for start, end in exam.planted:
        worth[start:end] = 1.0
    return Given(window=window, table=worth.expand(layers, kv_heads, -1).clone())
