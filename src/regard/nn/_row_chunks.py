"""Chunks of tokens that begin at every row's own first token, whatever padding and earlier calls did to the rows of a batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True, slots=True)
class RowChunks:
    """Where the tokens of a call stand in the chunks of their rows; chunk 0 is the one that earlier calls left unfinished.

    Attributes:
        size: tokens of a chunk.
        place: of each token, from the start of chunk 0; padding has that of the token before it.
        count: tokens from there, those of earlier calls included.
        valid: which tokens are no padding; None for all.
    """

    size: int
    place: Int[Tensor, "batch tokens"]
    count: Int[Tensor, " batch"]
    valid: Bool[Tensor, "batch tokens"] | None

    @classmethod
    def of(
        cls,
        hidden: Float[Tensor, "batch tokens width"],
        size: int,
        begun: Int[Tensor, " batch"] | None,
        valid: Bool[Tensor, "batch tokens"] | None,
    ) -> RowChunks:
        """Chunks of rows that hold `begun` tokens of an unfinished one.

        >>> RowChunks.of(torch.zeros(1, 5, 1), 3, torch.tensor([2]), None).index
        tensor([[0, 1, 1, 1, 2]])
        """
        batch, tokens, _ = hidden.shape
        if begun is None:
            begun = torch.zeros(batch, dtype=torch.long, device=hidden.device)
        if valid is None:
            steps = torch.arange(1, tokens + 1, device=hidden.device).expand(batch, tokens)
        else:
            steps = valid.long().cumsum(1)
        count = begun[:, None] + steps
        return cls(size, (count - 1).clamp(min=0), count[:, -1], valid)

    @property
    def index(self) -> Int[Tensor, "batch tokens"]:
        """The chunk of each token."""
        return self.place // self.size

    @property
    def running(self) -> Int[Tensor, " batch"]:
        """The chunk of each row that the next token falls into."""
        return self.count // self.size

    @property
    def number(self) -> int:
        """Chunks of the longest row, that of its next token included."""
        return int(self.running.max()) + 1

    def sums(
        self,
        hidden: Float[Tensor, "batch tokens width"],
        partial: Float[Tensor, "batch width"] | None,
    ) -> Float[Tensor, "batch chunks width"]:
        """The sum of each chunk's tokens; `partial` is what earlier calls summed of chunk 0."""
        if self.valid is not None:
            hidden = hidden.masked_fill(~self.valid[..., None], 0)
        batch, _, width = hidden.shape
        total = hidden.new_zeros(batch, self.number, width)
        if partial is not None:
            total[:, 0] = partial
        return total.scatter_add(1, self.index[..., None].expand_as(hidden), hidden)

    def of_token(self, chunks: Tensor) -> Tensor:
        """What belongs to the chunk of each token, `[batch, tokens, ...]` of `[batch, chunks, ...]`."""
        return pick(chunks, self.index)

    def of_running(self, chunks: Tensor) -> Tensor:
        """What belongs to the running chunk of each row, `[batch, ...]`."""
        return pick(chunks, self.running[:, None])[:, 0]

    def lay_out(self, states: Tensor) -> Tensor:
        """Tokens in their chunks, `[batch, chunks, size, ...]` of `[batch, tokens, ...]`, zeros where there is none."""
        slots = self.number * self.size
        target = self.place if self.valid is None else self.place.where(self.valid, slots)
        out = states.new_zeros(len(states), slots + 1, *states.shape[2:])  # one more, for padding
        index = target.view(*target.shape, *[1] * (states.ndim - 2)).expand_as(states)
        return out.scatter(1, index, states)[:, :slots].unflatten(1, (-1, self.size))

    def take_back(self, laid: Tensor) -> Tensor:
        """The inverse of `lay_out`; padding gets what is its neighbour's."""
        return pick(laid.flatten(1, 2), self.place)


def pick(chunks: Tensor, index: Int[Tensor, "batch picked"]) -> Tensor:
    """`chunks[row, index[row]]` of every row."""
    return chunks.take_along_dim(index.view(*index.shape, *[1] * (chunks.ndim - 2)), 1)
