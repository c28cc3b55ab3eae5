"""Expected Attention as a cache: what future queries will look at. Devoto et al. 2025, arXiv 2510.00636."""

from __future__ import annotations

from typing import Any

from torch import nn

from regard.cache import scorers
from regard.cache.budget import Budget
from regard.cache.cache import Cache


class ExpectedAttention(Cache):
    """Every head keeps the keys that queries like those so far will attend to.

    Args:
        model, budget, options: as for `regard.cache.Cache`.
        horizon, covariance, epsilon: see `regard.cache.scorers.ExpectedAttention`.
    """

    def __init__(
        self,
        model: nn.Module,
        budget: Budget | float | int | str,
        *,
        horizon: int = 512,
        covariance: bool = True,
        epsilon: float = 0.0,
        **options: Any,
    ) -> None:
        scorer = scorers.ExpectedAttention(horizon=horizon, covariance=covariance, epsilon=epsilon)
        super().__init__(model, scorer, budget, **options)
