"""Shifted sparse attention: train with attention in groups, half of the heads shifted, then run the model with full attention.

Source: S2-Attn of LongLoRA (arXiv 2309.12307); SF-Attn of SinkLoRA (arXiv 2406.05678). The sequence is cut into groups of g
tokens (a quarter of it). In S2-Attn the second half of the heads uses groups that begin half a group later, so that
information crosses the borders. SF-Attn puts a part of these heads back in place ("segmentation and reassembly": with
restore = 1/2, three quarters of the heads are fixed and one quarter is shifted) and lets every query see the first 4 tokens:

    visible(t, k) = grouped(t, k)  or  (k < sinks and k <= t).

| | fixed heads | shifted heads | sinks |
|---|---|---|---|
| `S2Attention()` | 1/2 | 1/2 | none |
| `SFAttention()` | 3/4 | 1/4 | 4 |
| `SFAttention(restore=0)` | 1/2 | 1/2 | 4 |
| `SFAttention(sinks=0)` | 3/4 | 1/4 | none |
| `SFAttention(restore=1, sinks=0)` | all: block-local attention | none | none |

The paper prints the restoring algorithm as an image and a symmetric mask; which heads are restored, and that a causal model keeps
`k <= t` for the sinks, is our reading. `leak` is LongLoRA's rolling, in which the first half group of the shifted heads sees the
last one: the future. `leak=False` cuts that group in two.

Groups and sinks are counted from the first real token of a row, so that a row behaves alone as it does in a padded batch.
Heads that share a KV head stay grouped in memory.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from regard._errors import InputError
from regard.engine import (
    AttentionCall,
    CausalMask,
    DeferredMask,
    FullMask,
    Mask,
    Method,
    blockwise,
    dense,
)
from regard.engine.masks import Window
from regard.ops.grouped_attention import check_group, group_visible, grouped_attention


@dataclass(frozen=True, slots=True)
class GroupedMask:
    """Which keys grouped attention shows to each head, within what the model's own mask shows.

    Attributes:
        own: the mask of the model.
        tokens: length of the sequence.
        size: tokens in a group.
        heads: query heads, of which the last `shifted` are shifted.
        offset: the key slot of query 0.
        starts: `[batch]`, the slot of each row's first real token; None where all start at 0.
    """

    own: Mask
    tokens: int
    size: int
    heads: int
    shifted: int
    sinks: int
    leak: bool
    offset: int = 0
    starts: Int[Tensor, "batch"] | None = None

    def visible(
        self, queries: Int[Tensor, "rows"], keys: Int[Tensor, "keys"]
    ) -> Bool[Tensor, "batch heads rows keys"]:
        """The pattern alone, for query and key slots; batch is 1 without `starts`."""
        starts = queries.new_zeros(1) if self.starts is None else self.starts
        rows = (queries[None, :] - starts[:, None])[:, None, :, None]
        columns = (keys[None, :] - starts[:, None])[:, None, None, :]
        counts = {False: self.heads - self.shifted, True: self.shifted}
        parts = [
            group_visible(
                rows,
                columns,
                self.tokens,
                self.size,
                shifted=shifted,
                sinks=self.sinks,
                leak=self.leak,
            ).expand(-1, count, -1, -1)
            for shifted, count in counts.items()
        ]
        return torch.cat(parts, 1) & (columns >= 0)

    def window(self, rows: Int[Tensor, "rows"]) -> Window:
        own = self.own.window(rows)
        keys = torch.arange(own.lo, own.hi, device=rows.device)
        visible = self.visible(rows + self.offset, keys)
        shown = own.visible(len(rows), rows.device)
        visible = visible if shown is None else visible & shown
        dead = bool((~visible.any(-1)).any())
        return Window(own.lo, own.hi, own.lo, ~visible, own.additive, dead)


@dataclass(frozen=True, slots=True)
class _Valid:
    """Every key that is not padding."""

    valid: Bool[Tensor, "batch keys"]

    def window(self, rows: Tensor) -> Window:
        hidden = ~self.valid[:, None, None, :].expand(-1, 1, len(rows), -1)
        return Window(0, self.valid.shape[1], 0, hidden, None, bool((~self.valid.any(-1)).any()))


class GroupedAttention(Method):
    """Base of S2-Attn and SF-Attn: which heads are shifted, how long a group is, and how it is computed.

    Causal self-attention is grouped; cross-attention, and the encoders beside a decoder, are left as they are. Keys of a cache
    are grouped by position as well, but dense; share-sized groups then grow with the sequence. A model with masks of its own
    (sliding windows, packed sequences), soft-capping or learned sinks runs block by block, within these masks.

    Cost: time O(tokens x group) instead of O(tokens^2) for each head, memory O(tokens).
    """

    def __init__(
        self, group: float | int, *, restore: float | int = 0.0, sinks: int = 0, leak: bool = True
    ) -> None:
        if isinstance(group, bool) or not (
            group >= 2 if isinstance(group, int) else 0 < group <= 1
        ):
            raise InputError.of(
                "group", given=group, expected="a share in (0.0, 1.0] or at least 2 tokens"
            )
        if not 0 <= restore <= 1:
            raise InputError.of(
                "restore", given=restore, expected="a share of the shifted heads in [0, 1]"
            )
        if sinks < 0:
            raise InputError.of("sinks", given=sinks, expected="a number of tokens, 0 or more")
        if isinstance(group, int):
            check_group(group, sinks)
        self.group = group
        self.restore = float(restore)
        self.sinks = sinks
        self.leak = leak

    def size(self, tokens: int) -> int:
        """Tokens in a group of a sequence of `tokens`: an even number, at least 2."""
        if isinstance(self.group, int):
            return self.group
        return max(2, int(tokens * self.group) // 2 * 2)

    def shifted(self, heads: int) -> int:
        """How many of a layer's query heads are shifted: the last ones."""
        second = heads - heads // 2
        return second - int(second * self.restore)

    def before(self, call: AttentionCall) -> AttentionCall | None:
        site = call.site
        if site.kind == "cross" or (not site.causal and site.stack):
            return None
        if not site.causal:
            raise InputError(
                f"{type(self).__name__} groups causal self-attention, but queries of {site.name or site} see later tokens; "
                "attach it to a decoder"
            )
        size, shifted = self.size(call.keys), self.shifted(call.heads)
        if size < call.keys:
            check_group(size, self.sinks)
        starts, adjacent = _starts(call)
        plain, own = _only_causal(call), call.mask
        if self.leak and shifted and size < call.keys:
            if not plain:
                raise InputError(
                    f"leak=True lets {site.name or site} see later tokens, but its mask hides more than those (a window, a "
                    "chunk or another sequence); use leak=False"
                )
            own = FullMask(call.keys) if call.key_valid is None else _Valid(call.key_valid)
        mask = GroupedMask(
            own,
            call.keys,
            size,
            call.heads,
            shifted,
            self.sinks,
            self.leak,
            call.query_offset,
            starts,
        )
        whole = call.query_offset == 0 and call.queries == call.keys
        fast = plain and adjacent and whole and dense.can_attend(call)
        return replace(call, mask=mask, fused=_grouped if fast else _blockwise)


