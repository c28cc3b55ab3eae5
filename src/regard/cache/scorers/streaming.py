"""StreamingLLM: the first tokens and the newest ones.

    score(key) = its position

With the sinks that every cache keeps, a budget of C leaves the first few and the last C - sinks tokens. Keys keep the positions
they had in the text; `regard.cache.StreamingExact` counts positions in the cache, as the paper does.

Source: Xiao et al. 2023, "Efficient Streaming Language Models with Attention Sinks", arXiv 2309.17453.
Cost: none; attention is not looked at.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from regard.cache.layer import Layer
from regard.cache.scorer import Scorer


@dataclass(frozen=True)
class Streaming(Scorer):
    """The newest tokens score highest."""

    def score(self, layer: Layer) -> Float[Tensor, "batch kv_heads held"]:
        return layer.positions.float()


@dataclass(frozen=True)
class StreamingExact(Streaming):
    """The same, for `regard.cache.StreamingExact`, which notes in a slot how far each key has been moved."""

    slots: ClassVar[Mapping[str, float]] = {"moved": 0.0}
