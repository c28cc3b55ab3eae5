"""Key norm as a cache: keys of small norm stay. Devoto et al. 2024, arXiv 2406.11430."""

from __future__ import annotations

from typing import Any

from torch import nn

from regard.cache import scorers
from regard.cache.budget import Budget
from regard.cache.cache import Cache


class KeyNorm(Cache):
    """Every head keeps its shortest keys; attention is not looked at.

    Args:
        model, budget, options: as for `regard.cache.Cache`.
    """

    def __init__(
        self, model: nn.Module, budget: Budget | float | int | str, **options: Any
    ) -> None:
        super().__init__(model, scorers.KeyNorm(), budget, **options)
