"""The fused kernel: `scaled_dot_product_attention`, for calls whose weights nobody looks at.

Cost: that of the kernel; nothing is added.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from regard.engine.call import AttentionCall
from regard.engine.masks import CausalMask, DeferredMask, FullMask, TensorMask


def can_attend(call: AttentionCall) -> bool:
    """Whether the fused kernel computes exactly this call."""
    return call.softcap is None and call.sinks is None and call.bias is None


def attend(call: AttentionCall) -> Tensor:
    """Runs the call on the fused kernel and returns `[batch, heads, queries, value_dim]`."""
    mask, causal = _tensor_mask(call)
    return scaled_dot_product_attention(
        call.query,
        call.key,
        call.value,
        attn_mask=mask,
        dropout_p=call.dropout,
        is_causal=causal,
        scale=call.scaling,
        enable_gqa=call.group > 1,
    )


def _tensor_mask(call: AttentionCall) -> tuple[Tensor | None, bool]:
    mask = call.mask
    if isinstance(mask, FullMask):
        return None, False
    if isinstance(mask, CausalMask):
        if mask.offset == 0 and call.keys == call.queries:
            return None, True
        rows = torch.arange(call.queries, device=call.query.device) + mask.offset
        return torch.arange(call.keys, device=rows.device)[None, :] <= rows[:, None], False
    if isinstance(mask, DeferredMask):
        return mask.visible(), False
    if isinstance(mask, TensorMask):
        tensor = mask.tensor[..., : call.keys]
        return (tensor if tensor.dtype == torch.bool else tensor.to(call.query.dtype)), False
    rows = torch.arange(call.queries, device=call.query.device)
    window = mask.window(rows)
    visible = torch.zeros(1, 1, call.queries, call.keys, dtype=torch.bool, device=rows.device)
    seen = window.visible(call.queries, rows.device)
    visible[..., window.lo : window.hi] = True if seen is None else seen
    return visible, False
