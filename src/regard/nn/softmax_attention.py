"""Causal softmax attention as a mixer: the baseline of this room, whole or within a sliding window.

    q, k, v = W_q h, W_k h, W_v h;   o_i = sum_{j <= i} softmax_j(q_i . k_j / sqrt(d)) v_j;   output = W_o o

Queries and keys turn by rotary positions; with a window, query i sees the keys i - window + 1 .. i. Attention goes through
`regard`'s engine, so instruments and interventions attach.
Source: Vaswani et al. 2017 (arXiv 1706.03762); the window: Longformer (arXiv 2004.05150).
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from regard._errors import InputError
from regard.attach.modules import HookedAttention
from regard.nn._visible import causal_rule
from regard.nn.mixer import Mixer, State
from regard.nn.projections import Projections
from regard.nn.rotary import rotate


class SoftmaxAttention(Projections, Mixer, HookedAttention):
    """Multi-head causal self-attention with rotary positions.

    Args:
        width: of the tokens.
        heads: query heads; must divide `width`, with an even quotient.
        kv_heads: key and value heads, `heads` by default.
        window: keys that a query sees, itself included; None for all.

    Cost: 4 width^2 multiplications a token (2 width^2 (1 + kv_heads / heads) when grouped) and 2 width for each visible key.
    The state holds keys and values of all tokens, of the newest `window` with a window.

    Raises:
        InputError: heads that do not divide.

    >>> mixer = SoftmaxAttention(width=32, heads=4)
    >>> mixer(torch.randn(2, 10, 32)).shape
    torch.Size([2, 10, 32])
    """

    positional = True

    def __init__(
        self, width: int, heads: int, *, kv_heads: int | None = None, window: int | None = None
    ) -> None:
        super().__init__(width, heads, kv_heads=kv_heads, even=True)
        if window is not None and window < 1:
            raise InputError.of("window", given=window, expected="1 or more, or None")
        self.window = window

    def forward(
        self,
        hidden: Float[Tensor, "batch tokens width"],
        *,
        valid: Bool[Tensor, "batch tokens"] | None = None,
        state: State | None = None,
    ) -> Float[Tensor, "batch tokens width"]:
        return self.output_of(self.mix(hidden, valid, state), hidden)

    def mix(
        self, hidden: Tensor, valid: Tensor | None, state: State | None
    ) -> Float[Tensor, "batch heads tokens dim"]:
        """The head outputs."""
        batch, tokens, _ = hidden.shape
        seen = int(state["seen"][0]) if state else 0
        positions = torch.arange(seen, seen + tokens, device=hidden.device)
        query, key = (rotate(part, positions) for part in self.query_key(hidden, valid, state))
        value, known = self.value_of(hidden), valid
        if state is not None:
            key, value, known = remember(state, key, value, valid, keep=self.window)
        mask = causal_rule(
            tokens, known, key.shape[2], window=self.window, batch=batch, device=hidden.device
        )
        return self.attend(query, key, value, mask=mask, valid=valid, key_valid=known)

    def query_key(
        self, hidden: Tensor, valid: Tensor | None, state: State | None
    ) -> tuple[Tensor, Tensor]:
        """Queries and keys of new tokens before they turn to their positions."""
        return self.query_key_of(hidden)


class SlidingWindowAttention(SoftmaxAttention):
    """`SoftmaxAttention` within a window of 64 keys unless told otherwise."""

    def __init__(
        self, width: int, heads: int, *, window: int = 64, kv_heads: int | None = None
    ) -> None:
        super().__init__(width, heads, kv_heads=kv_heads, window=window)


def remember(
    state: State, key: Tensor, value: Tensor, valid: Tensor | None, *, keep: int | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Puts new keys and values after those of a state, and returns all of them with their validity.

    `state` gets "key", "value" `[batch, heads, tokens, dim]`, "valid" `[batch, tokens]` and "seen" (tokens so far, a number
    for each row); only the newest `keep` stay in it.
    """
    batch, tokens = key.shape[0], key.shape[2]
    if valid is None:
        valid = torch.ones(batch, tokens, dtype=torch.bool, device=key.device)
    if state:
        key = torch.cat([state["key"], key], dim=2)
        value = torch.cat([state["value"], value], dim=2)
        valid = torch.cat([state["valid"], valid], dim=1)
        seen = state["seen"] + tokens
    else:
        seen = torch.full((batch,), tokens, device=key.device)
    newest = slice(None) if keep is None else slice(-keep, None)
    state.update(key=key[:, :, newest], value=value[:, :, newest], valid=valid[:, newest])
    state["seen"] = seen
    return key, value, valid
