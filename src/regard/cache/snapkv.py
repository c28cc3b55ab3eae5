"""SnapKV as a cache: what the prompt's last queries look at. Li et al. 2024, arXiv 2404.14469."""

from __future__ import annotations

from typing import Any

from torch import nn

from regard.cache import scorers
from regard.cache.budget import Budget
from regard.cache.cache import Cache


class SnapKV(Cache):
    """Every head keeps its window of newest tokens and what these look at.

    Args:
        model, budget, options: as for `regard.cache.Cache`.
        window, kernel: see `regard.cache.scorers.SnapKV`.
    """

    def __init__(
        self,
        model: nn.Module,
        budget: Budget | float | int | str,
        *,
        window: int = 32,
        kernel: int = 5,
        **options: Any,
    ) -> None:
        super().__init__(model, scorers.SnapKV(window=window, kernel=kernel), budget, **options)
