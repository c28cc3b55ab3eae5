"""Masks made of others: different ones for different rows of a batch or heads, and the intersection of two.

`SplitMask` runs each part by itself, on its own rows, heads and key slots (padding is cut away, grouped heads stay grouped), so
every part keeps its fast backend. `Both` hides what either mask hides; it is computed by the blockwise backend.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from regard.engine.call import AttentionCall
from regard.engine.masks import (
    CausalMask,
    DeferredMask,
    FullMask,
    Mask,
    Window,
    _from_visible,
)

Span = tuple[tuple[int, ...] | None, int, int]
"""Batch rows (None for all) and the key slots `start:stop` of their tokens."""


@dataclass(frozen=True, slots=True)
class Part:
    """A mask for some of a call: batch rows, heads (None for all), query rows `first:last`, key slots `start:stop`.

    The mask counts queries from `first` and keys from `start`.
    """

    mask: Mask
    batch: tuple[int, ...] | None
    heads: tuple[int, ...] | None
    first: int
    last: int
    start: int
    stop: int

    def covers(self, shape: tuple[int, int, int, int]) -> bool:
        """Whether this is all of a call `(batch, heads, queries, keys)`."""
        batch, heads, queries, keys = shape
        return (
            (self.batch is None or len(self.batch) == batch)
            and (self.heads is None or len(self.heads) == heads)
            and (self.first, self.last, self.start, self.stop) == (0, queries, 0, keys)
        )


@dataclass(frozen=True, slots=True)
class SplitMask:
    """Parts that do not overlap; queries that no part holds see nothing."""

    shape: tuple[int, int, int, int]
    parts: tuple[Part, ...]

    def window(self, rows: Tensor) -> Window:
        batch, heads, _queries, keys = self.shape
        batch = batch if any(part.batch is not None for part in self.parts) else 1
        visible = torch.zeros(batch, heads, len(rows), keys, dtype=torch.bool, device=rows.device)
        for part in self.parts:
            inside = (rows >= part.first) & (rows < part.last)
            if not bool(inside.any()):
                continue
            local = rows[inside] - part.first
            found = part.mask.window(local)
            seen = found.visible(len(local), rows.device)
            if seen is None:
                seen = torch.ones(1, 1, len(local), found.hi - found.lo, dtype=torch.bool)
            which = torch.tensor(part.batch or range(batch), device=rows.device)
            who = torch.tensor(part.heads or range(heads), device=rows.device)
            where = inside.nonzero()[:, 0]
            lo, hi = found.lo + part.start, found.hi + part.start
            cells = (which[:, None, None], who[:, None], where)
            filled = visible[..., lo:hi]
            filled[cells] = seen.to(rows.device).expand(len(which), len(who), -1, -1)
        return _from_visible(visible)


@dataclass(frozen=True, slots=True)
class Both:
    """A key is visible when both masks show it; `model` may add to the scores, `pattern` only hides."""

    model: Mask
    pattern: Mask
    keys: int

    def window(self, rows: Tensor) -> Window:
        first, second = self.model.window(rows), self.pattern.window(rows)
        seen = self._whole(first, rows) & self._whole(second, rows)
        additive = None
        if first.additive is not None:
            shape = (*first.additive.shape[:-1], self.keys)
            additive = first.additive.new_zeros(shape)
            additive[..., first.lo : first.hi] = first.additive
        return _from_visible(seen, additive)

    def _whole(self, window: Window, rows: Tensor) -> Tensor:
        seen = window.visible(len(rows), rows.device)
        batch, heads = (1, 1) if seen is None else seen.shape[:2]
        whole = torch.zeros(
            batch, heads, len(rows), self.keys, dtype=torch.bool, device=rows.device
        )
        whole[..., window.lo : window.hi] = True if seen is None else seen
        return whole


def join_heads(
    masks: Sequence[tuple[Mask, tuple[int, ...]]], queries: int, keys: int, heads: int
) -> Mask:
    """One mask from those of some heads each; masks that are split by heads themselves are cut to the heads given."""
    parts: list[Part] = []
    for mask, chosen in masks:
        if isinstance(mask, SplitMask):
            for part in mask.parts:
                own = tuple(h for h in part.heads or range(heads) if h in chosen)
                parts += [replace(part, heads=own)] if own else []
        elif chosen:
            parts.append(Part(mask, None, chosen, 0, queries, 0, keys))
    if len(parts) == 1 and parts[0].covers((1, heads, queries, keys)):
        return parts[0].mask
    return SplitMask((1, heads, queries, keys), tuple(parts))


def runs(chosen: Sequence[int]) -> slice | list[int]:
    """Ascending numbers as a slice where they are consecutive, so that indexing gives a view."""
    if chosen[-1] - chosen[0] + 1 == len(chosen):
        return slice(chosen[0], chosen[-1] + 1)
    return list(chosen)


def sub_calls(call: AttentionCall, part: Part) -> list[tuple[AttentionCall, slice | list[int]]]:
    """The calls that compute a part, each with the heads it is for; KV groups of unequal size need one call each size."""
    chosen = part.heads or tuple(range(call.heads))
    groups: dict[int, list[int]] = {}
    for head in chosen:
        groups.setdefault(head // call.group, []).append(head)
    sizes: dict[int, list[int]] = {}
    for group, members in groups.items():
        sizes.setdefault(len(members), []).append(group)
    rows = slice(None) if part.batch is None else runs(part.batch)
    found = []
    for held in sizes.values():
        heads = runs([head for group in held for head in groups[group]])
        keys = (slice(None), runs(held), slice(part.start, part.stop))
        query = call.query[rows][:, heads, part.first : part.last]
        inner = replace(
            call,
            query=query,
            key=call.key[rows][keys],
            value=call.value[rows][keys],
            mask=part.mask,
            valid=None,
            key_valid=None,
            query_offset=max(call.query_offset + part.first - part.start, 0),
            output=None,
        )
        found.append((inner, heads))
    return found


def valid_rows(call: AttentionCall) -> list[Span] | None:
    """Which rows of the batch hold which key slots: `(rows, start, stop)`, None for all rows.

    None when the model's mask is more than causality and one unbroken run of real tokens in each row.
    """
    mask, queries = call.mask, call.queries
    if isinstance(mask, CausalMask) or (isinstance(mask, DeferredMask) and mask.causal):
        offset = (
            mask.offset if isinstance(mask, CausalMask) else mask.query_offset - mask.key_offset
        )
        return [(None, 0, min(offset + queries, call.keys))] if offset >= 0 else None
    if isinstance(mask, FullMask) and queries == 1:
        return [(None, 0, call.keys)]
    if not isinstance(mask, DeferredMask) or mask.key_valid is None:
        return None
    if "spans" not in vars(mask):
        vars(mask)["spans"] = _spans(mask)
    return vars(mask)["spans"]


def _spans(mask: DeferredMask) -> list[Span] | None:
    """The runs of real tokens of a mask that is causality and padding and nothing else."""
    valid, offset = mask.key_valid, mask.query_offset - mask.key_offset
    assert valid is not None
    if offset < 0 or offset + mask.shape[-2] > valid.shape[-1]:
        return None
    valid = valid[:, : offset + mask.shape[-2]]
    counts = valid.sum(-1)
    starts = valid.to(torch.uint8).argmax(-1)
    slots = torch.arange(valid.shape[-1], device=valid.device)
    unbroken = (slots >= starts[:, None]) & (slots < (starts + counts)[:, None])
    if not torch.equal(unbroken, valid):
        return None
    for first in range(0, mask.shape[-2], 512):
        rows = torch.arange(first, min(first + 512, mask.shape[-2]), device=valid.device)
        shown = mask.block(rows)
        shown = shown.expand(len(valid), *shown.shape[1:])[:, 0]
        if bool(shown[..., valid.shape[-1] :].any()):
            return None
        shown = shown[..., : valid.shape[-1]]
        plain = valid[:, None, :] & (slots <= (rows + offset)[:, None])
        asked = valid[:, rows + offset]
        if not torch.equal(shown[asked], plain[asked]):
            return None
    kinds: dict[tuple[int, int], list[int]] = {}
    for row, (start, count) in enumerate(zip(starts.tolist(), counts.tolist(), strict=True)):
        kinds.setdefault((start, start + count), []).append(row)
    return [(tuple(rows), *span) for span, rows in kinds.items() if span[1] > span[0]]
