"""Tiles on the fused kernel, merged by their log-sum-exps.

    out, lse = kernel(query block, keys of the tile)
    output' = output + (out - output) * sigmoid(lse - total),   total' = logaddexp(total, lse)

Tiles run in waves small enough for the processor's cache. Keys in evenly spaced runs are read as views, others are gathered
block by block. Grouped heads are folded into query rows, so keys are gathered once for each KV head. Backward, every tile's
kernel gets the merged output and log-sum-exp, which makes its gradients those of the whole row (as in ring attention).

Cost: the kernel's time for the tiles' pairs and one copy of the gathered keys and values; memory O(queries + one wave).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regard.engine.tiles import Plan, Wave

WAVE = 1 << 19
"""Gathered key numbers in a wave: few enough to stay in the cache between the copy and the kernel."""
NEAR = 1 << 20
"""Key numbers of the heads that are worked on together: few enough that the shared cache holds them with their values."""

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True, slots=True)
class Chunk:
    """Some tiles of a wave for some KV heads.

    Attributes:
        units: the KV heads.
        rows: their query rows, a slice where the tiles are neighbours.
        blocks: the key blocks (of `wave.unit` keys) of all tiles, one after the other.
        run: the first key slot of the first tile and the step to the next, where the tiles' keys are evenly spaced runs.
    """

    wave: Wave
    units: slice
    tiles: slice
    rows: slice | Tensor
    blocks: Tensor
    run: tuple[int, int] | None

    @property
    def count(self) -> int:
        return self.tiles.stop - self.tiles.start

    @property
    def masked(self) -> bool:
        return self.wave.diagonal or self.wave.hidden is not None


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


def chunks(plan: Plan, units: int, group: int, keys: int, dim: int) -> list[Chunk]:
    """The order of work: few KV heads at a time, so that their keys and values stay near, all their tiles in turn; kept."""
    known = plan.held.get((units, group, dim))
    if known is not None:
        return known
    found: list[Chunk] = []
    together = max(1, NEAR // (keys * dim))
    for first in range(0, units, together):
        last = min(first + together, units)
        for wave in plan.waves:
            count = len(wave.rows)
            room = max(1, WAVE // (wave.width * dim))
            heads = max(1, room // count)
            if group > 1 and (wave.diagonal or wave.hidden is not None):
                heads = 1  # the keys of a masked tile are shared by a group of heads as a view
            for unit in range(first, last, heads):
                here = slice(unit, min(unit + heads, last))
                step = max(1, room // (here.stop - here.start))
                for start in range(0, count, step):
                    found.append(_chunk(wave, here, slice(start, min(start + step, count))))
    plan.held[units, group, dim] = found
    return found


def _chunk(wave: Wave, units: slice, tiles: slice) -> Chunk:
    starts, height, slots = wave.rows[tiles], wave.height, wave.slots[tiles]
    rows: slice | Tensor = slice(starts[0], starts[-1] + height)
    if starts[-1] - starts[0] != (len(starts) - 1) * height:
        rows = (torch.tensor(starts)[:, None] + torch.arange(height)).flatten()
    first = slots[:, 0]
    step = int(first[1] - first[0]) if len(first) > 1 else 0
    even = slots[0, 0] + step * torch.arange(len(first))[:, None]
    even = even + wave.unit * torch.arange(slots.shape[1])
    view = step >= 0 and torch.equal(even, slots)  # a view cannot step backwards
    run = (int(first[0]), step) if view else None
    return Chunk(wave, units, tiles, rows, slots.flatten() // wave.unit, run)


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
        work = chunks(plan, *query.shape[:2], *key.shape[1:])
        rooms = _rooms(work, key)
        for chunk in work:
            q, k, v, mask = _operands(chunk, query, key, value, rooms)
            out, lse = _forward(q, k, v, 0.0, chunk.wave.diagonal, attn_mask=mask, scale=scaling)
            out = _unfold(out.to(exact), chunk, query.shape[1])
            lse = _unfold(lse[..., None], chunk, query.shape[1])[..., 0]
            if chunk.wave.fresh:
                _put(output, chunk, out)
                _put(total, chunk, lse)
                continue
            held, sum_ = _take(output, chunk), _take(total, chunk)
            held.lerp_(out, torch.sigmoid(lse - sum_)[..., None])
            torch.logaddexp(sum_, lse, out=sum_)
            if not isinstance(chunk.rows, slice):
                _put(output, chunk, held)
                _put(total, chunk, sum_)
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
        work = chunks(plan, *query.shape[:2], *key.shape[1:])
        rooms = _rooms(work, key)
        for chunk in work:
            q, k, v, mask = _operands(chunk, query, key, value, rooms)
            out, grad = (_fold(_take(t, chunk), chunk) for t in (output, gradient))
            lse = _fold(_take(total, chunk)[..., None], chunk)[..., 0]
            to_q, to_k, to_v = _backward(
                *(grad, q, k, v, out, lse, 0.0, chunk.wave.diagonal),
                attn_mask=mask,
                scale=ctx.scaling,
            )
            held = _take(grads[0], chunk)
            held += _unfold(to_q, chunk, query.shape[1])
            if not isinstance(chunk.rows, slice):
                _put(grads[0], chunk, held)
            for whole, part in ((grads[1], to_k), (grads[2], to_v)):
                units = chunk.units.stop - chunk.units.start
                part = part.unflatten(1, (units, -1)).sum(2, dtype=whole.dtype).transpose(0, 1)
                part = part.reshape(units, len(chunk.blocks), -1)
                _blocks(whole, chunk.wave.unit)[chunk.units].index_add_(1, chunk.blocks, part)
        return *(g.to(query.dtype) for g in grads), None, None


def _rooms(work: list[Chunk], key: Tensor) -> Tensor:
    """Where chunks gather their keys and values, `[2, numbers]`: one place for all, so that it stays in the cache."""
    gathered = [
        len(c.blocks) * c.wave.unit * (c.units.stop - c.units.start) for c in work if c.run is None
    ]
    return key.new_empty(2, max(gathered, default=0) * key.shape[-1])


def _operands(
    chunk: Chunk, query: Tensor, key: Tensor, value: Tensor, rooms: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The kernel's query, key, value `[tiles, heads, rows, dim]` and additive mask `[tiles, 1, rows, width]`."""
    q = _fold(_take(query, chunk), chunk)
    k, v = (_gather(t, chunk, room) for t, room in zip((key, value), rooms, strict=True))
    if chunk.masked and query.shape[1] > 1:
        k, v = (t.expand(-1, query.shape[1], -1, -1) for t in (k, v))
    if chunk.wave.hidden is None:
        return q, k, v, None
    hidden = chunk.wave.hidden if len(chunk.wave.hidden) == 1 else chunk.wave.hidden[chunk.tiles]
    mask = torch.zeros(hidden.shape, dtype=query.dtype).masked_fill_(hidden, _lowest(query.dtype))
    return q, k, v, mask[:, None].expand(chunk.count, -1, -1, -1)


