"""Chunks that begin at every row's own tokens, whatever padding and earlier calls did to the rows of a batch.

A rule that goes chunk by chunk (the tokens of a chunk see what was known at its start) depends on where chunks begin. They
begin at a row's first token that is no padding, and go on over calls: row by row at other places of the tensor. Here the
tokens move to slots at which the borders of all rows meet.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Bool, Int
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Slots:
    """Where each row's tokens go.

    Attributes:
        parts: ranges of slots, none across a border.
        first: the place within its chunk of slot 0.
        filled: which slots hold a token; None for all.
        gather: tokens to slots along a dimension; what empty slots hold is some other token.
        scatter: slots back to tokens; what padding gets is some other token's.
    """

    parts: list[tuple[int, int]]
    first: int
    filled: Bool[Tensor, "batch slots"] | None
    gather: Callable[[Tensor, int], Tensor]
    scatter: Callable[[Tensor, int], Tensor]


def lay_out(
    valid: Bool[Tensor, "batch tokens"] | None,
    count: Int[Tensor, "batch"],
    period: int,
    tokens: int,
) -> Slots:
    """Slots for `tokens` more tokens of rows that hold `count` tokens of an unfinished chunk of `period`.

    >>> lay_out(None, torch.tensor([1, 1]), 4, 6).parts
    [(0, 3), (3, 6)]
    >>> padded = torch.tensor([[True, True, True], [False, True, True]])
    >>> lay_out(padded, torch.tensor([0, 0]), 4, 3).filled
    tensor([[ True,  True,  True],
            [ True,  True, False]])
    """
    first = int(count.min())
    if valid is None and bool((count == first).all()):
        return Slots(_parts(first, period, tokens), first, None, _same, _same)
    if valid is None:
        valid = torch.ones(len(count), tokens, dtype=torch.bool, device=count.device)
    place = (count - first)[:, None] + valid.long().cumsum(1) - 1
    slots = max(1, int(place.max()) + 1)
    target = torch.where(valid, place, slots)  # one slot too many, for padding
    index = place.new_zeros(len(count), slots + 1)
    index.scatter_(1, target, torch.arange(tokens, device=index.device).expand_as(target))
    filled = torch.zeros_like(index, dtype=torch.bool).scatter_(1, target, True)
    index, filled, place = index[:, :-1], filled[:, :-1], place.clamp(0, slots - 1)
    return Slots(
        _parts(first, period, slots),
        first,
        filled,
        lambda states, dim: _take(states, index, dim),
        lambda states, dim: _take(states, place, dim),
    )


def _parts(first: int, period: int, slots: int) -> list[tuple[int, int]]:
    borders = [0, *range(period - first, slots, period), slots]
    return list(pairwise(borders))


def _same(states: Tensor, dim: int) -> Tensor:
    return states


def _take(states: Tensor, index: Tensor, dim: int) -> Tensor:
    shape = [1] * states.ndim
    shape[0], shape[dim] = index.shape
    return torch.take_along_dim(states, index.view(shape), dim)
