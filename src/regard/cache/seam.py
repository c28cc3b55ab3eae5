"""Between the model and a layer: the attention function meets what is really held.

The tensors that a layer gives to the model carry a `Tag`. regard's attention function finds it (`regard.attach.transformers`)
and lets it answer decoding steps from the layer's memory, or put the held keys with a mask made from their positions into
the call. Keys that arrive without their tag were changed on the way, and the next step of the cache refuses to go on.

What a query sees is decided by the model's own rule (causal, sliding window, chunks, padding), evaluated at the positions of
the held keys; no mask is made where everything held is visible.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from regard._errors import AttachError
from regard.engine import AttentionCall, CausalMask, DeferredMask, FullMask, Mask, TensorMask

if TYPE_CHECKING:
    from regard.cache.cache import Cache
    from regard.cache.layer import Layer


class Tag:
    """Rides on the key and value tensors of one update (`tensor.held`); see `regard.attach.hold.Held`."""

    __slots__ = ("cache", "layer", "open", "seen", "tokens")

    def __init__(self, cache: Cache, layer: Layer, tokens: int) -> None:
        self.cache, self.layer, self.tokens = cache, layer, tokens
        self.seen = layer.seen
        self.open = True

    def lost(self, what: str) -> None:
        """The model made other tensors of what the cache gave: fine while these were plain keys and values."""
        layer = self.layer
        if layer.evicts:
            raise AttachError(changed(layer.index, what))
        if not layer.contiguous:
            raise AttachError(
                f"layer {layer.index} computes with the {what} that the cache gave, and their padding was dropped; "
                "this architecture works with regard.cache.Full on unpadded input only"
            )

    def decode(
        self, module: nn.Module, query: Tensor, mask: Tensor | None, scaling: float
    ) -> Tensor | None:
        """One new token a row over everything held, or None when some of it is hidden."""
        layer = self.layer
        if self.tokens != 1 or query.shape[2] != 1 or not everything_visible(layer, mask):
            return None
        output = layer.rows.attend(query, scaling)
        if self.open:
            call = None
            if self.cache.watching(decoding=True):
                rule = FullMask(layer.rows.held)
                if not layer.rows.equal:
                    rule = TensorMask(_per_head(layer.valid[:, :, None], query), layer.rows.held)
                call = AttentionCall(
                    query,
                    layer.keys,  # type: ignore[arg-type]
                    layer.values,  # type: ignore[arg-type]
                    rule,
                    scaling,
                    query_offset=layer.rows.held - 1,
                    module=module,
                    output=output,
                )
            self._close(call, None)
        return output

    def place(self, call: AttentionCall, mask: Tensor | None) -> AttentionCall:
        """The held keys and values in a call that was made from stand-ins."""
        layer = self.layer
        valid = new_tokens(mask, self.tokens) if self.open else None
        if valid is None and self.open:
            valid = self.cache.given_valid(self.tokens)
        layer.mark_padding(valid)
        call.valid = valid
        if layer.contiguous and not layer.evicts:
            return call
        if not layer.contiguous:
            for made in (mask, call.bias):
                # stand-ins are NaN, and so is what a model computes from them
                if made is not None and made.is_floating_point() and bool(made.isnan().any()):
                    self.lost("values")
        held = layer.rows.held
        key, value = layer.keys, layer.values
        assert key is not None and value is not None
        if call.bias is not None:
            call.bias = at_positions(call.bias, layer, call.group)
        if not (layer.contiguous and layer.seen == held):
            call.mask = visible(layer, call, mask)
            call.key_valid = None
        call.key, call.value, call.query_offset = key, value, held - call.queries
        return call

    def done(self, call: AttentionCall, mask: Tensor | None) -> None:
        """The scorer sees the call; padding goes; the cache may evict."""
        if self.open:
            self._close(call, call.valid)

    def _close(self, call: AttentionCall | None, valid: Tensor | None) -> None:
        self.open = False
        self.cache.attended(self.layer, call, valid, self.tokens)


def changed(layer: int, what: str) -> str:
    return (
        f"the {what} that layer {layer} took from the cache did not reach the attention function as they were, so heads that "
        "hold different tokens would be read wrongly; this architecture works with regard.cache.Full only"
    )


def new_tokens(mask: Tensor | None, tokens: int) -> Bool[Tensor, "batch tokens"] | None:
    """Which of the newest tokens are no padding, as far as the mask says it; None when all are real."""
    if not isinstance(mask, DeferredMask) or mask.key_valid is None:
        return None
    valid = mask.key_valid[:, -tokens:]
    return None if bool(valid.all()) else valid


def everything_visible(layer: Layer, mask: Tensor | None) -> bool:
    """Whether one new query sees all that the layer holds: plain causality, and all that is hidden was dropped."""
    reach = layer.sliding_window
    within = reach is None or layer.seen <= reach or layer.contiguous
    if mask is None:
        return within
    if not isinstance(mask, DeferredMask):
        return False
    if not mask.past:
        return reach is not None and layer.seen <= reach and mask.key_valid is None
    return within and _same_padding(layer, mask, 1)


def _same_padding(layer: Layer, mask: DeferredMask, tokens: int) -> bool:
    """Whether the mask hides of the past only what was padding when it came, and nothing of the new tokens."""
    valid = mask.key_valid
    if valid is None:
        return bool((layer.real == layer.seen - tokens).all())
    counted = valid[:, : layer.seen - tokens].sum(-1).cpu()
    return bool(valid[:, layer.seen - tokens :].all()) and bool((counted == layer.real).all())


def visible(layer: Layer, call: AttentionCall, mask: Tensor | None) -> Mask:
    """What the queries of a call see of the held keys, by the model's own rule at their positions."""
    held, queries = layer.rows.held, call.queries
    plain = mask is None or (
        isinstance(mask, DeferredMask) and mask.past and _same_padding(layer, mask, queries)
    )
    filled = layer.rows.filled[:, :, None]
    if layer.sliding_window is not None and not layer.contiguous:
        # some models leave their window to the cache: what it had left behind when the call began is out of reach
        plain = False
        filled = filled & (
            layer.positions[:, :, None] > layer.seen - queries - layer.sliding_window
        )
    everything = queries == 1 or (mask is None and isinstance(call.mask, FullMask))
    if plain and layer.rows.equal:
        return FullMask(held) if everything else CausalMask(held, held - queries)
    if plain and everything:
        return TensorMask(_per_head(filled, call.query), held)
    if isinstance(mask, DeferredMask):
        return TensorMask(_per_head(mask.at(layer.positions) & filled, call.query), held)
    if mask is not None:
        chosen = at_positions(mask, layer, call.group)
        filled = _per_head(filled, call.query)
        if chosen.dtype == torch.bool:
            return TensorMask(chosen & filled, held)
        return TensorMask(chosen.masked_fill(~filled, torch.finfo(chosen.dtype).min), held)
    now = torch.arange(layer.seen - queries, layer.seen, device=call.query.device)
    past = layer.positions[:, :, None] <= now[:, None]
    return TensorMask(_per_head(past & filled, call.query), held)


def at_positions(given: Tensor, layer: Layer, group: int) -> Tensor:
    """The columns of a mask or bias `[batch|1, heads|1, queries|1, seen]` that belong to the held keys of every head."""
    positions = layer.positions.repeat_interleave(group, 1).long().clamp(min=0)
    batch, heads, held = positions.shape
    given = given.expand(batch, heads, -1, -1)
    index = positions - (layer.seen - given.shape[-1])
    return given.gather(-1, index[:, :, None].expand(batch, heads, given.shape[2], held))


def _per_head(visible: Tensor, query: Tensor) -> Tensor:
    """From KV heads to query heads."""
    return visible.repeat_interleave(query.shape[1] // visible.shape[1], 1)