def _gather(tensor: Tensor, chunk: Chunk, room: Tensor) -> Tensor:
    """The keys (or values) of a chunk's tiles, `[tiles, units, width, dim]`: a view, or copied to `room`."""
    here, count, dim = tensor[chunk.units], chunk.count, tensor.shape[-1]
    if chunk.run is not None:
        start, step = chunk.run
        shape = (count, len(here), chunk.wave.width, dim)
        strides = (step * dim, here.stride(0), dim, 1)
        return here.as_strided(shape, strides, here.storage_offset() + start * dim)
    blocks = _blocks(here, chunk.wave.unit)
    shape = (len(here), len(chunk.blocks), blocks.shape[2])
    picked = room[: math.prod(shape)].view(shape)
    torch.index_select(blocks, 1, chunk.blocks, out=picked)
    return picked.view(len(here), count, chunk.wave.width, dim).transpose(0, 1)


def _blocks(tensor: Tensor, unit: int) -> Tensor:
    """`[units, keys, dim]` as whole blocks `[units, keys // unit, unit * dim]`, a view."""
    count = tensor.shape[1] // unit
    return tensor[:, : count * unit].unflatten(1, (count, unit)).flatten(2)


def _take(tensor: Tensor, chunk: Chunk) -> Tensor:
    """`[units, group, tiles, height, ...]` of `[units, group, queries, ...]`; a view where the tiles are neighbours."""
    return tensor[chunk.units, :, chunk.rows].unflatten(2, (chunk.count, chunk.wave.height))


def _put(tensor: Tensor, chunk: Chunk, part: Tensor) -> None:
    """Writes to the rows that `_take` reads."""
    if isinstance(chunk.rows, slice):
        _take(tensor, chunk).copy_(part)
    else:
        tensor[chunk.units, :, chunk.rows] = part.flatten(2, 3)


def _fold(part: Tensor, chunk: Chunk) -> Tensor:
    """`[tiles, heads, rows, dim]` for the kernel: the group in the rows, or as heads where a mask is per row."""
    units, group, tiles, height, dim = part.shape
    part = part.permute(2, 0, 1, 3, 4)
    if chunk.masked:
        return part.reshape(tiles, units * group, height, dim)
    return part.reshape(tiles, units, group * height, dim)


def _unfold(part: Tensor, chunk: Chunk, group: int) -> Tensor:
    """The inverse of `_fold`."""
    units = chunk.units.stop - chunk.units.start
    shape = (chunk.count, units, group, chunk.wave.height, part.shape[-1])
    return part.reshape(shape).permute(1, 2, 0, 3, 4)


def _lowest(dtype: torch.dtype) -> float:
    """Added to hidden scores: finite, so that a row with every key of a tile hidden merges with weight 0 and not as NaN."""
    return max(-1e30, torch.finfo(dtype).min / 2)
