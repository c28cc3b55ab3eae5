"""CAKE as a cache: layers share by preference, tokens stay by mean and fluctuation. Qin et al. 2025, arXiv 2503.12491."""

from __future__ import annotations

from typing import Any

from torch import nn

from regard.cache import scorers
from regard.cache.budgets import CakePreference
from regard.cache.cache import Cache


class Cake(Cache):
    """CAKE's indicator with CAKE's layer preferences, in a cascade during the prefill.

    Differs from the released code: preferences are per row of a batch rather than for the batch as a whole; slots are rounded by
    Webster's rule (`regard.ops.allocate_layer_budgets`); the first tokens of a text are always kept, unless `sinks=0`; eviction
    starts at the budget, not a window above it.

    Args:
        model, options: as for `regard.cache.Cache`. With `every=1` it evicts while decoding, as the paper does.
        budget: a fraction, tokens per KV head in the mean over layers, or bytes.
        window, kernel, gamma: see `regard.cache.scorers.CAKE`.
        tau: see `regard.cache.budgets.CakePreference`.
    """

    def __init__(
        self,
        model: nn.Module,
        budget: float | int | str,
        *,
        window: int = 32,
        kernel: int = 5,
        gamma: float = 200.0,
        tau: tuple[float, float] = (1.0, 1.0),
        **options: Any,
    ) -> None:
        scorer = scorers.CAKE(window=window, kernel=kernel, gamma=gamma)
        super().__init__(model, scorer, CakePreference(budget, tau=tau), **options)
