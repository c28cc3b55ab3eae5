"""Sparse global attention: a token sees its neighbours, and some tokens that all later ones see.

    o_i = sum_j softmax_j(q_i . k_j / sqrt(d)) v_j   over   0 <= i - j <= window   and   j <= i with j a multiple of stride

Global tokens are landmarks: what they collected from their own neighbourhood stays in reach at any distance. There are no
positions inside: in Hydra the state-space path tells them.

Source: Hydra, arXiv 2508.15099, whose text leaves the global pattern open (G tokens) and whose released code has none. Here a
global token stands at every `stride`-th place, counted without padding; G tokens over the whole text, a stride of T / G,
would make the pattern of early tokens depend on how long the text becomes.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from regard._errors import InputError
from regard.attach.modules import HookedAttention
from regard.engine import BlockSparseMask, DeferredMask
from regard.nn._visible import BLOCK
from regard.nn.mixer import Mixer, State
from regard.nn.projections import Projections


class SparseGlobalAttention(Projections, Mixer, HookedAttention):
    """Causal softmax attention within a window and to every `stride`-th token.

    Args:
        width: of the tokens.
        heads: query heads; must divide `width`.
        window: keys before its own that a query sees.
        stride: distance between global tokens; None for none.
        kv_heads: key and value heads, `heads` by default.

    Cost: 4 width^2 multiplications a token, and 2 width for each of its window + 1 + (place / stride) keys. The state holds
    keys and values of the window and of the global tokens; it grows by one token in `stride`.

    Raises:
        InputError: heads that do not divide, a window below 0 or a stride below 1.

    >>> mixer = SparseGlobalAttention(width=32, heads=4, window=8, stride=16)
    >>> mixer(torch.randn(2, 40, 32)).shape
    torch.Size([2, 40, 32])
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        window: int = 256,
        stride: int | None = 512,
        kv_heads: int | None = None,
    ) -> None:
        super().__init__(width, heads, kv_heads=kv_heads)
        if window < 0:
            raise InputError.of("window", given=window, expected="0 or more")
        if stride is not None and stride < 1:
            raise InputError.of("stride", given=stride, expected="1 or more, or None")
        self.window, self.stride = window, stride

    def forward(
        self,
        hidden: Float[Tensor, "batch tokens width"],
        *,
        valid: Bool[Tensor, "batch tokens"] | None = None,
        state: State | None = None,
    ) -> Float[Tensor, "batch tokens width"]:
        batch, tokens, _ = hidden.shape
        query, key = self.query_key_of(hidden)
        value, device = self.value_of(hidden), hidden.device
        known = valid
        if known is None:
            known = torch.ones(batch, tokens, dtype=torch.bool, device=device)
        seen = state["seen"] if state else torch.zeros(batch, dtype=torch.long, device=device)
        places = seen[:, None] + known.long().cumsum(1) - 1
        if state is not None:
            key, value, places, known = self._remember(state, key, value, places, known)
        mask = self._mask(tokens, places, known)
        mixed = self.attend(query, key, value, mask=mask, valid=valid, key_valid=known)
        return self.output_of(mixed, hidden)

    def _remember(
        self, state: State, key: Tensor, value: Tensor, places: Tensor, known: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """All keys in sight; the state keeps those that later tokens will see."""
        if state:
            key = torch.cat([state["key"], key], 2)
            value = torch.cat([state["value"], value], 2)
            places = torch.cat([state["places"], places], 1)
            known = torch.cat([state["valid"], known], 1)
        seen = places[:, -1] + 1
        longest = int(seen.max())
        keep = len(kept_places(longest, self.window, self.stride))
        rank = places if self.stride is None else places.where(places % self.stride > 0, longest)
        rank = torch.where(known, rank, -1)
        held = rank.topk(keep, 1).indices.sort(1).values
        state.update(
            key=key.take_along_dim(held[:, None, :, None], 2),
            value=value.take_along_dim(held[:, None, :, None], 2),
            places=places.gather(1, held),
            valid=known.gather(1, held),
            seen=seen,
        )
        return key, value, places, known

    def _mask(
        self,
        tokens: int,
        places: Int[Tensor, "batch keys"],
        known: Bool[Tensor, "batch keys"],
    ) -> BlockSparseMask | DeferredMask:
        batch, keys = places.shape
        if tokens > BLOCK and bool(known.all()) and bool((places == places[:1]).all()):
            return blocks_of(tokens, int(places[0, -tokens]), self.window, self.stride)

        def rule(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            place = places[batch, key]
            visible = places[batch, query] - place <= self.window
            if self.stride is not None:
                visible = visible | (place % self.stride == 0)
            return (key == query) | ((key < query) & visible & known[batch, key])

        return DeferredMask(  # pyright: ignore[reportCallIssue]
            rule, (batch, 1, tokens, keys), query_offset=keys - tokens, key_valid=known
        )


def kept_places(seen: int, window: int, stride: int | None) -> Int[Tensor, "_"]:
    """The places of `seen` tokens that a later token may see.

    >>> kept_places(10, 3, 4).tolist()
    [0, 4, 7, 8, 9]
    """
    near = torch.arange(max(0, seen - window), seen)
    if stride is None:
        return near
    return torch.cat([torch.arange(0, max(0, seen - window), stride), near])


@lru_cache(maxsize=8)
def blocks_of(tokens: int, seen: int, window: int, stride: int | None) -> BlockSparseMask:
    """The pattern of `tokens` new tokens after `seen` others, of which `kept_places` are left. Kept for the next such call."""
    places = torch.cat([kept_places(seen, window, stride), torch.arange(seen, seen + tokens)])
    keys = len(places)
    offset = keys - tokens
    everywhere = torch.zeros(keys, dtype=torch.bool) if stride is None else places % stride == 0
    named = []
    for block in range(offset // BLOCK, (keys - 1) // BLOCK + 1):
        first, stop = max(block * BLOCK, offset), min((block + 1) * BLOCK, keys)
        shown = (places[:stop] >= places[first] - window) | everywhere[:stop]
        named.append(shown.nonzero()[:, 0])

    def rule(query: Tensor, key: Tensor) -> Tensor:
        return (places[query] - places[key] <= window) | everywhere[key]

    return BlockSparseMask(tuple(named), BLOCK, keys, offset=offset, rule=rule, key_size=1)
