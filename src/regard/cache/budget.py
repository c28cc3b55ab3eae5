"""A budget rule says how many keys each KV head of each layer may keep.

Its size is a fraction of the tokens seen (0.2), a number of tokens per KV head (512), or memory ("64MB"); what differs between
rules is how that total is divided. This file is their common part; `regard.cache.budgets` has the rules.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from regard._errors import InputError

if TYPE_CHECKING:
    from regard.cache.layer import Layer

_UNITS = {"": 1, "K": 1000, "KI": 1024, "M": 1000**2, "MI": 1024**2, "G": 1000**3, "GI": 1024**3}


@dataclass(frozen=True)
class Room:
    """What a rule divides.

    Attributes:
        tokens: `[batch]`, how many slots a KV head may keep on average over all layers, sinks and window included.
        layers: the layers asked about, in the model's order; `layers[i].index` is the layer's number in the model.
        total: how many layers the budget is for in all (more than `layers` while a prefill is still under way).
        protected: for each of `layers`, `[batch, kv_heads]`: slots kept before all others (sinks and window).
        decoding: whether this is a decoding step (one new token a row) rather than a prompt or a part of one.
    """

    tokens: Int[Tensor, "batch"]
    layers: Sequence[Layer]
    total: int
    protected: Sequence[Int[Tensor, "batch _kv_heads"]]
    decoding: bool = False


@dataclass(frozen=True)
class Budget:
    """Base of the rules: override `counts`, and say in `scope` when it can be asked.

    Attributes:
        size: a fraction in (0, 1] of the tokens seen, a number of tokens per KV head, or bytes such as "64MB".
        scope: "layer": each layer is asked about alone, as soon as it has run; "cascade": after each layer, all layers so
            far are asked about again (while decoding, each alone); "model": all layers at once, when the last one has run.
    """

    size: float | int | str
    scope: ClassVar[Literal["layer", "cascade", "model"]] = "layer"

    def __post_init__(self) -> None:
        check_size(self.size)

    def counts(
        self, scores: Sequence[Float[Tensor, "batch _kv_heads _held"]], room: Room
    ) -> list[Int[Tensor, "batch _kv_heads"]]:
        """How many slots each KV head keeps, for each of `room.layers`, protected ones included.

        `scores` are the scorer's with +inf at protected slots and -inf at slots that hold nothing. The cache keeps the best
        `counts` slots of every head: its sinks, then its newest slots, then by score. Counts are brought into `[sinks, held]`
        but not moved between heads.
        """
        raise NotImplementedError(f"{type(self).__name__} has no counts")


def check_size(size: float | int | str) -> None:
    """Raises InputError unless `size` is a fraction, a number of tokens or an amount of memory."""
    expected = 'a fraction in (0, 1], a number of tokens >= 1 or bytes such as "64MB"'
    if isinstance(size, str):
        if bytes_of(size) < 1:
            raise InputError.of("budget", given=size, expected=expected)
    elif isinstance(size, bool) or not isinstance(size, int | float):
        raise InputError.of("budget", given=size, expected=expected)
    elif isinstance(size, int):
        if size < 1:
            raise InputError.of("budget", given=size, expected=expected)
    elif not 0 < size <= 1:
        fix = f"for tokens write {round(size)}" if size > 1 else ""
        raise InputError.of("budget", given=size, expected=expected, fix=fix)


def bytes_of(text: str) -> int:
    """The number of bytes in "64MB", "1.5 GiB" or "4096".

    >>> bytes_of("64MB"), bytes_of("1.5 KiB")
    (64000000, 1536)
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]?I?)B?\s*", text.upper())
    if match is None or match[2] == "I":
        raise InputError.of("budget", given=text, expected='bytes such as "64MB" or "1.5GiB"')
    return int(float(match[1]) * _UNITS[match[2]])


def tokens_of(
    size: float | int | str, seen: Int[Tensor, "batch"], slot_bytes: int
) -> Int[Tensor, "batch"]:
    """The slots per KV head that `size` allows each row, between 1 and the tokens seen.

    `slot_bytes` is what one more token costs in all layers and KV heads of one row.

    >>> tokens_of(0.2, torch.tensor([10, 1000]), 512)
    tensor([  2, 200])
    """
    if isinstance(size, str):
        allowed = torch.full_like(seen, bytes_of(size) // (slot_bytes * len(seen)))
    elif isinstance(size, int):
        allowed = torch.full_like(seen, size)
    else:
        allowed = (seen.double() * size).round().long()
    return torch.minimum(allowed.clamp(min=1), seen)
