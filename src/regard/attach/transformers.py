"""transformers' attention function, answered by the engine.

Every attention module that uses transformers' attention interface calls one function with its tensors; while a session is
open that function is `attention` here. What else a model passes decides what it means:

| argument | who passes it | meaning |
|---|---|---|
| `softcap` | Gemma 2, VaultGemma, T5Gemma | scores become `softcap * tanh(scores / softcap)` |
| `s_aux` | GPT-OSS, MiMo-V2, Granite SWA, DeepSeek-V4 | learned sink logits, one a head |
| `sinks` | Inkling 2 | sink logits that depend on the query, `[batch, heads, queries, 1]` |
| `position_bias` | T5 and its descendants, Inkling | added to the scores |
| `indices` | DeepSeek-V3.2, other sparse indexers | the keys each query may see, `[batch, queries, count]` |
| `block_indices` | MiniMax-M3 | the same by key blocks |
| `sliding_window` | many | nothing: the window is in the mask already |

Keys that come out of one of regard's caches carry it as `key.held` (`regard.attach.hold.Held`): it answers decoding steps itself,
and puts what it really holds into every other call.

Models with sparse indexers cut the mask themselves only where the implementation is called `sdpa` or `eager`, so it is done
here. Without a mask, `sdpa` models mean "causal if the module is"; models that run eager mean "every key". So there are two
functions and two masks, chosen by the implementation that a model had before.

Under `torch.compile` every attention call is a graph break: methods are Python and stay so.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from regard._errors import AttachError
from regard.attach import compat
from regard.attach.session import dispatch, observed
from regard.engine import AttentionCall, DeferredMask, as_mask


@compat.untraced
def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sinks: Tensor | None = None,
    position_bias: Tensor | None = None,
    indices: Tensor | None = None,
    block_indices: Tensor | None = None,
    cache: Any = None,
    **rest: Any,
) -> tuple[Tensor, None]:
    """Tensors `[batch, heads, tokens, dim]` in, `[batch, tokens, heads, dim]` out, for models that run `sdpa`."""
    causal = is_causal if is_causal is not None else bool(getattr(module, "is_causal", True))
    if cache is not None:
        raise AttachError(
            "continuous batching (a paged cache) is not supported while methods are attached; use model.generate(...)"
        )
    if block_indices is not None:
        attention_mask = _named_blocks(module, query, key, attention_mask, block_indices, rest)
    if indices is not None:
        attention_mask = _named_keys(attention_mask, indices, key.shape[2])
    scale = float(scaling) if scaling is not None else query.shape[-1] ** -0.5
    held = getattr(key, "held", None)
    if held is not None and getattr(value, "held", None) is not held:
        held.lost("values")
        held = None
    if held is not None:
        more = (softcap, s_aux, sinks, position_bias, indices, block_indices)
        if not dropout and all(argument is None for argument in more) and not observed(module):
            output = held.decode(module, query, attention_mask, scale)
            if output is not None:
                return output.transpose(1, 2), None
    queries, keys = query.shape[2], key.shape[2]
    if attention_mask is None and causal and queries > 1 and keys > queries:
        key, value = key[:, :, :queries], value[:, :, :queries]
        position_bias = None if position_bias is None else position_bias[..., :queries]
        keys = queries
    mask = as_mask(attention_mask, queries, keys, causal)
    offset, valid, key_valid = 0, None, None
    if isinstance(mask, DeferredMask):
        offset = mask.query_offset - mask.key_offset
        key_valid = mask.key_valid
        if key_valid is not None and offset >= 0 and offset + queries <= key_valid.shape[1]:
            valid = key_valid[:, offset : offset + queries]
            valid = None if bool(valid.all()) else valid
    elif getattr(module, "is_causal", causal):
        offset = max(keys - queries, 0)
    call = AttentionCall(
        query,
        key,
        value,
        mask,
        scale,
        softcap=softcap,
        sinks=_sinks(s_aux, sinks),
        bias=position_bias,
        dropout=dropout,
        valid=valid,
        key_valid=key_valid,
        query_offset=offset,
        module=module,
    )
    if held is None:
        return dispatch(module, call).transpose(1, 2).contiguous(), None
    call = held.place(call, attention_mask)
    output = dispatch(module, call)
    held.done(call, attention_mask)
    return output.transpose(1, 2).contiguous(), None


@compat.untraced
def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **rest: Any,
) -> tuple[Tensor, None]:
    """The same for models that run `eager`: no mask means every key, whatever the module says of causality."""
    return attention(module, query, key, value, attention_mask, **{**rest, "is_causal": False})


def _sinks(s_aux: Tensor | None, sinks: Tensor | None) -> Tensor | None:
    """`[heads]`, or `[batch, heads, queries]` where sinks depend on the query."""
    if sinks is not None:
        return sinks.squeeze(-1)
    return None if s_aux is None else s_aux.reshape(-1)


def _named_keys(mask: Tensor | None, indices: Tensor, keys: int) -> Tensor:
    """The mask cut down to the keys that a sparse indexer names for each query (-1 names none)."""
    named = torch.zeros((*indices.shape[:2], keys + 1), dtype=torch.bool, device=indices.device)
    chosen = indices.long()
    named.scatter_(-1, torch.where(chosen < 0, keys, chosen), True)
    named = named[:, None, :, :keys]
    if mask is None:
        return named
    if mask.dtype == torch.bool:
        return mask & named
    return mask.masked_fill(~named, torch.finfo(mask.dtype).min)


def _named_blocks(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    blocks: Tensor,
    rest: dict[str, Any],
) -> Tensor:
    """The same for key blocks, by the model's own indexer."""
    positions = rest.get("position_ids")
    if positions is None:
        positions = torch.arange(key.shape[2] - query.shape[2], key.shape[2], device=query.device)
    positions = (positions if positions.dim() > 1 else positions[None]).expand(query.shape[0], -1)
    indexer: Any = module.indexer
    return indexer.build_block_mask(
        blocks, mask, key.shape[2], query.dtype, query.device, positions
    )


compat.register(attention, eager_attention)
