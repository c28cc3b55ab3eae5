"""Calibrated head budgets as a cache: a cheap score, and each head's share from a profile made once for the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from regard.cache import scorers
from regard.cache.budgets import Calibrated as CalibratedBudget
from regard.cache.cache import Cache
from regard.cache.calibration import Calibration
from regard.cache.scorer import Scorer


class Calibrated(Cache):
    """Heads that retrieve keep much, the others little, as `regard.cache.calibrate(model)` found it.

    Args:
        model, options: as for `regard.cache.Cache`.
        budget: a fraction, tokens per KV head in the mean over layers and heads, or bytes.
        calibration: the profile, or the file it was saved in.
        scorer: ranks keys inside a head; Expected Attention unless given.
        least: slots every head keeps.

    Raises:
        InputError: a calibration that was made for another model.
    """

    def __init__(
        self,
        model: nn.Module,
        budget: float | int | str,
        calibration: Calibration | str | Path,
        *,
        scorer: Scorer | None = None,
        least: int = 8,
        **options: Any,
    ) -> None:
        if not isinstance(calibration, Calibration):
            calibration = Calibration.load(calibration)
        calibration.check(model)
        rule = CalibratedBudget(budget, calibration=calibration, least=least)
        super().__init__(model, scorer or scorers.ExpectedAttention(), rule, **options)