class S2Attention(GroupedAttention):
    """Shifted sparse attention (LongLoRA, arXiv 2309.12307): half of the heads in groups, half in groups shifted by half a group.

    Args:
        group: tokens in a group: a share of the sequence, or their number (even).
        leak: as released, the first half group of shifted heads sees the end of the sequence; False cuts it off.

    `with regard.attach(model, S2Attention()): ...` around the forward pass of a training step; gradients flow through it.

    >>> S2Attention().shifted(9), S2Attention().size(1000)
    (5, 250)
    """

    def __init__(self, group: float | int = 0.25, *, leak: bool = True) -> None:
        super().__init__(group, leak=leak)


class SFAttention(GroupedAttention):
    """Sink fixed attention (SinkLoRA, arXiv 2406.05678): S2-Attn with a part of the shifted heads put back, and sink tokens.

    Args:
        group: tokens in a group: a share of the sequence, or their number (even).
        restore: which share of the second half of the heads goes back to the fixed groups. 0 shifts as S2-Attn does, 1 leaves
            block-local attention.
        sinks: how many first tokens every query sees; at most half a group.
        leak: as in `S2Attention`.

    >>> SFAttention().shifted(8), SFAttention(restore=1).shifted(8)
    (2, 0)
    """

    def __init__(
        self,
        group: float | int = 0.25,
        *,
        restore: float | int = 0.5,
        sinks: int = 4,
        leak: bool = True,
    ) -> None:
        super().__init__(group, restore=restore, sinks=sinks, leak=leak)


def _grouped(call: AttentionCall) -> Tensor:
    """The call on the fused kernel, one group a batch row. Left padding is moved behind the tokens and back."""
    mask = call.mask
    if not (isinstance(mask, GroupedMask) and dense.can_attend(call)):
        return _blockwise(call)  # a method attached later narrowed the mask or put a bias in
    query, key, value = call.query, call.key, call.value
    valid = call.key_valid
    order = None
    if mask.starts is not None:
        slots = torch.arange(call.keys, device=call.query.device)
        order = (slots[None, :] + mask.starts[:, None]) % call.keys
        query, key, value = (_reorder(x, order) for x in (query, key, value))
        valid = None if valid is None else valid.gather(1, order)
    output = grouped_attention(
        query,
        key,
        value,
        mask.size,
        shifted=mask.shifted,
        sinks=mask.sinks,
        leak=mask.leak,
        valid=valid,
        scaling=call.scaling,
        dropout=call.dropout,
    )
    return output if order is None else _reorder(output, order.argsort(1))


def _reorder(states: Tensor, order: Tensor) -> Tensor:
    return states.gather(2, order[:, None, :, None].expand_as(states))


def _blockwise(call: AttentionCall) -> Tensor:
    output = blockwise.attend(call, (), ())
    assert output is not None
    return output


def _starts(call: AttentionCall) -> tuple[Tensor | None, bool]:
    """The slot of each row's first real token (None where all are 0), and whether the real tokens of each row are adjacent."""
    valid = call.key_valid
    if valid is None or bool(valid.all()):
        return None, True
    starts = valid.to(torch.uint8).argmax(1)
    slots = torch.arange(valid.shape[1], device=valid.device)[None, :]
    between = (slots >= starts[:, None]) & (slots < (starts + valid.sum(1))[:, None])
    return (starts if bool(starts.any()) else None), torch.equal(valid, between)


def _only_causal(call: AttentionCall) -> bool:
    """Whether the model's mask is causality and padding, nothing else: the last row then sees every real key.

    Windows, chunks and packed sequences hide keys from the last row.
    """
    mask = call.mask
    if isinstance(mask, CausalMask):
        return mask.offset == call.query_offset
    if isinstance(mask, FullMask):
        return call.queries == 1
    if not isinstance(mask, DeferredMask):
        return False
    if mask.causal:
        return True
    last = torch.tensor([call.queries - 1], device=call.query.device)
    seen = mask.block(last)[:, 0, 0]
    return torch.equal(seen, call.key_valid) if call.key_valid is not None else bool(seen.all())
