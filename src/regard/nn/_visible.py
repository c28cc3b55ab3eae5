"""The mask of a causal mixer that goes on after a state, with padding and with a window, as a rule."""

from __future__ import annotations

import torch
from jaxtyping import Bool
from torch import Tensor

from regard.engine import DeferredMask


def causal_rule(
    queries: int,
    valid: Bool[Tensor, "batch keys"] | None,
    keys: int,
    *,
    window: int | None = None,
    batch: int = 1,
    device: torch.device | str = "cpu",
) -> DeferredMask | None:
    """Which of `keys` slots the newest `queries` see; None when that is plain causality.

    A query sees the valid keys up to itself, the newest `window` of them when there is one, and always itself: a padding
    token sees something, so that no row of weights is empty.
    """
    if valid is not None and bool(valid.all()):
        valid = None
    offset = keys - queries
    plain = valid is None and (window is None or window >= keys)
    if plain and (offset == 0 or queries == 1):
        return None

    def rule(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        visible = key <= query
        if window is not None:
            visible = visible & (query - key < window)
        if valid is not None:
            visible = visible & (valid[:, None, None, :] | (query == key))
        return visible

    return DeferredMask(  # pyright: ignore[reportCallIssue]
        rule,
        (batch, 1, queries, keys),
        query_offset=offset,
        key_offset=0,
        key_valid=valid,
        causal=plain,
        dtype=torch.bool,
        device=device,
    )
