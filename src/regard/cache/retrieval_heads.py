"""Retrieval heads keep the whole text, the others its ends. Wu et al. 2024, arXiv 2404.15574; DuoAttention, arXiv 2410.10819."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from regard.cache import scorers
from regard.cache.budgets import Global
from regard.cache.cache import Cache


class RetrievalHeads(Cache):
    """KV heads are filled in the order of their retrieval scores; those beyond the budget keep sinks and a window.

    Args:
        model, options: as for `regard.cache.Cache`.
        budget: a fraction, tokens per KV head in the mean over layers and heads, or bytes.
        scores: `[layers, query heads]`, for example `regard.instruments.retrieval_heads(model)`'s.
        window: newest tokens every head keeps.
    """

    def __init__(
        self,
        model: nn.Module,
        budget: float | int | str,
        scores: Tensor | Sequence[Sequence[float]],
        *,
        window: int = 32,
        **options: Any,
    ) -> None:
        table = scores.tolist() if isinstance(scores, Tensor) else scores
        scorer = scorers.RetrievalHeads(scores=tuple(map(tuple, table)), window=window)
        super().__init__(model, scorer, Global(budget), **options)
