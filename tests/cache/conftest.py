from cache.reference import batch, model

__all__ = ["batch", "model"]
