"""KV caches for live models: a scorer, a budget rule and a store, in any combination.

    cache = regard.cache.SnapKV(model, budget=0.2)
    model.generate(**inputs, past_key_values=cache)

A named cache is a scorer and a budget rule under the name of its paper; `Cache(model, scorer=..., budget=...)` combines any
scorer of `regard.cache.scorers` with any rule of `regard.cache.budgets`.
"""

from __future__ import annotations

from regard.cache import budgets, scorers
from regard.cache.budget import Budget, Room
from regard.cache.cache import Cache, Full
from regard.cache.cake import Cake
from regard.cache.calibrated import Calibrated
from regard.cache.calibration import Calibration, calibrate
from regard.cache.expected_attention import ExpectedAttention
from regard.cache.files import load
from regard.cache.h2o import H2O
from regard.cache.keynorm import KeyNorm
from regard.cache.kvzip import KVzip
from regard.cache.layer import Layer
from regard.cache.pyramid import PyramidKV
from regard.cache.quantised import Quantised
from regard.cache.retrieval_heads import RetrievalHeads
from regard.cache.scorer import Scorer
from regard.cache.snapkv import SnapKV
from regard.cache.store import Ragged
from regard.cache.streaming import Streaming, StreamingExact
from regard.cache.tova import TOVA

__all__ = [
    "H2O",
    "TOVA",
    "Budget",
    "Cache",
    "Cake",
    "Calibrated",
    "Calibration",
    "ExpectedAttention",
    "Full",
    "KVzip",
    "KeyNorm",
    "Layer",
    "PyramidKV",
    "Quantised",
    "Ragged",
    "RetrievalHeads",
    "Room",
    "Scorer",
    "SnapKV",
    "Streaming",
    "StreamingExact",
    "budgets",
    "calibrate",
    "load",
    "scorers",
]
