"""PyramidKV as a cache: SnapKV's score, with more slots for lower layers. Cai et al. 2024, arXiv 2406.02069."""

from __future__ import annotations

from typing import Any

from torch import nn

from regard.cache import scorers
from regard.cache.budgets import Pyramid
from regard.cache.cache import Cache


class PyramidKV(Cache):
    """SnapKV's score with slots that fall linearly from the first layer to the last.

    Args:
        model, options: as for `regard.cache.Cache`.
        budget: a fraction, tokens per KV head in the mean over layers, or bytes.
        window, kernel: see `regard.cache.scorers.SnapKV`.
        beta: see `regard.cache.budgets.Pyramid`.
    """

    def __init__(
        self,
        model: nn.Module,
        budget: float | int | str,
        *,
        window: int = 32,
        kernel: int = 5,
        beta: float = 20.0,
        **options: Any,
    ) -> None:
        scorer = scorers.SnapKV(window=window, kernel=kernel)
        super().__init__(model, scorer, Pyramid(budget, beta=beta), **options)
