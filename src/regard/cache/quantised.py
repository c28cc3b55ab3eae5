"""A store in few bits: older keys and values quantised by transformers' quantised cache layers, the newest as they are.

What is held is quantised in segments, when the call that brought it is over: what a prompt left, then every `residual` new
tokens. A segment is made once and read at every step; only an eviction makes the segments anew (quantising again what is kept).
Positions, statistics and lengths are those of the ragged store, so every scorer and budget rule works on it.

| backend | bits | needs |
|---|---|---|
| `"fp8"` | 8 | nothing more: torch's float8, one scale per segment |
| `"quanto"` | 2, 4 | the package optimum-quanto |
| `"hqq"` | 1, 2, 3, 4, 8 | the package hqq |

Cost: about `bits / 32` of the bytes of float32; each step dequantises what it reads, so this store saves memory and not time.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import cache_utils

from regard._errors import InputError
from regard.cache.store import Rows, attend_row

BACKENDS = {
    "fp8": "Fp8QuantizedLayer",
    "quanto": "QuantoQuantizedLayer",
    "hqq": "HQQQuantizedLayer",
}
PAIR = ("key", "value")


@dataclass(frozen=True)
class Quantised:
    """Keys and values in few bits, in rows of any length.

    Args:
        backend: "fp8", "quanto" or "hqq", as in transformers' `QuantizedCache`.
        bits: of the group-wise backends.
        group: numbers that share a scale, of the group-wise backends.
        residual: newest tokens that stay as they are.

    Raises:
        InputError: a backend that this transformers or this environment does not have.
    """

    backend: str = "fp8"
    bits: int = 4
    group: int = 64
    residual: int = 128

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise InputError.of(
                "backend", given=self.backend, expected=f"one of {', '.join(BACKENDS)}"
            )
        if self.residual < 1:
            raise InputError.of("residual", given=self.residual, expected="at least 1")
        self.coder()

    def coder(self) -> Any:
        """The layer of transformers whose `_quantize` and `_dequantize` do the work."""
        kind = getattr(cache_utils, BACKENDS[self.backend], None)
        if kind is None:
            raise InputError(
                f"this version of transformers has no {BACKENDS[self.backend]}; choose another backend"
            )
        try:
            if self.backend == "fp8":
                return kind()
            return kind(
                nbits=self.bits, axis_key=0, axis_value=0, q_group_size=self.group,
                residual_length=self.residual,
            )  # fmt: skip
        except ImportError as error:
            package = {"quanto": "optimum-quanto", "hqq": "hqq"}[self.backend]
            raise InputError(
                f'backend {self.backend!r} needs the package {package}: pip install {package}, or backend="fp8"'
            ) from error
        except ValueError as error:
            raise InputError(str(error)) from error

    def rows(self, batch: int, heads: int, spare: bool = True) -> QuantisedRows:
        """An empty table for one layer."""
        return QuantisedRows(batch, heads, self)


class Segment(NamedTuple):
    """Quantised keys and values of consecutive slots, rows one after the other."""

    sizes: list[int]
    key: Any
    value: Any


class QuantisedRows(Rows):
    """`Rows` whose own columns "key" and "value" have no width; the numbers are in `segments` and `recent`."""

    def __init__(self, batch: int, heads: int, store: Quantised) -> None:
        super().__init__(batch, heads, spare=False)
        self.store, self.coder = store, store.coder()
        self.segments: list[Segment] = []
        self.recent = Rows(batch, heads)

    def append(self, **new: Tensor) -> None:
        super().append(**{name: values[..., :0] for name, values in new.items()})
        self.recent.append(**new)

    def rest(self) -> None:
        if self.recent.held > self.store.residual:
            self._freeze()

    def _freeze(self) -> None:
        """Quantises what is recent."""
        self.segments.append(self._segment({name: self.recent.packed(name) for name in PAIR}))
        empty = Rows(self.batch, self.heads)
        empty.columns = {name: self.recent.columns[name][:0].clone() for name in PAIR}
        self.recent = empty

    def _segment(self, packed: dict[str, Tensor]) -> Segment:
        like = packed["key"]
        # where the coder looks for device and dtype: on its keys, or on itself before transformers 5.24
        self.coder.keys, self.coder.dtype, self.coder.device = (
            like.new_empty(0),
            like.dtype,
            like.device,
        )
        quantise = self.coder._quantize
        arguments = () if self.store.backend == "fp8" else (0,)
        key, value = (quantise(packed[name][None, None], *arguments) for name in PAIR)
        return Segment(list(self.recent.sizes), key, value)

    def _read(self, segment: Segment, name: str) -> Tensor:
        return self.coder._dequantize(getattr(segment, name))[0, 0]

    def _by_row(self, name: str) -> list[Tensor]:
        """`[length, dim]` for each row."""
        parts = [self._read(segment, name).split(segment.sizes) for segment in self.segments]
        recent = self.recent.columns[name]
        places = zip(self.recent.starts, self.recent.sizes, strict=True)
        parts.append(tuple(recent[start : start + size] for start, size in places))
        return [torch.cat(row) for row in zip(*parts, strict=True)]

    def column(self, name: str) -> Tensor:
        if name not in PAIR:
            return super().column(name)
        rows = self._by_row(name)
        if self.equal:
            return torch.stack(rows).view(self.batch, self.heads, self.held, -1)
        padded = rows[0].new_zeros(len(rows), self.held, rows[0].shape[-1])
        for row, numbers in enumerate(rows):
            padded[row, self.held - len(numbers) :] = numbers
        return padded.view(self.batch, self.heads, self.held, -1)

    def packed(self, name: str) -> Tensor:
        return torch.cat(self._by_row(name)) if name in PAIR else super().packed(name)

    def unpack(self, sizes: list[int], **columns: Tensor) -> None:
        key = columns["key"]
        geometry = {name: columns[name][:, :0] for name in PAIR}
        others = {name: values for name, values in columns.items() if name not in PAIR}
        super().unpack(sizes, **geometry, **others)
        self.segments, self.recent = [], Rows(self.batch, self.heads)
        self.recent.unpack(sizes, key=key, value=columns["value"])
        self.rest()

    def write(self, name: str, values: Tensor) -> None:
        if name not in PAIR:
            super().write(name, values)
            return
        columns = {one: self.packed(one) for one in self.columns}
        columns[name] = values[self.filled]
        self.unpack(list(self.sizes), **columns)

    def keep(self, kept: Tensor) -> None:
        chosen = (kept & self.filled)[self.filled]
        pair = {name: self.packed(name)[chosen] for name in PAIR}
        super().keep(kept)
        self._replace(pair)

    def drop_front(self, slots: int) -> None:
        kept = torch.arange(self.held) >= slots
        self.keep(kept.expand(self.batch, self.heads, -1))

    def drop_back(self, slots: int) -> None:
        kept = torch.arange(self.held) < self.held - slots
        self.keep(kept.expand(self.batch, self.heads, -1))

    def select(self, rows: Tensor) -> None:
        order = rows.tolist()
        if order == list(range(self.batch)):
            return
        chosen = [batch * self.heads + head for batch in order for head in range(self.heads)]
        pair = {}
        for name in PAIR:
            old = self._by_row(name)
            pair[name] = torch.cat([old[row] for row in chosen])
        super().select(rows)
        self._replace(pair)

    def _replace(self, pair: dict[str, Tensor]) -> None:
        """Other keys and values for the rows as they now are."""
        others = {
            name: super(QuantisedRows, self).packed(name)
            for name in self.columns
            if name not in PAIR
        }
        self.unpack(list(self.sizes), **pair, **others)

    def copy(self) -> QuantisedRows:
        twin = QuantisedRows(self.batch, self.heads, self.store)
        twin.columns = {name: flat.clone() for name, flat in self.columns.items()}
        twin.room = self.room
        twin._place(list(self.starts), list(self.sizes))
        twin.segments = copy.deepcopy(self.segments)
        twin.recent = self.recent.copy()
        return twin

    @property
    def pair_bytes(self) -> int:
        numbers = sum(self.recent.columns[name].shape[1] for name in PAIR)
        if self.store.backend == "fp8":
            return numbers
        # scale and zero of each group beside the bits
        return math.ceil(numbers * (self.store.bits / 8 + 8 / self.store.group))

    @property
    def nbytes(self) -> int:
        coded = [tensor for segment in self.segments for tensor in _tensors(segment[1:])]
        return super().nbytes + self.recent.nbytes + sum(tensor.nbytes for tensor in coded)

    def attend(self, query: Tensor, scaling: float) -> Tensor:
        batch, heads, _, dim = query.shape
        folded = query.reshape(batch * self.heads, heads // self.heads, dim)
        rows = zip(folded, self._by_row("key"), self._by_row("value"), strict=True)
        mixed = [attend_row(one[None], key[None], value[None], scaling) for one, key, value in rows]
        return torch.cat(mixed).view(batch, heads, 1, -1)


def _tensors(coded: Any) -> Iterator[Tensor]:
    """Every plain tensor inside a backend's own objects."""
    if hasattr(coded, "__tensor_flatten__"):
        for name in coded.__tensor_flatten__()[0]:
            yield from _tensors(getattr(coded, name))
    elif isinstance(coded, Tensor):
        yield coded
    elif isinstance(coded, dict):
        for part in coded.values():
            yield from _tensors(part)
    elif isinstance(coded, tuple | list):
        for part in coded:
            yield from _tensors(part)
