"""Attention inside groups of tokens, some heads with the groups shifted by half a group, and sink tokens that everyone sees.

With groups of g tokens, query t of a fixed head sees the keys k <= t of its own group,

    k // g = t // g,

and of a shifted head those of the groups that begin half a group later,

    (k - g/2) // g = (t - g/2) // g.

What shifting leaves over are the first and the last half group. LongLoRA rolls the sequence, so that these two make one group
in which the *first* tokens come last and see the end of the sequence (`leak=True`); with `leak=False` they are two short
groups. Sinks: the first s tokens are seen by every later query as well.

Source: LongLoRA (arXiv 2309.12307) for the shift, SinkLoRA (arXiv 2406.05678) for the sinks. Where one group holds the whole
sequence nothing is shifted (rolling would cut it in two), so that it is full causal attention.

Cost: time O(tokens x size x dim) and memory O(tokens x dim) for each head; no mask is built but in the wrapped group of a
padded batch. Heads that share a KV head stay grouped.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from regard._errors import InputError


def shift_groups(
    states: Float[Tensor, "batch heads tokens dim"], size: int, shift: int = 0
) -> Float[Tensor, "batch groups heads size dim"]:
    """Rolls tokens `shift` places to the front and cuts them into groups of `size` (which must divide their number).

    >>> import torch
    >>> tokens = torch.arange(8.0).view(1, 1, 8, 1)
    >>> shift_groups(tokens, 4, 2)[0, :, 0, :, 0].tolist()
    [[2.0, 3.0, 4.0, 5.0], [6.0, 7.0, 0.0, 1.0]]
    """
    tokens = states.shape[2]
    if size < 1 or tokens % size:
        raise InputError.of("size", given=size, expected=f"a divisor of the {tokens} tokens")
    rolled = states.roll(-shift, 2) if shift else states
    return rolled.unflatten(2, (tokens // size, size)).transpose(1, 2)


def unshift_groups(
    grouped: Float[Tensor, "batch groups heads size dim"], shift: int = 0
) -> Float[Tensor, "batch heads tokens dim"]:
    """The inverse of `shift_groups`: `unshift_groups(shift_groups(x, size, shift), shift)` is x."""
    rolled = grouped.transpose(1, 2).flatten(2, 3)
    return rolled.roll(shift, 2) if shift else rolled


def group_visible(
    queries: Int[Tensor, "*q"],
    keys: Int[Tensor, "*k"],
    tokens: int,
    size: int,
    *,
    shifted: bool = False,
    sinks: int = 0,
    leak: bool = False,
) -> Bool[Tensor, "..."]:
    """Which keys a query sees, by position in a sequence of `tokens`: the definition that `grouped_attention` computes.

    `queries` and `keys` are positions that broadcast against each other.
    """
    if size >= tokens:
        return keys <= queries
    if shifted and leak:
        total = -(-tokens // size) * size
        rolled_q, rolled_k = ((t - size // 2) % total for t in (queries, keys))
        inside = (rolled_q // size == rolled_k // size) & (rolled_k <= rolled_q)
    else:
        first = size // 2 if shifted else 0
        same = (queries - first).div(size, rounding_mode="floor") == (keys - first).div(
            size, rounding_mode="floor"
        )
        inside = same & (keys <= queries)
    return inside | ((keys < sinks) & (keys <= queries))


def visible_pairs(
    tokens: int, size: int, *, shifted: bool = False, sinks: int = 0, leak: bool = False
) -> int:
    """How many (query, key) pairs one head computes; attention costs `4 x dim` floating-point operations for each.

    >>> visible_pairs(8, 4), visible_pairs(8, 4, shifted=True), visible_pairs(8, 8)
    (20, 16, 36)
    """
    positions = torch.arange(tokens)
    total = 0
    for rows in positions.split(1024):
        seen = group_visible(
            rows[:, None],
            positions[None, :],
            tokens,
            size,
            shifted=shifted,
            sinks=sinks,
            leak=leak,
        )
        total += int(seen.sum())
    return total


def grouped_attention(
    query: Float[Tensor, "batch heads tokens dim"],
    key: Float[Tensor, "batch kv_heads tokens dim"],
    value: Float[Tensor, "batch kv_heads tokens value_dim"],
    size: int,
    *,
    shifted: int = 0,
    sinks: int = 0,
    leak: bool = False,
    valid: Bool[Tensor, "batch tokens"] | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
) -> Float[Tensor, "batch heads tokens value_dim"]:
    """Causal attention inside groups of `size` tokens; differentiable.

    Args:
        query, key, value: after position encoding, so that rolling tokens does not change their distances.
        size: tokens in a group, even; the last group may be shorter.
        shifted: how many heads, the last ones, use groups that begin half a group later.
        sinks: how many first tokens every query sees; at most half a group.
        leak: whether the first half group of shifted heads sees the last one, as in LongLoRA.
        valid: False at padding, which must come after the tokens. It matters to `leak` alone: no other query sees later tokens.
        scaling: factor on query . key; 1 / sqrt(dim) when None.
        dropout: probability of dropping an attention weight.

    Raises:
        InputError: `size` is odd or below 2, `sinks` exceeds half a group, `shifted` exceeds the heads.
    """
    heads, tokens = query.shape[1], query.shape[2]
    check_group(size, sinks)
    if not 0 <= shifted <= heads:
        raise InputError.of("shifted", given=shifted, expected=f"between 0 and the {heads} heads")
    scale = float(query.shape[-1] ** -0.5 if scaling is None else scaling)
    spare = -tokens % size
    if tokens <= size:
        size, shifted, sinks, spare = tokens, 0, 0, 0
    if spare:
        query, key, value = (pad(x, (0, 0, 0, spare)) for x in (query, key, value))
        valid = query.new_ones(len(query), tokens).bool() if valid is None else valid
        valid = pad(valid, (0, spare))
    outputs = []
    for first, last, shift in ((0, heads - shifted, 0), (heads - shifted, heads, size // 2)):
        for own, shared in _rectangles(heads, key.shape[1], first, last):
            part = (query[:, own], key[:, shared], value[:, shared])
            kernel = _Kernel(scale, dropout, gqa=part[0].shape[1] != part[1].shape[1])
            outputs.append(_attend(part, size, shift, sinks, leak, valid, kernel))
    output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)
    return output[:, :, :tokens]


def check_group(size: int, sinks: int) -> None:
    """Raises InputError unless groups of `size` tokens can be shifted by half and hold the sinks in one half."""
    if size < 2 or size % 2:
        raise InputError.of("size", given=size, expected="an even number of tokens, at least 2")
    if not 0 <= sinks <= size // 2:
        raise InputError.of(
            "sinks", given=sinks, expected=f"0..{size // 2}, half a group of {size}"
        )


Part = tuple[Tensor, Tensor, Tensor]


class _Kernel:
    """The fused kernel on `[batch, groups, heads, rows, dim]`, causal or with a mask."""

    def __init__(self, scaling: float, dropout: float, gqa: bool) -> None:
        self.settings: dict[str, Any] = {"scale": scaling, "dropout_p": dropout, "enable_gqa": gqa}

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        rows = query.shape[:2]
        query, key, value = (x.flatten(0, 1) for x in (query, key, value))
        mixed = scaled_dot_product_attention(query, key, value, is_causal=True, **self.settings)
        return mixed.unflatten(0, rows)

    def masked(self, query: Tensor, key: Tensor, value: Tensor, visible: Tensor) -> Tensor:
        return scaled_dot_product_attention(query, key, value, attn_mask=visible, **self.settings)


def _attend(
    part: Part,
    size: int,
    shift: int,
    sinks: int,
    leak: bool,
    valid: Tensor | None,
    kernel: _Kernel,
) -> Tensor:
    """One set of heads; its groups either begin at token 0 (`shift` 0) or leave a first and a last half group over."""
    lead: Part = tuple(x[:, None, :, :sinks] for x in part)  # type: ignore[assignment]
    grouped: Part = tuple(shift_groups(x, size, shift) for x in part)  # type: ignore[assignment]
    if not sinks and not shift:
        return unshift_groups(kernel(*grouped))
    if not shift:  # the first group holds the sinks already
        first = kernel(*(x[:, :1] for x in grouped))
        rest = _behind_sinks([x[:, 1:] for x in grouped], lead, kernel)
        return unshift_groups(torch.cat([first, rest], 1))
    last, half = [x[:, -1:] for x in grouped], size - shift
    rest = _behind_sinks([x[:, :-1] for x in grouped], lead, kernel)
    tail = _behind_sinks([x[..., :half, :] for x in last], lead, kernel)
    head = (
        _wrapped([x[:, 0] for x in last], half, valid, kernel)[:, None]
        if leak
        else kernel(*(x[..., half:, :] for x in last))
    )
    return unshift_groups(torch.cat([rest, torch.cat([tail, head], -2)], 1), shift)


def _behind_sinks(grouped: list[Tensor], lead: Part, kernel: _Kernel) -> Tensor:
    """Every group with the sinks put before it: causality then lets all its queries see them, without a mask."""
    sinks, groups = lead[0].shape[-2], grouped[0].shape[1]
    if not sinks:
        return kernel(*grouped)
    joined = (
        torch.cat([first.expand(-1, groups, -1, -1, -1), x], -2)
        for first, x in zip(lead, grouped, strict=True)
    )
    return kernel(*joined)[..., sinks:, :]


def _wrapped(last: list[Tensor], half: int, valid: Tensor | None, kernel: _Kernel) -> Tensor:
    """The first tokens at the end of the wrapped group: they see its first half, the end of the sequence, and themselves."""
    query, key, value = last
    rows = query.shape[-2] - half
    seen = torch.ones(rows, half + rows, dtype=torch.bool, device=query.device).tril(half)
    if valid is not None:
        real = torch.cat([valid[:, valid.shape[1] - half :], valid[:, :rows]], 1)
        seen = seen & real[:, None, None, :]
        seen[..., half:] |= torch.eye(rows, dtype=torch.bool, device=seen.device)  # no empty row
    return kernel.masked(query[..., half:, :], key, value, seen)


def _rectangles(heads: int, kv_heads: int, first: int, last: int) -> Iterator[tuple[slice, slice]]:
    """Query heads `first:last` cut so that each piece reads whole KV heads, or a part of one."""
    group = heads // kv_heads
    while first < last:
        shared = first // group
        if first % group == 0 and last - first >= group:
            count = (last - first) // group
            yield slice(first, first + count * group), slice(shared, shared + count)
            first += count * group
        else:
            stop = min(last, (shared + 1) * group)
            yield slice(first, stop), slice(shared, shared + 1)
            first = stop
