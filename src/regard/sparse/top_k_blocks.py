"""Top-k blocks: each block of queries keeps the key blocks whose mean key fits its mean query best.

    score(q, k) = mean of the queries of block q (over the group of query heads, too) . mean of the keys of block k

for each KV head, over the earlier blocks; the `window` newest and the first `sinks` blocks are kept whatever they score, and
the `count` best of the others. The baseline of block-sparse prefill (mean pooling, as in NSA, MoBA and MInference's block
patterns).

Cost: O(N dim) for the means, O((N / block)^2) scores a KV head, then the named pairs.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from regard._errors import InputError
from regard.engine import AttentionCall, BlockSparseMask, Mask
from regard.engine.masks import CausalMask
from regard.engine.split import join_heads
from regard.sparse.pattern import Pattern
from regard.sparse.sliding import check_window


class TopKBlocks(Pattern):
    """The `count` best earlier blocks by mean query and mean key, beside `window` recent and `sinks` first blocks."""

    static = False

    def __init__(
        self, *, count: int = 8, window: int = 2, sinks: int = 1, block: int = 128, **where: Any
    ) -> None:
        super().__init__(block=block, **where)
        if count < 0:
            raise InputError.of("count", given=count, expected="a number of blocks, 0 or more")
        self.count = count
        self.window, self.sinks = check_window(window, sinks)

    def choose(self, call: AttentionCall) -> Mask:
        offset = call.keys - call.queries
        if -(-call.keys // self.block) <= self.count + self.window:  # nothing would be left out
            return CausalMask(call.keys, offset)
        query, key = call.query[0].detach(), call.key[0].detach()
        chosen = top_blocks(
            block_means(
                query.unflatten(0, (call.kv_heads, call.group)).mean(1), self.block, offset
            ),
            block_means(key, self.block),
            count=self.count,
            window=self.window,
            sinks=self.sinks,
        )
        masks = []
        for group, named in enumerate(chosen):
            lists = tuple(named.nonzero()[:, 1].split(named.sum(1).tolist()))
            mask = BlockSparseMask(lists, self.block, call.keys, offset=offset)
            heads = tuple(range(group * call.group, (group + 1) * call.group))
            masks.append((mask, heads))
        return join_heads(masks, call.queries, call.keys, call.heads)


def block_means(
    tensor: Float[Tensor, "heads tokens dim"], block: int, offset: int = 0
) -> Float[Tensor, "heads blocks dim"]:
    """The mean of each block of tokens, the first of which is token `offset`; the ends may be cut short."""
    place = (torch.arange(tensor.shape[1], device=tensor.device) + offset) // block
    place = place - offset // block
    count = int(place[-1]) + 1
    sums = tensor.new_zeros(len(tensor), count, tensor.shape[2]).index_add_(1, place, tensor)
    sizes = torch.bincount(place, minlength=count).to(tensor.dtype)
    return sums / sizes[:, None]


def top_blocks(
    query: Float[Tensor, "heads query_blocks dim"],
    key: Float[Tensor, "heads key_blocks dim"],
    *,
    count: int,
    window: int,
    sinks: int,
) -> Bool[Tensor, "heads query_blocks key_blocks"]:
    """Which key blocks each query block sees; the last query block belongs to the last key block."""
    scores = query @ key.transpose(-1, -2)
    last = key.shape[1] - query.shape[1]
    q = torch.arange(query.shape[1], device=query.device)[:, None] + last
    k = torch.arange(key.shape[1], device=query.device)[None, :]
    always = (k <= q) & ((q - k < window) | (k < sinks))
    scores = scores.masked_fill(always | (k > q), float("-inf"))
    best = scores.topk(min(count, key.shape[1]), -1)
    found = torch.zeros(scores.shape, dtype=torch.bool, device=query.device)
    found.scatter_(-1, best.indices, best.values > float("-inf"))
    return found | always
