"""Learnable modules built on `regard.ops` and `regard.engine`."""

from __future__ import annotations

from regard.nn.boundary_predictor import BoundaryPredictor

__all__ = ["BoundaryPredictor"]
