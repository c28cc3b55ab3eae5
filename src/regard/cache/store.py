"""How held keys lie in memory: one growing table per layer, whose rows (one per batch row and KV head) have lengths of their own.

All rows of a column ("key", "value", ...) lie one after the other in one flat buffer, each followed by the same number of free
slots. A new token is written into the free slots, and the buffer is made anew, a sixteenth larger, only when they are used up.
Rows of equal length are a strided view of the buffer, so they need no copy and one packed product; dropping a key frees
its memory.

    row 0: k k k k k . .    row 1: k k k . .    row 2: k k k k k k k . .       (k held, . free)

Where a rectangular tensor is asked for, rows are aligned at their ends: padding, if any, comes first.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from regard._errors import InputError

LEAST_ROOM = 32
"""Free slots a row gets at least when its buffer is made anew."""


@dataclass(frozen=True)
class Ragged:
    """Keys and values as they are, in rows of any length.

    Cost: `bytes = rows x (mean length + free) x (dim + value_dim) x itemsize`; decoding reads every held number once.

    Args:
        growth: free slots added when a buffer is full, as a share of its mean row length.
    """

    growth: float = 1 / 16

    def __post_init__(self) -> None:
        if not 0 < self.growth <= 1:
            raise InputError.of("growth", given=self.growth, expected="a share in (0, 1]")

    def rows(self, batch: int, heads: int, spare: bool = True) -> Rows:
        """An empty table for one layer; without `spare`, its first buffer is filled by the first tokens."""
        return Rows(batch, heads, self.growth, spare)


class Rows:
    """A table of `batch x heads` rows of different lengths; see the module's text for the layout."""

    def __init__(self, batch: int, heads: int, growth: float = 1 / 16, spare: bool = True) -> None:
        self.batch, self.heads, self.growth, self.spare = batch, heads, growth, spare
        self.columns: dict[str, Tensor] = {}
        self.room = 0
        self._place([0] * (batch * heads), [0] * (batch * heads))

    def _place(self, starts: list[int], sizes: list[int]) -> None:
        self.starts, self.sizes = starts, sizes
        self.held = max(sizes, default=0)
        self.equal = min(sizes, default=0) == self.held
        self._ends: Tensor | None = None
        self._index: Tensor | None = None

    @property
    def lengths(self) -> Int[Tensor, "batch heads"]:
        """Slots held by each row."""
        return torch.tensor(self.sizes).view(self.batch, self.heads)

    @property
    def filled(self) -> Bool[Tensor, "batch heads held"]:
        """False where a rectangular column has only padding."""
        lengths = self.lengths[..., None]
        return (torch.arange(self.held) >= self.held - lengths).to(self._device)

    @property
    def _device(self) -> torch.device:
        return next((c.device for c in self.columns.values()), torch.device("cpu"))

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers, free slots included."""
        return sum(column.nbytes for column in self.columns.values())

    @property
    def pair_bytes(self) -> int:
        """Bytes of one key and its value."""
        pair = (self.columns["key"], self.columns["value"])
        return sum(column.shape[1] * column.element_size() for column in pair)

    def column(self, name: str) -> Tensor:
        """`[batch, heads, held, ...]`: a view when all rows are equally long, else a copy with zeros as padding."""
        flat = self.columns[name]
        if self.equal:
            return self._view(flat)[:, :, self._first : self._first + self.held]
        padded = flat.index_select(0, self._padded_index().flatten())
        padded = padded.view(self.batch, self.heads, self.held, *flat.shape[1:])
        hidden = ~self.filled
        return padded.masked_fill_(hidden.view(*hidden.shape, *[1] * (flat.dim() - 1)), 0)

    @property
    def _first(self) -> int:
        """The slot at which every row of an equal table starts in its part of the buffer."""
        return self.starts[0]

    def _view(self, flat: Tensor, batch: int | None = None) -> Tensor:
        batch = batch or self.batch
        width = flat.shape[0] // (batch * self.heads)
        return flat.view(batch, self.heads, width, *flat.shape[1:])

    def _padded_index(self) -> Tensor:
        """`[batch * heads, held]`: where each slot of a rectangular column lies; padding points at the row's start."""
        if self._index is None:
            starts = torch.tensor(self.starts)[:, None]
            shift = torch.tensor(self.sizes)[:, None] - self.held
            slots = torch.arange(self.held) + shift
            last = (
                next(iter(self.columns.values())).shape[0] - 1
            )  # an empty row may start behind it
            self._index = (starts + slots.clamp(min=0)).clamp(max=last).to(self._device)
        return self._index

    def append(self, **new: Tensor) -> None:
        """Adds tokens `[batch, heads, tokens, ...]` at the end of all rows; columns that are not given get no value yet."""
        tokens = next(iter(new.values())).shape[2]
        if not self.columns:
            self.columns = {
                name: values.new_empty((0, *values.shape[3:])) for name, values in new.items()
            }
        if self.room < tokens:
            self._grow(tokens)
        ends = None
        if self.equal:
            first = self._first + self.held
            for name, values in new.items():
                self._view(self.columns[name]).narrow(2, first, tokens).copy_(values)
        else:
            ends = self._ends_index()
            index = ends
            if tokens > 1:
                index = (ends[:, None] + torch.arange(tokens, device=ends.device)).flatten()
            for name, values in new.items():
                flat = self.columns[name]
                flat.index_copy_(0, index, values.flatten(0, 2).to(flat.dtype))
        self._place(self.starts, [size + tokens for size in self.sizes])
        self._ends = None if ends is None else ends + tokens
        self.room -= tokens

    def _ends_index(self) -> Tensor:
        if self._ends is None:
            ends = [start + size for start, size in zip(self.starts, self.sizes, strict=True)]
            self._ends = torch.tensor(ends, device=self._device)
        return self._ends

    def _grow(self, tokens: int) -> None:
        """New buffers with room for `tokens` more and some to spare."""
        total = sum(self.sizes)
        mean = total / len(self.sizes) + tokens
        room = tokens
        if total or self.spare:
            room += max(LEAST_ROOM, int(mean * self.growth))
        starts, at = [], 0
        for size in self.sizes:
            starts.append(at)
            at += size + room
        for name, flat in self.columns.items():
            new = flat.new_empty((at, *flat.shape[1:]))
            if total and self.equal:
                old = self._view(flat)[:, :, self._first : self._first + self.held]
                self._view(new)[:, :, : self.held] = old
            elif total:
                for start, origin, size in zip(starts, self.starts, self.sizes, strict=True):
                    new[start : start + size] = flat[origin : origin + size]
            self.columns[name] = new
        self.room = room
        self._place(starts, self.sizes)

    def add_column(self, name: str, values: Tensor) -> None:
        """A further column, given as a rectangle `[batch, heads, held, ...]`."""
        slots = next(iter(self.columns.values())).shape[0]
        flat = values.new_zeros((slots, *values.shape[3:]))
        flat[self._padded_index()[self.filled.flatten(0, 1)]] = values[self.filled]
        self.columns[name] = flat

    def write_newest(self, name: str, values: Tensor) -> None:
        """Fills the newest slots of every row of a column, `[batch, heads, newest, ...]`."""
        newest, flat = values.shape[2], self.columns[name]
        if self.equal:
            self.column(name)[:, :, -newest:] = values
        else:
            index = self._ends_index()[:, None] + torch.arange(-newest, 0, device=self._device)
            flat.index_copy_(0, index.flatten(), values.flatten(0, 2).to(flat.dtype))

    def write(self, name: str, values: Tensor) -> None:
        """Replaces a column by a rectangle `[batch, heads, held, ...]`."""
        if self.equal:
            self.column(name).copy_(values)
        else:
            self.columns[name][self._padded_index()[self.filled.flatten(0, 1)]] = values[
                self.filled
            ].to(self.columns[name].dtype)

    def keep(self, kept: Bool[Tensor, "batch heads held"]) -> None:
        """Drops every slot that is False in `kept`; the buffers then hold what is kept and no more."""
        kept = kept & self.filled
        index = self._padded_index().view(kept.shape)[kept]
        for name, flat in self.columns.items():
            self.columns[name] = flat.index_select(0, index)
        self.room = 0
        self._close_up(kept.sum(-1).flatten().tolist())

    def _close_up(self, sizes: list[int]) -> None:
        starts, at = [], 0
        for size in sizes:
            starts.append(at)
            at += size
        self._place(starts, sizes)

    def rest(self) -> None:
        """A call is over: the moment to bring what is held into its lasting form."""

    def drop_front(self, slots: int) -> None:
        """Forgets the oldest slots of every row of an equal table; their memory goes when the buffer is made anew."""
        self._place([start + slots for start in self.starts], [size - slots for size in self.sizes])

    def drop_back(self, slots: int) -> None:
        """Forgets the newest slots of every row."""
        self._place(self.starts, [size - slots for size in self.sizes])
        self.room += slots

    def select(self, rows: Int[Tensor, "chosen"]) -> None:
        """The batch becomes the given rows of it, in this order (repeats allowed)."""
        order = rows.tolist()
        if order == list(range(self.batch)):
            return
        sizes = [self.sizes[b * self.heads + h] for b in order for h in range(self.heads)]
        self.batch = len(order)
        if self.equal:
            for name, flat in self.columns.items():
                chosen = self._view(flat, len(self.sizes) // self.heads)
                self.columns[name] = chosen.index_select(0, rows.to(flat.device)).flatten(0, 2)
            width = self.held + self.room + self._first
            self._place([self._first + width * row for row in range(len(sizes))], sizes)
            return
        parts = [
            torch.arange(self.starts[row], self.starts[row] + self.sizes[row])
            for b in order
            for row in range(b * self.heads, (b + 1) * self.heads)
        ]
        index = torch.cat(parts).to(self._device)
        for name, flat in self.columns.items():
            self.columns[name] = flat.index_select(0, index)
        self.room = 0
        self._close_up(sizes)

    def copy(self) -> Rows:
        """An independent copy."""
        twin = Rows(self.batch, self.heads, self.growth, self.spare)
        twin.columns = {name: flat.clone() for name, flat in self.columns.items()}
        twin.room = self.room
        twin._place(list(self.starts), list(self.sizes))
        return twin

    def packed(self, name: str) -> Tensor:
        """`[sum of lengths, ...]`: the rows of a column one after the other."""
        return self.columns[name][self._padded_index()[self.filled.flatten(0, 1)]]

    def unpack(self, sizes: list[int], **columns: Tensor) -> None:
        """Takes over columns that `packed` gave."""
        self.columns, self.room = dict(columns), 0
        self._close_up(sizes)

    def attend(
        self, query: Float[Tensor, "batch all_heads 1 dim"], scaling: float
    ) -> Float[Tensor, "batch all_heads 1 value_dim"]:
        """One new token of each row over everything that its row holds.

        Grouped query heads are folded into rows, so that a KV head is read once. Rows of equal length are one product; rows
        of different lengths are one each.
        """
        key, value = self.columns["key"], self.columns["value"]
        batch, heads, _, dim = query.shape
        folded = query.reshape(batch * self.heads, heads // self.heads, dim)
        if self.equal:
            span = slice(self._first, self._first + self.held)
            rows = len(self.sizes)
            mixed = attend_row(
                folded,
                key.view(rows, -1, dim)[:, span],
                value.view(rows, -1, value.shape[-1])[:, span],
                scaling,
            )
        else:
            mixed = torch.cat(
                [
                    attend_row(
                        folded[row : row + 1],
                        key[start : start + size].unsqueeze(0),
                        value[start : start + size].unsqueeze(0),
                        scaling,
                    )
                    for row, (start, size) in enumerate(zip(self.starts, self.sizes, strict=True))
                ]
            )
        return mixed.view(batch, heads, 1, -1)


def attend_row(
    query: Float[Tensor, "rows group dim"],
    key: Float[Tensor, "rows held dim"],
    value: Float[Tensor, "rows held value_dim"],
    scaling: float,
) -> Tensor:
    """Two batched products, the fastest way to read long rows once; reduced precision has its fused kernel."""
    if query.dtype in (torch.float32, torch.float64):
        scores = torch.bmm(query * scaling, key.transpose(1, 2))
        return torch.bmm(torch.softmax(scores, -1), value)
    return scaled_dot_product_attention(query[None], key[None], value[None], scale=scaling)[0]
