"""Attention over named key blocks only.

A pattern lists, for every block of queries, the key blocks it may see; nothing else is computed. Blocks that all queries of
a block see whole need no mask at all, the others (the diagonal of a causal pattern, the ends of a window) are masked inside;
both parts run on the fused kernel and are merged by their log-sum-exps (`tiles.py`, `waves.py`).

Cost: time and memory proportional to the number of named (query block, key block) pairs, or those of the dense kernel where
that is predicted to be cheaper (short texts, patterns that name nearly everything).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from regard.engine import dense, flex, tiles, waves
from regard.engine.call import AttentionCall
from regard.engine.masks import CausalMask, FullMask, TensorMask, Window

Rule = Callable[[Tensor, Tensor], Tensor]
"""`rule(query, key)`: whether the query at a key slot sees the key at another; index tensors that broadcast."""


@dataclass(frozen=True, slots=True, eq=False)
class BlockSparseMask:
    """Key blocks that each query block sees.

    Blocks are those of the key slots, so that query `i` (key slot `offset + i`) lies in block `(offset + i) // size`, and the
    first and the last query block may be cut short.

    Attributes:
        blocks: `blocks[i]` `[count]` lists, ascending, the key blocks that the `i`-th query block sees.
        size: queries in a block.
        keys: key slots in all.
        causal: keys after the query inside a named block are hidden as well.
        offset: the key slot of query 0.
        rule: hides single keys inside the named blocks; None where a named block is seen whole.
        key_size: keys in a key block, `size` unless given; 1 lists single keys.
    """

    blocks: tuple[Int[Tensor, "_"], ...]
    size: int
    keys: int
    causal: bool = True
    offset: int = 0
    rule: Rule | None = None
    key_size: int = 0
    held: dict[Any, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if not self.key_size:
            object.__setattr__(self, "key_size", self.size)
        last = (self.keys - 1) // self.key_size
        for i, named in enumerate(self.blocks):
            if named.numel() == 0:
                raise ValueError(
                    f"query block {i} names no key block; every query must see at least one key"
                )
        if not self.blocks:
            return
        lowest = torch.stack([named[0] for named in self.blocks])
        highest = torch.stack([named[-1] for named in self.blocks])
        joined = torch.cat(self.blocks)
        counts = torch.tensor([len(named) for named in self.blocks], device=joined.device)
        rising = joined[1:] > joined[:-1]
        rising[counts.cumsum(0)[:-1] - 1] = True
        bad = ((lowest < 0) | (highest > last)).nonzero()
        if len(bad):
            i = int(bad[0])
            raise ValueError(
                f"query block {i} names key blocks {self.blocks[i].tolist()}, expected 0..{last}"
            )
        if not bool(rising.all()):
            at = int((~rising).nonzero()[0]) + 1
            i = int((counts.cumsum(0) <= at).sum())
            raise ValueError(
                f"query block {i} names key blocks {self.blocks[i].tolist()}, expected an ascending list without repeats"
            )
        if self.causal:
            first = torch.tensor([self.first_slot(i) for i in range(len(self.blocks))])
            late = (lowest.cpu() * self.key_size > first).nonzero()
            if len(late):
                i = int(late[0])
                raise ValueError(
                    f"query block {i} names only later key blocks {self.blocks[i].tolist()}, which a causal pattern hides; "
                    "every query must see at least one key"
                )

    def first_slot(self, block: int) -> int:
        """The key slot of the first query of a block."""
        return max(self.offset, (self.offset // self.size + block) * self.size)

    def rows(self, block: int, queries: int) -> slice:
        """The query rows of a block."""
        start = self.first_slot(block) - self.offset
        stop = (self.offset // self.size + block + 1) * self.size - self.offset
        return slice(start, min(stop, queries))

    def columns(self, block: int) -> Int[Tensor, "_"]:
        """The key slots of the blocks that one query block names, ascending."""
        named = self.blocks[block]
        if self.key_size == 1:
            return named
        inside = torch.arange(self.key_size, device=named.device)
        slots = (named[:, None] * self.key_size + inside).flatten()
        return slots[slots < self.keys]

    def visible(
        self, query: Int[Tensor, "*#rows"], key: Int[Tensor, "*#columns"]
    ) -> Bool[Tensor, "..."]:
        """Which keys of named blocks queries see, by their key slots."""
        seen = torch.ones(torch.broadcast_shapes(query.shape, key.shape), dtype=torch.bool)
        seen = seen.to(key.device)
        if self.causal:
            seen = key <= query
        if self.rule is not None:
            seen = seen & self.rule(query, key)
        return seen

    def window(self, rows: Tensor) -> Window:
        """The same pattern for the blockwise backend: exact, with the unnamed keys hidden."""
        visible = torch.zeros(len(rows), self.keys, dtype=torch.bool, device=rows.device)
        slots = rows + self.offset
        block_of = slots // self.size - self.offset // self.size
        for block in torch.unique(block_of).tolist():
            inside = (block_of == block).nonzero()
            columns = self.columns(block)[None, :]
            visible[inside, columns] = self.visible(slots[inside], columns)
        seen = visible.any(0).nonzero()
        if not len(seen):
            return Window(0, 1, 0, ~visible[None, None, :, :1], None, True)
        lo, hi = int(seen[0]), int(seen[-1]) + 1
        hidden = ~visible[:, lo:hi]
        return Window(lo, hi, lo, hidden[None, None], None, bool(hidden.all(-1).any()))

    def plan(self, queries: int) -> tiles.Plan:
        """The tiles that compute this pattern for a number of queries, made once."""
        key = ("plan", queries)
        if key not in self.held:
            self.held[key] = tiles.plan(self, queries)
        return self.held[key]


def attend(call: AttentionCall) -> Tensor:
    """Runs a call whose mask is a `BlockSparseMask`; returns `[batch, heads, queries, value_dim]`."""
    mask = call.mask
    if not isinstance(mask, BlockSparseMask):
        raise TypeError(f"block_sparse.attend needs a BlockSparseMask, got {type(mask).__name__}")
    expected = (mask.offset + call.queries - 1) // mask.size - mask.offset // mask.size + 1
    if len(mask.blocks) != expected:
        raise ValueError(
            f"the pattern names {len(mask.blocks)} query blocks, but {call.queries} queries make {expected}"
        )
    plan = mask.plan(call.queries)
    if plan.complete and mask.offset + call.queries <= call.keys:
        everything = CausalMask(call.keys, mask.offset) if mask.causal else FullMask(call.keys)
        return dense.attend(replace(call, mask=everything))
    if call.query.device.type == "cuda" and flex.can_attend(mask):
        return flex.attend(call, mask)
    if not waves.can_attend(call.query, call.key, call.value) or cheaper_dense(call, plan):
        return dense.attend(replace(call, mask=TensorMask(_additive(mask, call), call.keys)))
    return waves.attend(call.query, call.key, call.value, plan, call.scaling)


def cheaper_dense(call: AttentionCall, plan: tiles.Plan) -> bool:
    """Whether one masked call of the dense kernel is predicted to take less time than the tiles.

    Both make `4 dim` operations a pair at the kernel's rate; the dense call reads a mask, the tiles copy their keys and
    values and cost a few operator calls for each chunk and a little for each tile. The constants are seconds on one core;
    only their ratios matter.
    """
    batch, heads, queries, dim = call.query.shape
    rate, copied, called, each, masked = 4 * dim / 6e10, 0.5e-9, 1e-4, 5e-7, 1.05
    pairs = batch * heads * queries * call.keys
    chunks = waves.chunks(plan, batch * call.kv_heads, call.group, call.keys, dim)
    gathered = sum(len(c.blocks) * c.wave.unit * (c.units.stop - c.units.start) for c in chunks)
    items = batch * heads * sum(len(wave.rows) for wave in plan.waves)
    sparse = batch * heads * plan.pairs * rate + 2 * gathered * dim * copied
    sparse += called * len(chunks) + each * items
    return pairs * rate * masked < sparse


def _additive(mask: BlockSparseMask, call: AttentionCall) -> Tensor:
    """The whole pattern as a mask `[1, 1, queries, keys]`, for short texts; kept."""
    key = ("additive", call.queries, call.query.dtype)
    if key not in mask.held:
        rows = torch.arange(call.queries)
        window = mask.window(rows)
        hidden = torch.ones(1, 1, call.queries, call.keys, dtype=torch.bool)
        seen = window.visible(call.queries, rows.device)
        hidden[..., window.lo : window.hi] = False if seen is None else ~seen
        lowest = torch.finfo(call.query.dtype).min
        mask.held[key] = torch.zeros(hidden.shape, dtype=call.query.dtype).masked_fill_(
            hidden, lowest
        )
    return mask.held[key].to(call.query.device)


def from_lists(
    lists: Sequence[Sequence[int]], size: int, keys: int, **rest: Any
) -> BlockSparseMask:
    """A mask from plain lists, sorted and freed of repeats."""
    blocks = tuple(torch.tensor(sorted(set(named)), dtype=torch.long) for named in lists)
    return BlockSparseMask(blocks, size, keys, **rest)
