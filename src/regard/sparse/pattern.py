"""What every sparse pattern is: for each block of queries, the key blocks it sees.

A pattern is written as one function of block numbers, `blocks(query, count)`; the base makes the mask of a call from it, for
prefill and decode, grouped heads, chosen layers and heads, and padded batches. Three more hooks serve richer patterns:

* `visible(query, key)` hides single keys inside the named blocks (an exact token window, sink tokens);
* `of_head(head, heads)` gives a head a pattern of its own (shifted groups);
* `choose(call)` makes the mask from the call's own queries and keys (top-k blocks); set `static = False`.

    with regard.attach(model, Power(block=64)):
        model.generate(...)

Positions are counted from a row's first real token: a padded row attends as the same row alone. Where a model's own mask
hides more than causality does (sliding-window layers, packed texts), a key must be visible in both.

Cost: that of the named block pairs; the lists are made once for each shape.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from regard._errors import AttachError, InputError
from regard.engine import AttentionCall, BlockSparseMask, CausalMask, Mask, Method
from regard.engine.split import Both, Part, Span, SplitMask, join_heads, sub_calls, valid_rows

Heads = frozenset[int] | None
HELD = 64
"""Masks a pattern remembers (one for each shape; decoding meets a new shape at every step)."""


class Pattern(Method):
    """Base of the patterns; write `blocks(query, count)`.

    Args:
        block: tokens in a block.
        layers: the layers it is attached to (numbers, or a function of the layer's number); None for all. The others stay
            dense, which makes a hybrid model.
        heads: the query heads it is attached to (numbers, or a mapping from layer to numbers); None for all.
        dense_below: calls with fewer keys than this attend densely. The default, 0, follows the pattern at any length, as a
            model trained under it needs; a model that was not loses by it and, under about 2,000 tokens, gains no time.
    """

    static = True
    """Whether the mask follows from the shape alone; if not, `choose` is called with each row of a batch by itself."""

    def __init__(
        self,
        *,
        block: int = 128,
        layers: Iterable[int] | Callable[[int], bool] | None = None,
        heads: Iterable[int] | dict[int, Iterable[int]] | None = None,
        dense_below: int = 0,
    ) -> None:
        if block < 1:
            raise InputError.of("block", given=block, expected="a number of tokens, 1 or more")
        if dense_below < 0:
            raise InputError.of("dense_below", given=dense_below, expected="a number of keys")
        self.block, self.dense_below = block, dense_below
        self.layers = layers if callable(layers) or layers is None else frozenset(layers)
        self.heads_of: dict[int, Iterable[int]] | Heads = (
            heads if isinstance(heads, dict) or heads is None else frozenset(heads)
        )
        self._masks: dict[Any, Mask] = {}

    def blocks(self, query: int, count: int) -> Iterable[int]:
        """Numbers of the key blocks that query block `query` sees, of `count` there are; later ones than `query` are left out."""
        raise NotImplementedError(f"{type(self).__name__} must define blocks(query, count)")

    def visible(
        self, query: Int[Tensor, "*rows"], key: Int[Tensor, "*columns"]
    ) -> Bool[Tensor, "..."] | None:
        """Which keys inside the named blocks are seen, by positions that broadcast; None where blocks are seen whole."""
        return None

    def of_head(self, head: int, heads: int) -> Pattern:
        """The pattern of one query head of `heads`; the same for all unless overridden."""
        return self

    def choose(self, call: AttentionCall) -> Mask:
        """The mask of a call without padding, whose last query is its last key."""
        return self.mask(call.queries, call.keys, call.heads)

    def mask(self, queries: int, keys: int, heads: int = 1) -> Mask:
        """The mask of the last `queries` of `keys` tokens; a `SplitMask` where heads differ."""
        key = (queries, keys, heads)
        if key not in self._masks:
            if len(self._masks) >= HELD:
                self._masks.pop(next(iter(self._masks)))
            kinds: dict[int, tuple[Pattern, list[int]]] = {}
            for head in range(heads):
                pattern = self.of_head(head, heads)
                kinds.setdefault(id(pattern), (pattern, []))[1].append(head)
            masks = [
                (pattern.one(queries, keys), tuple(chosen)) for pattern, chosen in kinds.values()
            ]
            self._masks[key] = join_heads(masks, queries, keys, heads)
        return self._masks[key]

    def lists(self, queries: int, keys: int) -> list[list[int]]:
        """The key blocks of every query block of the last `queries` of `keys` tokens, ascending."""
        count = -(-keys // self.block)
        first, last = (keys - queries) // self.block, (keys - 1) // self.block
        return [
            sorted({k for k in self.blocks(q, count) if 0 <= k <= q})
            for q in range(first, last + 1)
        ]

    def one(self, queries: int, keys: int) -> BlockSparseMask:
        """The mask of this pattern alone, without those of single heads."""
        named = tuple(torch.tensor(blocks) for blocks in self.lists(queries, keys))
        probe = torch.zeros(1, dtype=torch.long)
        rule: Any = None if self.visible(probe, probe) is None else self.visible
        return BlockSparseMask(named, self.block, keys, offset=keys - queries, rule=rule)

    def applies(self, layer: int) -> bool:
        """Whether a layer follows the pattern."""
        if self.layers is None:
            return True
        return bool(self.layers(layer)) if callable(self.layers) else layer in self.layers

    def before(self, call: AttentionCall) -> AttentionCall | None:
        if call.site.kind == "cross" or not self.applies(call.site.layer):
            return None
        if call.keys < self.dense_below:
            return None
        heads = self._chosen_heads(call)
        if heads is not None and not heads:
            return None
        if not call.site.causal:
            raise AttachError(
                f"{type(self).__name__} is a causal pattern, but {call.site} attends in both directions; "
                "leave the layer out with layers="
            )
        spans = valid_rows(call)
        if spans is None:  # the model hides more than causality and padding do
            stop = call.query_offset + call.queries
            pattern = self._of_spans(call, [(None, 0, stop)], heads)
            return replace(call, mask=Both(call.mask, pattern, call.keys))
        return replace(call, mask=self._of_spans(call, spans, heads))

    def _of_spans(self, call: AttentionCall, spans: list[Span], heads: Heads) -> Mask:
        """The mask of a batch whose rows hold these key slots; every row is treated as if it were alone."""
        if not self.static:
            every = range(call.query.shape[0])
            spans = [((row,), start, stop) for rows, start, stop in spans for row in rows or every]
        parts = []
        for rows, start, stop in spans:
            first = max(start - call.query_offset, 0)
            last = min(stop - call.query_offset, call.queries)
            if last > first:
                part = Part(call.mask, rows, None, first, last, start, stop)
                alone = sub_calls(call, part)[0][0]
                parts.append(replace(part, mask=self._of_heads(alone, heads)))
        shape = (call.query.shape[0], call.heads, call.queries, call.keys)
        if len(parts) == 1 and parts[0].covers(shape):
            return parts[0].mask
        return SplitMask(shape, tuple(parts))

    def _of_heads(self, call: AttentionCall, heads: Heads) -> Mask:
        """The mask of a call without padding; heads that do not follow the pattern stay dense."""
        mask = self.choose(call)
        if heads is None:
            return mask
        others = tuple(head for head in range(call.heads) if head not in heads)
        dense = CausalMask(call.keys, call.keys - call.queries)
        return join_heads(
            [(mask, tuple(sorted(heads))), (dense, others)], call.queries, call.keys, call.heads
        )

    def _chosen_heads(self, call: AttentionCall) -> Heads:
        heads = self.heads_of
        if isinstance(heads, dict):
            heads = frozenset(heads.get(call.site.layer, ()))
        for head in heads or ():
            if not 0 <= head < call.heads:
                raise InputError.of(
                    f"heads of {call.site}", given=head, expected=f"0..{call.heads - 1}"
                )
        return heads
