"""What keys receive from queries: rows, sums and peaks of attention weights, in blocks of query rows.

    A[i, j] = softmax_j( scaling * q_i . k_j )   over the keys j that query i sees,
    received_j = sum over rows i and the group's heads of w_i A[i, j],
    peak_j     = max over the same of A[i, j].

Visibility is a matter of positions alone: query i sees key j when 0 <= position(j) <= position(i), and, with a sliding
window, when position(i) - position(j) < window. A position of -1 marks an empty slot or a padding token. So the same functions
serve a whole prompt, a chunk of one, a decoded token and a cache whose heads hold different keys.

Cost: one matrix product and one softmax pass over the visible part; memory two blocks of rows x keys, whatever the length.
Grouped heads are folded into rows, so a KV head is read once for all its query heads.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

BLOCK_NUMBERS = 1_200_000
"""Numbers in one block of weights; two such blocks fit the processor's cache."""


def attention_rows(
    query: Float[Tensor, "batch heads rows dim"],
    key: Float[Tensor, "batch kv_heads keys dim"],
    query_positions: Int[Tensor, "batch rows"],
    key_positions: Int[Tensor, "batch kv_heads keys"],
    *,
    scaling: float,
    softcap: float | None = None,
    window: int | None = None,
) -> Float[Tensor, "batch heads rows keys"]:
    """Attention weights of a few query rows, exact, in float32 (float64 for float64 input).

    Rows that see no key, and rows of padding (position -1), are 0.

    Args:
        query: the rows, after position encoding.
        key: the keys, after position encoding, one set for each KV head.
        query_positions: position of every row, -1 for padding.
        key_positions: position of every key slot, -1 for an empty slot.
        scaling: factor on query . key.
        softcap: scores become `softcap * tanh(scores / softcap)` when given (Gemma 2).
        window: keys seen by a sliding-window layer, None for all.

    Cost: O(rows x keys x dim) time, O(rows x keys) memory: meant for an observation window, not for a whole prompt.
    """
    batch, heads, rows, _ = query.shape
    kv_heads = key.shape[1]
    query, key = _working(query), _working(key)
    folded = (query * scaling).reshape(batch, kv_heads, heads // kv_heads * rows, -1)
    scores = (folded @ key.transpose(-1, -2)).view(batch, kv_heads, -1, rows, key.shape[2])
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    visible = _visible(query_positions[:, None, :], key_positions, window)[:, :, None]
    weights = torch.softmax(scores.masked_fill(~visible, -math.inf), -1)
    weights = torch.where(visible.any(-1, keepdim=True), weights, 0.0)
    return weights.view(batch, heads, rows, -1)


def received_attention(
    query: Float[Tensor, "batch heads rows dim"],
    key: Float[Tensor, "batch kv_heads keys dim"],
    query_positions: Int[Tensor, "batch rows"],
    key_positions: Int[Tensor, "batch kv_heads keys"],
    *,
    scaling: float,
    softcap: float | None = None,
    window: int | None = None,
    row_weights: Float[Tensor, " rows"] | None = None,
) -> Float[Tensor, "batch kv_heads keys"]:
    """What every key receives, summed over the query rows and over the heads of its group.

    Args:
        row_weights: how many rows each row stands for, None for 1 each (`sampled_rows` gives them). The other arguments are
            those of `attention_rows`.

    Cost: see the module; at 2048 tokens of SmolLM2 a quarter of its prefill when all rows are read.
    """
    out = key.new_zeros(key.shape[:3], dtype=_working(key[:0]).dtype)
    for rows, keys, weights in _blocks(
        query, key, query_positions, key_positions, scaling, softcap, window
    ):
        group = weights.shape[2] // (rows.stop - rows.start)
        factors = weights.new_ones(1) if row_weights is None else row_weights[rows].to(weights)
        factors = factors.expand(rows.stop - rows.start).repeat(group)
        out[..., keys] += torch.matmul(factors, weights)
    return out


def strongest_attention(
    query: Float[Tensor, "batch heads rows dim"],
    key: Float[Tensor, "batch kv_heads keys dim"],
    query_positions: Int[Tensor, "batch rows"],
    key_positions: Int[Tensor, "batch kv_heads keys"],
    *,
    scaling: float,
    softcap: float | None = None,
    window: int | None = None,
) -> Float[Tensor, "batch kv_heads keys"]:
    """The largest weight that any of the rows, in any head of the group, puts on each key; 0 where none sees it.

    Arguments and cost as for `received_attention`.
    """
    out = key.new_zeros(key.shape[:3], dtype=_working(key[:0]).dtype)
    for _, keys, weights in _blocks(
        query, key, query_positions, key_positions, scaling, softcap, window
    ):
        out[..., keys] = torch.maximum(out[..., keys], weights.amax(2))
    return out


def sampled_rows(
    rows: int, every: int, last: int = 64
) -> tuple[Int[Tensor, " sampled"], Float[Tensor, " sampled"]]:
    """One row in `every`, and all of the `last` ones: their indices and how many rows each stands for.

    The rows are the middles of runs of `every`, so that an estimate does not drift to the ends of the runs. With `every` 1 all
    rows come back with weight 1.

    >>> sampled_rows(10, 4, last=2)
    (tensor([2, 6, 8, 9]), tensor([4., 4., 1., 1.]))
    """
    body = max(0, rows - last)
    starts = torch.arange(0, body, every)
    ends = (starts + every).clamp(max=body)
    tail = torch.arange(body, rows)
    index = torch.cat([(starts + ends) // 2, tail])
    return index, torch.cat([(ends - starts).float(), torch.ones(len(tail))])


def _blocks(
    query: Tensor,
    key: Tensor,
    query_positions: Tensor,
    key_positions: Tensor,
    scaling: float,
    softcap: float | None,
    window: int | None,
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Blocks of rows with the keys any of them sees: (rows, keys, weights `[batch, kv_heads, group * rows, keys]`).

    The weights live in a buffer that the next block overwrites.
    """
    query, key = _working(query), _working(key)
    batch, heads, count, dim = query.shape
    kv_heads = key.shape[1]
    group = heads // kv_heads
    keys_t = key.contiguous().transpose(-1, -2)
    size = max(16, min(256, BLOCK_NUMBERS // max(1, batch * heads * key.shape[2]) // 8 * 8))
    lowest, highest = _reach(key_positions)
    buffers = [query.new_empty(batch * heads * min(size, count) * key.shape[2]) for _ in range(2)]
    for start in range(0, count, size):
        rows = slice(start, min(start + size, count))
        positions = query_positions[:, rows]
        if not bool((positions >= 0).any()):
            continue
        first, last = int(positions[positions >= 0].min()), int(positions.max())
        lo = 0 if window is None else int((highest > first - window).to(torch.uint8).argmax())
        seen = (lowest >= 0) & (lowest <= last)
        hi = int(seen.nonzero()[-1]) + 1 if bool(seen.any()) else 0
        if hi <= lo:
            continue
        keys = slice(lo, hi)
        width = rows.stop - rows.start
        shape = (batch, kv_heads, group * width, hi - lo)
        numbers = math.prod(shape)
        folded = (query[:, :, rows] * scaling).reshape(batch * kv_heads, group * width, dim)
        scores, weights = (buffer[:numbers].view(shape) for buffer in buffers)
        torch.bmm(
            folded,
            keys_t[..., keys].flatten(0, 1),
            out=scores.view(batch * kv_heads, *shape[2:]),
        )
        if softcap is not None:
            scores.div_(softcap).tanh_().mul_(softcap)
        held = key_positions[..., keys]
        padded = bool((positions < 0).any())
        edge = 0 if padded or window is not None else _edge(held, first)
        visible = None
        if edge < hi - lo:
            visible = _visible(positions[:, None, :], held[..., edge:], window)
            scores.unflatten(2, (group, width))[..., edge:].masked_fill_(
                ~visible[:, :, None], torch.finfo(scores.dtype).min
            )
        torch.softmax(scores, -1, out=weights)
        if edge == 0 and visible is not None:  # only then can a row see nothing
            dead = ~visible.any(-1)[:, :, None, :, None]
            weights.unflatten(2, (group, width)).masked_fill_(dead, 0)
        yield rows, keys, weights


def _reach(positions: Tensor) -> tuple[Tensor, Tensor]:
    """For every slot the smallest valid and the largest position over batch and heads (-1 where all are empty)."""
    flat = positions.flatten(0, 1)
    far = torch.iinfo(flat.dtype).max
    lowest = torch.where(flat < 0, far, flat).amin(0)
    return torch.where(lowest == far, -1, lowest), flat.amax(0)


def _edge(positions: Tensor, first: int) -> int:
    """The first slot that is empty, or later than position `first`, for some head: slots before it are seen by all."""
    hidden = ((positions < 0) | (positions > first)).flatten(0, -2).any(0)
    return int(hidden.to(torch.uint8).argmax()) if bool(hidden.any()) else len(hidden)


def _visible(queries: Tensor, keys: Tensor, window: int | None) -> Tensor:
    """`[batch, kv_heads, rows, keys]` from positions `[batch, 1, rows]` and `[batch, kv_heads, keys]`."""
    queries, keys = queries[..., :, None], keys[..., None, :]
    visible = (keys >= 0) & (keys <= queries)
    return visible if window is None else visible & (queries - keys < window)


def _working(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()
