"""KV caches for live models: a scorer, a budget rule and a store, in any combination.

cache = regard.cache.Cache(model, scorer=scorer, budget=0.2)
model.generate(**inputs, past_key_values=cache)
"""

from __future__ import annotations

from regard.cache.budget import Budget, Room
from regard.cache.cache import Cache, Full
from regard.cache.layer import Layer
from regard.cache.scorer import Scorer
from regard.cache.store import Ragged

__all__ = ["Budget", "Cache", "Full", "Layer", "Ragged", "Room", "Scorer"]
