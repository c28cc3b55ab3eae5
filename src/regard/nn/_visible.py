"""Which keys a causal mixer sees: after a state, with padding and within a window, never as a queries x keys tensor."""

from __future__ import annotations

from functools import lru_cache

import torch
from jaxtyping import Bool
from torch import Tensor

from regard.engine import BlockSparseMask, DeferredMask
from regard.engine.block_sparse import from_lists

BLOCK = 128
"""Queries in a block of a window's mask."""


def causal_rule(
    queries: int,
    valid: Bool[Tensor, "batch keys"] | None,
    keys: int,
    *,
    window: int | None = None,
    batch: int = 1,
    device: torch.device | str = "cpu",
) -> DeferredMask | BlockSparseMask | None:
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
    if valid is None and window is not None and queries > BLOCK:
        return window_mask(queries, keys, window)

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


@lru_cache(maxsize=8)
def window_mask(queries: int, keys: int, window: int, prefix: int = 0) -> BlockSparseMask:
    """The newest `queries` of `keys` slots see the `window` newest keys and the first `prefix`.

    Attention then takes O(queries (window + prefix + BLOCK)) time. The mask is kept for the next call of the same sizes.
    """
    offset, fixed = keys - queries, -(-prefix // BLOCK)
    lists = [
        [
            *range(max(0, (block * BLOCK - window + 1) // BLOCK), block + 1),
            *range(min(fixed, block)),
        ]
        for block in range(offset // BLOCK, (keys - 1) // BLOCK + 1)
    ]
    near = lambda query, key: (query - key < window) | (key < prefix)  # noqa: E731
    return from_lists(lists, BLOCK, keys, offset=offset, rule=near)
