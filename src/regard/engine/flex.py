"""FlexAttention from block lists: the path of block-sparse patterns on accelerators.

`create_block_mask` evaluates a mask function for every pair of tokens; here the block lists are handed over as they are, blocks
that are seen whole apart from those masked inside. Compiled once for each shape on a device that `torch.compile` serves.

Cost: building, O(query blocks x key blocks) numbers; running, the kernel's.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from regard.engine.call import AttentionCall

if TYPE_CHECKING:
    from regard.engine.block_sparse import BlockSparseMask


def can_attend(mask: BlockSparseMask) -> bool:
    """Whether the blocks are ones that FlexAttention has: square, with query blocks that begin where key blocks do."""
    return mask.key_size == mask.size and mask.offset % mask.size == 0


def block_mask(mask: BlockSparseMask, queries: int, device: torch.device) -> BlockMask:
    """The pattern as FlexAttention's `BlockMask`, the same for all rows and heads; kept on the mask."""
    key = ("flex", queries, device)
    if key in mask.held:
        return mask.held[key]
    count = -(-mask.keys // mask.size)
    whole: list[list[int]] = []
    partial: list[list[int]] = []
    for block, named in enumerate(mask.blocks):
        listed, rows = named.tolist(), mask.rows(block, queries)
        first, last = rows.start + mask.offset, rows.stop - 1 + mask.offset
        query = torch.arange(first, last + 1)[:, None]
        inside = []
        for k in listed:
            slots = torch.arange(k * mask.size, min((k + 1) * mask.size, mask.keys))
            short = len(slots) < mask.size or len(query) < mask.size
            plain = mask.rule is None and (not mask.causal or int(slots[-1]) <= first)
            if short or not (plain or bool(mask.visible(query, slots[None, :]).all())):
                inside.append(k)
        partial.append(inside)
        whole.append([k for k in listed if k not in inside])

    def index(lists: list[list[int]]) -> tuple[Tensor, Tensor]:
        padded = torch.zeros(len(lists), count, dtype=torch.int32)
        for i, named in enumerate(lists):
            padded[i, : len(named)] = torch.tensor(named, dtype=torch.int32)
        sizes = torch.tensor([len(named) for named in lists], dtype=torch.int32)
        return sizes[None, None].to(device), padded[None, None].to(device)

    named = torch.zeros(len(mask.blocks), count, dtype=torch.bool, device=device)
    for block, listed in enumerate(mask.blocks):
        named[block, listed.to(device)] = True

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = named[query // mask.size, key // mask.size]
        query = query + mask.offset
        if mask.causal:
            seen = seen & (key <= query)
        return seen if mask.rule is None else seen & mask.rule(query, key)

    found = BlockMask.from_kv_blocks(
        *index(partial),
        *index(whole),
        BLOCK_SIZE=mask.size,
        mask_mod=visible,
        seq_lengths=(queries, mask.keys),
    )
    mask.held[key] = found
    return found


def attend(call: AttentionCall, mask: BlockSparseMask) -> Tensor:
    """`[batch, heads, queries, value_dim]` by the compiled kernel."""
    output: Any = _compiled()(
        call.query,
        call.key,
        call.value,
        block_mask=block_mask(mask, call.queries, call.query.device),
        scale=call.scaling,
        enable_gqa=call.group > 1,
    )
    return output


@functools.cache
def _compiled() -> Any:
    return torch.compile(flex_attention, dynamic=False)
