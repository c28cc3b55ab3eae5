"""Dynamic mask attention (DMA): each KV head keeps the `window` keys that its values say are the most important.

    q, k, v = RMSNorm(W_q h), RMSNorm(W_k h), W_v h            (norms over the head size, then rotary positions)
    importance_j = exp(A softplus(W_dt [v_j of all KV heads]))                         one number a key and KV head
    o_i = sum_{j in S_i} softmax_j(q_i . k_j / sqrt(d) + importance_j) v_j;   S_i the most important keys up to i

The importance is learnt through the softmax, without a loss of its own. Since it belongs to the key, a key that has left S_i
never comes back: the state holds `window` keys a head, however long the text, and blocks of queries read only these
(`regard.ops.dynamic_mask`). Attention goes through `regard`'s engine, so instruments and interventions attach.

Source: Shi et al. 2025, arXiv 2508.02124, as the Doge model of transformers has it, with the same parameter names. Here A starts
at N(0, 0.02^2), not at 0, where all keys tie and W_dt learns nothing. `local`, newest keys that are always seen, is not in the
paper; it is 0 unless asked for.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from regard._errors import InputError, at_least_one
from regard.attach.modules import HookedAttention
from regard.attach.session import dispatch
from regard.engine import AttentionCall, blockwise
from regard.engine.masks import Window
from regard.nn.mixer import Mixer, State
from regard.nn.projections import Projections
from regard.nn.rotary import rotate
from regard.ops.dynamic_mask import (
    dynamic_mask,
    dynamic_mask_attention,
    lifetimes,
    value_importance,
    value_importance_linear,
)


class DynamicMaskAttention(Projections, Mixer, HookedAttention):
    """Causal self-attention over the most important keys so far.

    Args:
        width: of the tokens.
        heads: query heads; must divide `width`, with an even quotient.
        kv_heads: key and value heads, `heads` by default; each keeps keys of its own.
        window: keys that a query sees. Up to that length it is all of attention, biased by the importance.
        local: newest keys that a query sees besides, itself included; 0 as in the paper, where a token that is not important
            enough does not even see itself.

    Cost: the projections as in `SoftmaxAttention`, kv_heads x kv_width multiplications a token for the importance, and 2 width
    for each of `window` + `local` + 128 keys; O(tokens log tokens) to find them. The state holds at most `window` + `local` keys
    and values a head.

    Raises:
        InputError: heads that do not divide, a window below 1, or a local part below 0.

    >>> mixer = DynamicMaskAttention(width=32, heads=4, window=4)
    >>> mixer(torch.randn(2, 10, 32)).shape
    torch.Size([2, 10, 32])
    """

    positional = True

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        kv_heads: int | None = None,
        window: int = 2048,
        local: int = 0,
    ) -> None:
        super().__init__(width, heads, kv_heads=kv_heads, even=True)
        at_least_one(window=window)
        if local < 0:
            raise InputError.of("local", given=local, expected="0 or more")
        self.window, self.local = window, local
        dim, kv_heads = width // heads, self.kv_heads
        self.q_norm = nn.RMSNorm(dim, eps=1e-6)
        self.k_norm = nn.RMSNorm(dim, eps=1e-6)
        self.dt_proj = nn.Linear(kv_heads * dim, kv_heads, bias=False)
        self.A = nn.Parameter(0.02 * torch.randn(kv_heads))

    def importance(
        self, value: Float[Tensor, "batch kv_heads tokens dim"]
    ) -> Float[Tensor, "batch kv_heads tokens"]:
        """How important each key is, from the values."""
        return value_importance(value, self.dt_proj.weight, self.A)

    def forward(
        self,
        hidden: Float[Tensor, "batch tokens width"],
        *,
        valid: Bool[Tensor, "batch tokens"] | None = None,
        state: State | None = None,
    ) -> Float[Tensor, "batch tokens width"]:
        batch, tokens, _ = hidden.shape
        seen = int(state["seen"][0]) if state else 0
        positions = torch.arange(seen, seen + tokens, device=hidden.device)
        query, key = self.query_key_of(hidden)
        query, key = rotate(self.q_norm(query), positions), rotate(self.k_norm(key), positions)
        value = self.value_of(hidden)
        importance = self.importance(value)
        known = None if valid is None else valid[:, None].expand(-1, self.kv_heads, -1)
        if state:
            new = torch.ones_like(importance, dtype=torch.bool) if known is None else known
            known = torch.cat([state["valid"], new], -1)
            key = torch.cat([state["key"], key], 2)
            value = torch.cat([state["value"], value], 2)
            importance = torch.cat([state["importance"], importance], -1)
        ends = lifetimes(importance, self.window, local=self.local, valid=known)
        call = AttentionCall(
            query,
            key,
            value,
            LifetimeMask(ends, key.shape[2] - tokens, self.heads // self.kv_heads),
            query.shape[-1] ** -0.5,
            bias=importance.repeat_interleave(self.heads // self.kv_heads, 1)[:, :, None],
            valid=valid,
            key_valid=None if known is None else known.any(1),
            query_offset=key.shape[2] - tokens,
            module=self,
            fused=_read_alive,
        )
        mixed = dispatch(self, call)
        if state is not None:
            self._keep(state, key, value, importance, ends, known)
            state["seen"] = torch.full((batch,), seen + tokens, device=hidden.device)
        return self.output_of(mixed, hidden)

    def _keep(
        self,
        state: State,
        key: Tensor,
        value: Tensor,
        importance: Tensor,
        ends: Tensor,
        known: Tensor | None,
    ) -> None:
        """Puts the keys that later queries may see into the state, oldest first; heads with fewer are filled up in front."""
        keys = key.shape[2]
        place = torch.arange(keys, device=key.device).expand_as(ends)
        kept = (ends >= keys) | (place + self.local > keys)  # padding counts in distances
        count = int(kept.sum(-1).max())
        slots = kept.long().argsort(dim=-1, stable=True)[..., keys - count :]
        wide = slots[..., None].expand(-1, -1, -1, key.shape[-1])
        valid = kept if known is None else kept & known
        state.update(
            key=key.gather(2, wide),
            value=value.gather(2, wide),
            importance=importance.gather(-1, slots),
            valid=valid.gather(-1, slots),
        )


class LinearDynamicMaskAttention(DynamicMaskAttention):
    """The same with an importance of A softplus(...), without the exponential, as in the authors' later kernels."""

    def importance(
        self, value: Float[Tensor, "batch kv_heads tokens dim"]
    ) -> Float[Tensor, "batch kv_heads tokens"]:
        return value_importance_linear(value, self.dt_proj.weight, self.A)


@dataclass(frozen=True, slots=True)
class LifetimeMask:
    """The mask of keys that live for a while: query i sees key j for j <= i < ends_j. `group` query heads share a KV head."""

    ends: Int[Tensor, "batch kv_heads keys"]
    offset: int
    group: int

    def window(self, rows: Tensor) -> Window:
        places = rows + self.offset
        last = int(places[-1]) + 1
        visible = dynamic_mask(self.ends[..., :last], places)
        return Window(0, last, 0, ~visible.repeat_interleave(self.group, 1))


def _read_alive(call: AttentionCall) -> Tensor:
    """The call by the keys alive alone, while no method has put another mask in."""
    if not isinstance(call.mask, LifetimeMask) or call.bias is None:
        output = blockwise.attend(call, (), ())
        assert output is not None
        return output
    importance = call.bias[:, :: call.mask.group, 0]
    return dynamic_mask_attention(
        call.query, call.key, call.value, importance, call.mask.ends, scaling=call.scaling
    )
