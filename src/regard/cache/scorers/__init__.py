"""Scorers: which held keys are worth keeping. Any of them goes with any budget rule and store.

regard.cache.Cache(model, scorer=H2O(normalise=True), budget=Global(0.2))
"""

from regard.cache.scorers.cake import CAKE
from regard.cache.scorers.expected_attention import ExpectedAttention
from regard.cache.scorers.h2o import H2O
from regard.cache.scorers.keynorm import KeyNorm
from regard.cache.scorers.kvzip import KVzip
from regard.cache.scorers.retrieval_heads import RetrievalHeads
from regard.cache.scorers.snapkv import SnapKV
from regard.cache.scorers.streaming import Streaming, StreamingExact
from regard.cache.scorers.tova import TOVA

__all__ = [
    "CAKE",
    "H2O",
    "TOVA",
    "ExpectedAttention",
    "KVzip",
    "KeyNorm",
    "RetrievalHeads",
    "SnapKV",
    "Streaming",
    "StreamingExact",
]
