"""What to compute for a block-sparse pattern: tiles of equal shape.

A query block's named keys fall in two parts: those that all its queries see, which need no mask, and the few that are masked
inside (the diagonal of a causal pattern, the ends of a window). Each part is one tile; tiles of equal shape run together
(`engine/waves.py`).

Cost: O(named blocks), or O(named pairs) where a rule hides single keys. Made once for each shape of call.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from regard.engine.block_sparse import BlockSparseMask


@dataclass(frozen=True, slots=True)
class Wave:
    """Tiles of equal shape: query blocks of `height` rows, each against `width` keys.

    Attributes:
        rows: the first query row of each tile.
        slots: `[tiles, width / unit]`: the first key slots of the runs that each tile sees.
        unit: keys in a run.
        hidden: `[tiles, height, width]`, True where a key is masked, `[1, height, width]` where that is the same for all
            tiles; None where all are seen.
        diagonal: plain causality inside (then `height == width` and there is no `hidden`).
        fresh: the first tiles of their rows, which have nothing to merge with.
    """

    rows: tuple[int, ...]
    height: int
    slots: Tensor
    unit: int
    hidden: Tensor | None
    diagonal: bool
    fresh: bool

    @property
    def width(self) -> int:
        return self.slots.shape[1] * self.unit


@dataclass(frozen=True, slots=True)
class Plan:
    """What computes a pattern. `complete`: nothing that causality shows is hidden; `bare`: some query sees nothing."""

    waves: tuple[Wave, ...]
    mask: BlockSparseMask
    queries: int
    complete: bool
    bare: bool
    held: dict[Any, Any] = field(default_factory=dict, repr=False)

    @property
    def pairs(self) -> int:
        """(query, key) products that the tiles make for one head."""
        return sum(len(wave.rows) * wave.height * wave.width for wave in self.waves)


def plan(mask: BlockSparseMask, queries: int) -> Plan:
    """Sorts the named blocks of every query block into tiles; O(named pairs) only where a rule hides single keys."""
    groups: dict[Any, list[tuple[int, Tensor, Tensor | None]]] = {}
    visible, bare = 0, False
    for block in range(len(mask.blocks)):
        rows = mask.rows(block, queries)
        tiles, seen = _tiles(mask, block, rows.stop - rows.start)
        visible += seen
        bare |= not tiles
        for i, (slots, unit, hidden, diagonal) in enumerate(tiles):
            shape = (i > 0, not diagonal, hidden is None, rows.stop - rows.start, unit, len(slots))
            groups.setdefault(shape, []).append((rows.start, slots, hidden))
    waves = []
    for shape, tiles in sorted(groups.items(), key=lambda item: item[0]):
        more, inside, unmasked, height, unit, _ = shape
        waves.append(
            Wave(
                rows=tuple(start for start, _, _ in tiles),
                height=height,
                slots=torch.stack([slots for _, slots, _ in tiles]),
                unit=unit,
                hidden=None if unmasked else _stacked([h for *_, h in tiles if h is not None]),
                diagonal=not inside,
                fresh=not more,
            )
        )
    causal = queries * mask.offset + queries * (queries + 1) // 2
    every = causal if mask.causal else queries * mask.keys
    return Plan(tuple(waves), mask, queries, visible == every, bare)


def _stacked(hidden: list[Tensor]) -> Tensor:
    """One mask where all tiles have the same."""
    alike = all(torch.equal(hidden[0], other) for other in hidden[1:])
    return hidden[0][None] if alike else torch.stack(hidden)


Tile = tuple[Tensor, int, Tensor | None, bool]
"""First slots of the key runs, their length, hidden pairs `[height, keys]` or None, plain causality inside."""


def _tiles(mask: BlockSparseMask, block: int, height: int) -> tuple[list[Tile], int]:
    """The masked tile of a query block and the unmasked one, where there are such keys; and how many pairs are visible."""
    named, unit, first = mask.blocks[block], mask.key_size, mask.first_slot(block)
    whole = height == mask.size and (len(named) == 0 or (int(named[-1]) + 1) * unit <= mask.keys)
    if whole and mask.rule is None and unit == mask.size and mask.causal:
        own = first // unit
        before, at = named[named < own] * unit, named[named == own] * unit
        tiles: list[Tile] = [(at, unit, None, True)] if len(at) else []
        tiles += [(before, unit, None, False)] if len(before) else []
        seen = len(before) * unit * height + len(at) * height * (height + 1) // 2
        return tiles, seen
    if not whole or (mask.causal and unit != mask.size):
        unit = 1
    slots = named * unit if whole and unit > 1 else mask.columns(block)
    if mask.rule is None and not mask.causal:
        return [(slots, unit, None, False)], len(slots) * unit * height
    device = slots.device
    query = torch.arange(first, first + height, device=device)[:, None]
    columns = (slots[:, None] + torch.arange(unit, device=device)).flatten()
    shown = mask.visible(query, columns[None, :]).expand(height, -1)
    runs = shown.unflatten(1, (len(slots), unit))
    full, some = runs.all(2).all(0), runs.any(2).any(0)
    partial = some & ~full
    tiles = []
    if bool(partial.any()):
        hidden = ~runs[:, partial].flatten(1)
        tiles.append((slots[partial], unit, hidden, False))
    if bool(full.any()):
        tiles.append((slots[full], unit, None, False))
    return tiles, int(shown.sum())
