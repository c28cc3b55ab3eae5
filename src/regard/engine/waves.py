"""Tiles on the fused kernel, merged by their log-sum-exps.

    out, lse = kernel(query block, keys of the tile)
    output' = output + (out - output) * sigmoid(lse - total),   total' = logaddexp(total, lse)

Tiles run in waves small enough for the processor's cache. Keys in evenly spaced runs are read as views, others are gathered
block by block. Grouped heads are folded into query rows, so keys are gathered once for each KV head. Backward, every tile's
kernel gets the merged output and log-sum-exp, which makes its gradients those of the whole row (as in ring attention).

Cost: the kernel's time for the tiles' pairs and one copy of the gathered keys and values; memory O(queries + one wave).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from regard.engine.tiles import Plan, Wave

WAVE = 1 << 18
"""Gathered key numbers in a wave: few enough to stay in the cache between the copy and the kernel."""

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class Chunk(NamedTuple):
    """Some tiles of a wave for some KV heads."""

    wave: Wave
    units: slice
    tiles: slice


def can_attend(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether there is a kernel that returns log-sum-exps: on the CPU, with values as wide as keys."""
    return query.device.type == "cpu" and key.shape[-1] == value.shape[-1]


def attend(query: Tensor, key: Tensor, value: Tensor, plan: Plan, scaling: float) -> Tensor:
    """`[batch, heads, queries, dim]` from query of that shape, key and value `[batch, kv_heads, keys, dim]`."""
    batch, heads, queries, dim = query.shape
    groups = key.shape[1]
    folded = query.reshape(batch * groups, heads // groups, queries, dim)
    key, value = (t.reshape(batch * groups, -1, dim).contiguous() for t in (key, value))
    output = _Waves.apply(folded, key, value, plan, scaling)
    return output.view(batch, heads, queries, dim)


def chunks(plan: Plan, units: int, dim: int) -> Iterator[Chunk]:
    """The order of work: few KV heads at a time, so that their keys and values stay near, all their tiles in turn."""
    each = sum(wave.slots.numel() * wave.unit for wave in plan.waves) * dim
    together = max(1, WAVE // max(each, 1))
    for first in range(0, units, together):
        here = slice(first, min(first + together, units))
        for wave in plan.waves:
            step = max(1, WAVE // (wave.width * dim * (here.stop - here.start)))
            for start in range(0, len(wave.rows), step):
                yield Chunk(wave, here, slice(start, min(start + step, len(wave.rows))))


class _Waves(torch.autograd.Function):
    """query `[units, group, queries, dim]`, key and value `[units, keys, dim]`."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, plan: Plan, scaling: float
    ) -> Tensor:
        exact = query.dtype if query.dtype == torch.float64 else torch.float32
        start = torch.zeros if plan.bare else torch.empty
        output = start(query.shape, dtype=exact)
        total = start(query.shape[:-1], dtype=exact)
        if plan.bare:
            total.fill_(float("-inf"))
        for chunk in chunks(plan, len(query), query.shape[-1]):
            q, k, v, mask = _operands(chunk, query, key, value)
            diagonal = chunk.wave.diagonal
            out, lse = _forward(q, k, v, 0.0, diagonal, attn_mask=mask, scale=scaling)
            out = _unfold(out.to(exact), chunk, query.shape[1])
            lse = _unfold(lse[..., None], chunk, query.shape[1])[..., 0]
            if chunk.wave.fresh:
                _put(output, chunk, out)
                _put(total, chunk, lse)
            else:
                held, sum_ = _take(output, chunk), _take(total, chunk)
                _put(output, chunk, held.lerp_(out, torch.sigmoid(lse - sum_)[..., None]))
                _put(total, chunk, torch.logaddexp(sum_, lse))
        if any(wave.hidden is not None for wave in plan.waves):
            output.masked_fill_((total < _lowest(query.dtype) / 2)[..., None], 0)
        result = output.to(query.dtype)
        ctx.save_for_backward(query, key, value, result, total)
        ctx.plan, ctx.scaling = plan, scaling
        return result

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        query, key, value, output, total = ctx.saved_tensors
        plan: Plan = ctx.plan
        gradient = gradient.masked_fill((total < _lowest(query.dtype) / 2)[..., None], 0)
        grads = tuple(torch.zeros_like(t, dtype=total.dtype) for t in (query, key, value))
        for chunk in chunks(plan, len(query), query.shape[-1]):
            wave, units = chunk.wave, chunk.units
            q, k, v, mask = _operands(chunk, query, key, value)
            out, grad = (_fold(_take(t, chunk), chunk) for t in (output, gradient))
            lse = _fold(_take(total, chunk)[..., None], chunk)[..., 0]
            to_q, to_k, to_v = _backward(
                grad, q, k, v, out, lse, 0.0, wave.diagonal, attn_mask=mask, scale=ctx.scaling
            )
            held = _take(grads[0], chunk)
            _put(grads[0], chunk, held + _unfold(to_q, chunk, query.shape[1]))
            runs = wave.slots[chunk.tiles].flatten() // wave.unit
            for whole, part in ((grads[1], to_k), (grads[2], to_v)):
                part = part.sum(1, dtype=whole.dtype)
                part = part.view(units.stop - units.start, len(runs), -1)
                _blocks(whole, wave.unit)[units].index_add_(1, runs, part)
        return *(g.to(query.dtype) for g in grads), None, None


def _operands(
    chunk: Chunk, query: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The kernel's query, key, value `[units * tiles, group | 1, rows, dim]` and additive mask."""
    wave, units, tiles = chunk
    q = _fold(_take(query, chunk), chunk)
    k, v = (_gather(t, chunk) for t in (key, value))
    if wave.diagonal or wave.hidden is not None:
        k, v = (t.expand(-1, q.shape[1], -1, -1) for t in (k, v))
    if wave.hidden is None:
        return q, k, v, None
    mask = torch.zeros(wave.hidden[tiles].shape, dtype=query.dtype)
    mask = mask.masked_fill_(wave.hidden[tiles], _lowest(query.dtype))
    return q, k, v, mask.repeat(units.stop - units.start, 1, 1)[:, None]


def _gather(tensor: Tensor, chunk: Chunk) -> Tensor:
    """The keys (or values) of a chunk's tiles, `[units * tiles, 1, width, dim]`."""
    wave, units, tiles = chunk
    slots, width, dim = wave.slots[tiles], wave.width, tensor.shape[-1]
    starts = slots[:, 0].tolist()
    step = starts[1] - starts[0] if len(starts) > 1 else 0
    run = torch.arange(slots.shape[1]) * wave.unit
    even = starts == [starts[0] + i * step for i in range(len(starts))]
    if units.stop - units.start == 1 and even and bool((slots - slots[:, :1] == run).all()):
        own = tensor[units.start]
        offset = own.storage_offset() + starts[0] * dim
        shape, strides = (len(starts), 1, width, dim), (step * dim, 0, dim, 1)
        return own.as_strided(shape, strides, offset)
    picked = _blocks(tensor, wave.unit)[units].index_select(1, slots.flatten() // wave.unit)
    return picked.view(-1, 1, width, dim)


def _blocks(tensor: Tensor, unit: int) -> Tensor:
    """`[units, keys, dim]` as whole blocks `[units, keys // unit, unit * dim]`, a view."""
    count = tensor.shape[1] // unit
    return tensor[:, : count * unit].unflatten(1, (count, unit)).flatten(2)


def _span(chunk: Chunk) -> slice | None:
    """The query rows of a chunk as one slice, None where its tiles are not next to each other."""
    rows, height = chunk.wave.rows[chunk.tiles], chunk.wave.height
    together = rows[-1] - rows[0] == (len(rows) - 1) * height
    return slice(rows[0], rows[-1] + height) if together else None


def _rows(chunk: Chunk) -> Tensor:
    starts = torch.tensor(chunk.wave.rows[chunk.tiles])
    return (starts[:, None] + torch.arange(chunk.wave.height)).flatten()


def _take(tensor: Tensor, chunk: Chunk) -> Tensor:
    """`[units, group, tiles, height, ...]` of `[units, group, queries, ...]`; a view where it can be."""
    span = _span(chunk)
    rows = span if span is not None else _rows(chunk)
    shape = (len(chunk.wave.rows[chunk.tiles]), chunk.wave.height)
    return tensor[chunk.units, :, rows].unflatten(2, shape)


def _put(tensor: Tensor, chunk: Chunk, part: Tensor) -> None:
    """Writes what `_take` read."""
    span = _span(chunk)
    rows = span if span is not None else _rows(chunk)
    tensor[chunk.units, :, rows] = part.flatten(2, 3)


def _fold(part: Tensor, chunk: Chunk) -> Tensor:
    """`[units * tiles, heads, rows, dim]` for the kernel: the group in the rows, or as heads where a mask is per row."""
    units, group, tiles, height, dim = part.shape
    part = part.transpose(1, 2)
    if chunk.wave.diagonal or chunk.wave.hidden is not None:
        return part.reshape(units * tiles, group, height, dim)
    return part.reshape(units * tiles, 1, group * height, dim)


def _unfold(part: Tensor, chunk: Chunk, group: int) -> Tensor:
    """The inverse of `_fold`."""
    units, tiles = chunk.units.stop - chunk.units.start, len(chunk.wave.rows[chunk.tiles])
    shape = (units, tiles, group, chunk.wave.height, part.shape[-1])
    return part.reshape(shape).transpose(1, 2)


def _lowest(dtype: torch.dtype) -> float:
    """Added to hidden scores: finite, so that a row with every key of a tile hidden merges with weight 0 and not as NaN."""
    return max(-1e30, torch.finfo(dtype).min / 2)
