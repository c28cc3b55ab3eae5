"""H2O as a cache: heavy hitters and recent tokens, half of each. Zhang et al. 2023, arXiv 2306.14048."""

from __future__ import annotations

from typing import Any

from torch import nn

from regard.cache import scorers
from regard.cache.budget import Budget
from regard.cache.cache import Cache


class H2O(Cache):
    """Every head keeps the keys that received most attention and its newest ones.

    Args:
        model, budget, options: as for `regard.cache.Cache`.
        normalise, recent, sample: see `regard.cache.scorers.H2O`.
    """

    def __init__(
        self,
        model: nn.Module,
        budget: Budget | float | int | str,
        *,
        normalise: bool = False,
        recent: float = 0.5,
        sample: int = 1,
        **options: Any,
    ) -> None:
        super().__init__(
            model, scorers.H2O(normalise=normalise, recent=recent, sample=sample), budget, **options
        )
