"""Retrieval heads keep the text, the others its beginning and its end.

    score_j = R(head) + small * position_j,    R = the largest retrieval score among the query heads of the KV head

With the `Global` budget, KV heads are filled up in the order of their retrieval scores as far as the budget goes, and the heads
for which nothing is left keep their sinks and newest tokens.

Sources: the scores are Wu et al.'s (arXiv 2404.15574, `regard.instruments.retrieval_heads`); that only retrieval heads need the
whole text is Xiao et al. 2024, "DuoAttention", arXiv 2410.10819, which learns its own head scores by optimisation instead.
Cost: none at run time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from regard._errors import InputError
from regard.cache.layer import Layer
from regard.cache.scorer import Scorer


@dataclass(frozen=True)
class RetrievalHeads(Scorer):
    """A score per head, newest tokens first among equals.

    Args:
        scores: `[layers][query heads]`, not negative.
        window: newest tokens every head keeps.

    Raises:
        InputError: scores of another shape than the model's heads.
    """

    scores: tuple[tuple[float, ...], ...] = ()
    window: int = 32

    def score(self, layer: Layer) -> Float[Tensor, "batch kv_heads held"]:
        heads = layer.rows.heads
        if layer.index >= len(self.scores) or len(self.scores[layer.index]) % heads:
            raise InputError(
                f"retrieval scores must be [layers][query heads] of this model (layer {layer.index} has {heads} KV heads), got "
                f"{len(self.scores)} layers; make them with regard.instruments.retrieval_heads(model)"
            )
        own = torch.tensor(self.scores[layer.index]).view(heads, -1).amax(1)
        late = layer.positions.float() / max(1, layer.seen)
        return own.to(late.device)[None, :, None] + 1e-3 * late
