"""Sparse attention: patterns that name the key blocks each query block sees, for prefill and decode of any model."""

from regard.sparse.pattern import Pattern
from regard.sparse.power import Power

__all__ = ["Pattern", "Power"]
