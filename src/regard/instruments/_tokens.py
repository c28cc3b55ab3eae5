"""Where the text of each row of a padded batch begins, for instruments that compare the first token with the rest."""

from __future__ import annotations

import torch
from torch import Tensor

from regard.engine import AttentionCall


def first_token(valid: Tensor | None, batch: int, device: torch.device | str = "cpu") -> Tensor:
    """`[batch]`: the slot of the first real token of each row (0 without padding)."""
    if valid is None:
        return torch.zeros(batch, dtype=torch.long, device=device)
    return valid.to(torch.uint8).argmax(-1)


def real(valid: Tensor | None, batch: int, tokens: int, device: torch.device | str) -> Tensor:
    """`[batch, tokens]`, True at real tokens."""
    if valid is None:
        return torch.ones(batch, tokens, dtype=torch.bool, device=device)
    return valid


def wide(tensor: Tensor) -> Tensor:
    """At least float32: norms of 16-bit activations overflow in their own type."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))


def prompt_keys(call: AttentionCall) -> tuple[Tensor, Tensor, Tensor] | None:
    """Key `[batch, kv_heads, keys, dim]`, value and real-key mask `[batch, keys]` of a call that starts a sequence.

    None for decode steps and later chunks, whose first keys were seen before. Empty slots of a preallocated cache are cut off.
    """
    if call.query_offset != 0 or (call.queries == 1 and call.site.causal and call.keys > 1):
        return None
    end = min(call.queries, call.keys) if call.site.causal else call.keys
    key, value = call.key[:, :, :end], call.value[:, :, :end]
    valid = None if call.key_valid is None else call.key_valid[:, :end]
    if valid is None and call.site.kind == "self" and call.valid is not None:
        valid = call.valid[:, :end]
    return key, value, real(valid, key.shape[0], end, key.device)
