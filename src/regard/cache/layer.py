"""One layer of a cache: what is held, where it stood in the text, and what the scorer knows of it.

A layer distinguishes the tokens *seen* (`seen`, padding included: positions and masks are made from it) from the slots
*held*. Every held slot knows its position, the column of its token in the input as it was given.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from regard._errors import InputError
from regard.cache.store import Ragged


class Layer(CacheLayerMixin):
    """What one attention layer holds.

    Held slots are in the order of the text and aligned at the end: `[..., -1]` is the newest of every KV head. Where heads hold
    different numbers, the rectangular tensors below are copies whose first slots are padding (`valid` False, position -1);
    where they hold the same number, they are views of the memory itself.

    Attributes:
        index: the layer's number in the model.
        keys: `[batch, kv_heads, held, dim]`, after position embedding.
        values: `[batch, kv_heads, held, value_dim]`.
        positions: `[batch, kv_heads, held]`.
        valid: `[batch, kv_heads, held]`, False where a slot holds nothing. During a call with padding (in `Scorer.watch`), also
            False at its padding tokens; these are dropped when the call is over.
        lengths: `[batch, kv_heads]`, slots held.
        slots: the scorer's statistics by name, `[batch, kv_heads, held]`; assign to write: `layer.slots["mass"] += received`.
        memory: the scorer's other tensors by name, each with the batch as its first dimension.
        seen: tokens seen, padding included.
        real: `[batch]`, tokens seen without padding.
        sliding_window: the reach of a sliding-window layer, else None.
    """

    is_compileable = False

    def __init__(
        self,
        index: int,
        store: Any = None,
        slots: Mapping[str, float] | None = None,
        sliding_window: int | None = None,
        evicts: bool = False,
    ) -> None:
        self.index = index
        self.store = store or Ragged()
        self.fills = dict(slots or {})
        self.sliding_window = sliding_window
        self.is_sliding = sliding_window is not None
        self.evicts = evicts
        self.record_past = False
        self._forget()

    def _forget(self) -> None:
        self.rows: Any = None
        self.memory: dict[str, Tensor] = {}
        self.seen = 0
        self.steps = 0
        self.real = torch.zeros(0, dtype=torch.long)
        self.contiguous = True
        self._fresh = 0
        self._padding: Tensor | None = None

    def __repr__(self) -> str:
        kind = f", window {self.sliding_window}" if self.is_sliding else ""
        held = 0 if self.rows is None else self.rows.held
        return f"Layer({self.index}, {held} held of {self.seen} seen{kind})"

    # what is held

    @property
    def slots(self) -> Slots:
        return Slots(self)

    @property
    def is_initialized(self) -> bool:
        return self.rows is not None

    @property
    def keys(self) -> Float[Tensor, "batch kv_heads held dim"] | None:  # type: ignore[override]
        return None if self.rows is None else self.rows.column("key")

    @property
    def values(self) -> Float[Tensor, "batch kv_heads held value_dim"] | None:  # type: ignore[override]
        return None if self.rows is None else self.rows.column("value")

    @property
    def positions(self) -> Int[Tensor, "batch kv_heads held"]:
        if not self.contiguous:
            self.complete()
            found = self.rows.column("position")
            return found if self.rows.equal else found.masked_fill(~self.rows.filled, -1)
        held = torch.arange(self.seen - self.rows.held, self.seen, dtype=torch.int32)
        return held.to(self.device).expand(self.rows.batch, self.rows.heads, -1)

    @property
    def valid(self) -> Bool[Tensor, "batch kv_heads held"]:
        filled = self.rows.filled
        if self._padding is not None:
            filled = filled.clone()
            count = self._padding.shape[1]
            filled[..., -count:] &= self._padding[:, None]
        return filled

    @property
    def lengths(self) -> Int[Tensor, "batch kv_heads"]:
        return self.rows.lengths

    @property
    def nbytes(self) -> int:
        """Bytes of everything the layer holds, free slots of growing buffers included."""
        extra = sum(tensor.nbytes for tensor in self.memory.values())
        return extra + (0 if self.rows is None else self.rows.nbytes)

    @property
    def slot_bytes(self) -> int:
        """Bytes of one held slot of one KV head."""
        return self.rows.pair_bytes + 4 + 4 * len(self.fills)

    # growing and shrinking

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.begin(key_states.shape[0], key_states.shape[1], key_states)

    def begin(self, batch: int, heads: int, like: Tensor) -> None:
        """An empty table for so many rows and KV heads, with the device and dtype of `like`."""
        self.device, self.dtype = like.device, like.dtype
        self.rows = self.store.rows(batch, heads, spare=not self.evicts)
        self.real = torch.zeros(batch, dtype=torch.long)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **rest: Any
    ) -> tuple[Tensor, Tensor]:
        """Adds new tokens; returns keys and values as far as the model may look at them.

        While nothing has been dropped these are what is held. Afterwards they are stand-ins with the logical shape, no memory
        and NaN for every number: regard's attention function puts the held ones in their place, anything else shows.
        """
        if self.rows is None:
            Layer.lazy_initialization(self, key_states, value_states)
        assert self.rows is not None
        batch, heads, tokens, _ = key_states.shape
        if (batch, heads) != (self.rows.batch, self.rows.heads):
            raise InputError(
                f"the cache holds {self.rows.batch} rows with {self.rows.heads} KV heads in layer {self.index}, got keys for "
                f"{batch} rows with {heads}; use one cache for one batch (cache.branch() copies it)"
            )
        new = {"key": key_states.detach(), "value": value_states.detach()}
        self.rows.append(**new)
        self._fresh += tokens
        self.seen += tokens
        if self.contiguous:
            return self.rows.column("key"), self.rows.column("value")
        nothing = torch.full((1, 1, 1, 1), torch.nan, dtype=key_states.dtype, device=self.device)
        shape = (batch, heads, self.seen)
        return (
            nothing.expand(*shape, key_states.shape[-1]),
            nothing.expand(*shape, value_states.shape[-1]),
        )

    def complete(self) -> None:
        """Writes positions and starting statistics of the tokens that came since the last time."""
        rows, new = self.rows, min(self._fresh, self.rows.held)
        if not new:
            return
        self._fresh = 0
        shape = (rows.batch, rows.heads, new)
        if not self.contiguous:
            now = torch.arange(self.seen - new, self.seen, dtype=torch.int32, device=self.device)
            rows.write_newest("position", now.expand(shape))
        for name, fill in self.fills.items():
            if name not in rows.columns:
                shape = (rows.batch, rows.heads, rows.held)
            values = torch.full((1, 1, 1), fill, device=self.device).expand(shape)
            if name in rows.columns:
                rows.write_newest(name, values)
            else:
                rows.add_column(name, values)

    def settle(self, valid: Bool[Tensor, "batch new"] | None, new: int) -> None:
        """Ends a call: counts its real tokens and drops its padding, and what a sliding window has left behind."""
        self._padding = None
        if valid is None:
            self.real = self.real + new
        else:
            self.real = self.real + valid.sum(-1).cpu()
            kept = self.rows.filled.clone()
            kept[..., -new:] &= valid[:, None]
            self.keep(kept)
        if self.sliding_window is not None and not self.record_past:
            self._slide(self.sliding_window - 1)

    def mark_padding(self, valid: Bool[Tensor, "batch new"] | None) -> None:
        """Says which of the newest tokens are padding, until `settle`."""
        self._padding = valid

    def _slide(self, reach: int) -> None:
        """Drops what no later query can see: at once where that is free, else when it is a quarter of what is held."""
        if self.contiguous:
            if self.rows.held > reach:
                self.rows.drop_front(self.rows.held - reach)
            return
        positions = self.positions
        kept = positions >= self.seen - reach
        gone = int((~kept & self.rows.filled).sum())
        if gone * 4 > sum(self.rows.sizes):
            self.keep(kept)

    def keep(self, kept: Bool[Tensor, "batch kv_heads held"]) -> None:
        """Drops all other slots, with their positions and statistics, and gives their memory back."""
        if bool((kept | ~self.rows.filled).all()):
            return
        self.complete()
        if self.contiguous:
            self.rows.add_column("position", self.positions.contiguous())
            self.contiguous = False
        self.rows.keep(kept)

    def copy(self) -> Layer:
        """An independent copy."""
        twin = copy.copy(self)
        twin.rows = None if self.rows is None else self.rows.copy()
        twin.memory = {name: kept.clone() for name, kept in self.memory.items()}
        return twin

    # transformers' cache layer

    def get_seq_length(self) -> int:
        """Tokens seen."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns and first column of the mask: all tokens seen, or what a never evicted sliding window holds."""
        if self.is_sliding and not self.evicts and self.contiguous and self.rows is not None:
            return self.rows.held + query_length, self.seen - self.rows.held
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        return self.sliding_window or -1

    def activate_past_recording(self) -> None:
        """A sliding window keeps what it leaves behind until the next `crop`, so that tokens can be taken back."""
        self.record_past = True

    @property
    def is_croppable(self) -> bool:
        """Whether taking tokens back restores the layer as it was before them."""
        return not self.evicts

    def crop(self, tokens_to_remove: int) -> None:
        """Takes the newest tokens back, `-n` of them (or, for n > 0, all but the first n). What was evicted stays evicted."""
        if self.rows is None:
            return
        count = -tokens_to_remove if tokens_to_remove <= 0 else self.seen - tokens_to_remove
        if count > self.seen:
            raise InputError(
                f"crop can take back {self.seen} tokens at most, the tokens seen, got {count}"
            )
        if count > 0:
            reach = self.seen if self.sliding_window is None else self.sliding_window - 1 + count
            if not self.evicts and self.contiguous and self.rows.held < min(self.seen, reach):
                raise InputError(
                    f"layer {self.index} has a sliding window and has already forgotten what comes back into it; "
                    "call cache.activate_past_recording() before the tokens that may be taken back"
                )
            if self.contiguous:
                self.rows.drop_back(count)
                self._fresh = max(0, self._fresh - count)
            else:
                self.keep(self.positions < self.seen - count)
            self.real = (self.real - count).clamp(min=0)
            self.seen -= count
        window = self.sliding_window
        if window is not None and self.record_past:
            self._slide(window - 1)

    def reset(self) -> None:
        self._forget()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.rows is None:
            return
        if indices.dtype == torch.bool:
            indices = indices.nonzero().flatten()
        self.rows.select(indices)
        self.real = self.real[indices.cpu()]
        self.memory = {name: kept[indices.to(kept.device)] for name, kept in self.memory.items()}

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.rows is not None:
            self.batch_select_indices(torch.arange(self.rows.batch).repeat_interleave(repeats))

    def offload(self) -> None:
        raise InputError("regard's caches do not offload; a smaller budget frees memory for good")

    def prefetch(self) -> None:
        self.offload()


class Slots(MutableMapping[str, Tensor]):
    """The scorer's per-slot statistics of a layer; reading gives a rectangle, assigning writes it back."""

    def __init__(self, layer: Layer) -> None:
        self._layer = layer

    def __getitem__(self, name: str) -> Float[Tensor, "batch kv_heads held"]:
        if name not in self._layer.fills:
            raise KeyError(name)
        self._layer.complete()
        return self._layer.rows.column(name)

    def __setitem__(self, name: str, value: Float[Tensor, "batch kv_heads held"]) -> None:
        if name not in self._layer.fills:
            raise KeyError(f"{name!r} is not among the scorer's slots {sorted(self._layer.fills)}")
        self._layer.complete()
        self._layer.rows.write(name, value)

    def __delitem__(self, name: str) -> None:
        raise TypeError("slots are declared by the scorer and stay")

    def __iter__(self) -> Iterator[str]:
        return iter(self._layer.fills)

    def __len__(self) -> int:
        return len(self._layer.fills)
