"""TOVA as a cache: what the newest query looks at. Oren et al. 2024, arXiv 2401.06104."""

from __future__ import annotations

from typing import Any

from torch import nn

from regard.cache import scorers
from regard.cache.budget import Budget
from regard.cache.cache import Cache


class TOVA(Cache):
    """All heads of a layer keep the same tokens, those that the newest query attends to most.

    Args:
        model, budget, options: as for `regard.cache.Cache`.
    """

    def __init__(
        self, model: nn.Module, budget: Budget | float | int | str, **options: Any
    ) -> None:
        super().__init__(model, scorers.TOVA(), budget, **options)
