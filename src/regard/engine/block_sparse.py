"""Attention over named key blocks only.

A pattern lists, for every block of queries (and head, if it likes), the key blocks it may see; nothing else is computed.
Contiguous runs are read as views, others are gathered; the block on the diagonal is masked causally inside.

Cost: time and memory proportional to the number of named (query block, key block) pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from regard.engine.call import AttentionCall
from regard.engine.masks import Window


@dataclass(frozen=True, slots=True)
class BlockSparseMask:
    """Key blocks that each query block sees.

    `blocks[i]` `[count]` lists, ascending, the key blocks of query block `i`; all blocks have `size` tokens (the last may be
    shorter). When `causal`, keys after the query inside a named block are hidden as well.
    """

    blocks: tuple[Int[Tensor, "_"], ...]
    size: int
    keys: int
    causal: bool = True
    offset: int = 0

    def __post_init__(self) -> None:
        last = (self.keys - 1) // self.size
        for i, named in enumerate(self.blocks):
            if named.numel() == 0:
                raise ValueError(
                    f"query block {i} names no key block; every query must see at least one key"
                )
            if int(named.min()) < 0 or int(named.max()) > last:
                raise ValueError(
                    f"query block {i} names key blocks {named.tolist()}, expected 0..{last}"
                )
            if self.causal and int(named.min()) * self.size > i * self.size + self.offset:
                raise ValueError(
                    f"query block {i} names only later key blocks {named.tolist()}, which a causal pattern hides; "
                    "every query must see at least one key"
                )

    def columns(self, block: int) -> Tensor:
        """The key slots of one query block, ascending."""
        named = self.blocks[block]
        slots = (
            named[:, None] * self.size + torch.arange(self.size, device=named.device)
        ).flatten()
        return slots[slots < self.keys]

    def window(self, rows: Tensor) -> Window:
        """The same pattern for the blockwise backend: exact, with the unnamed keys hidden."""
        visible = torch.zeros(len(rows), self.keys, dtype=torch.bool, device=rows.device)
        for block in torch.unique(rows // self.size).tolist():
            inside = (rows // self.size) == block
            visible[inside.nonzero(), self.columns(block)[None, :]] = True
        if self.causal:
            visible &= (
                torch.arange(self.keys, device=rows.device)[None, :]
                <= (rows + self.offset)[:, None]
            )
        lo, hi = int(visible.any(0).nonzero()[0]), int(visible.any(0).nonzero()[-1]) + 1
        hidden = ~visible[:, lo:hi]
        return Window(lo, hi, lo, hidden[None, None], None, bool(hidden.all(-1).any()))


def attend(call: AttentionCall) -> Tensor:
    """Runs a call whose mask is a `BlockSparseMask`; returns `[batch, heads, queries, value_dim]`."""
    mask = call.mask
    if not isinstance(mask, BlockSparseMask):
        raise TypeError(f"block_sparse.attend needs a BlockSparseMask, got {type(mask).__name__}")
    batch, heads, queries, dim = call.query.shape
    groups, group = call.kv_heads, call.group
    expected = -(-queries // mask.size)
    if len(mask.blocks) != expected:
        raise ValueError(
            f"the pattern names {len(mask.blocks)} query blocks, but {queries} queries make {expected}"
        )
    output = torch.empty(
        batch,
        groups,
        group,
        queries,
        call.value.shape[-1],
        dtype=call.query.dtype,
        device=call.query.device,
    )
    for block in range(expected):
        rows = slice(block * mask.size, min((block + 1) * mask.size, queries))
        columns = mask.columns(block)
        contiguous = int(columns[-1]) - int(columns[0]) + 1 == len(columns)
        picked = slice(int(columns[0]), int(columns[-1]) + 1) if contiguous else columns
        key, value = call.key[:, :, picked], call.value[:, :, picked]
        count = rows.stop - rows.start
        query = call.query[:, :, rows].reshape(batch, groups, group * count, dim)
        hidden = None
        if mask.causal:
            position = torch.arange(rows.start, rows.stop, device=columns.device) + mask.offset
            seen = columns[None, :] <= position[:, None]
            hidden = None if bool(seen.all()) else seen.repeat(group, 1)
        mixed = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=hidden, scale=call.scaling
        )
        output[..., rows, :] = mixed.view(batch, groups, group, count, -1)
    return output.view(batch, heads, queries, -1)
