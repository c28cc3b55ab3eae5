"""Chunks of different lengths: which chunk a token is in, what a chunk looks like, what its tokens inherit.

A sequence of L tokens is cut at `cuts` `[chunks + 1]`, ascending from 0 to L; chunk c holds the tokens cuts[c] .. cuts[c+1] - 1.

    k_c = sqrt(n_c) * mean of the chunk's keys            (n_c its number of tokens)
    s_{m,j} = q_m . k_{chunk(j)}                          for every token j

The mean of n unrelated vectors shrinks as 1 / sqrt(n), so without the root long chunks would look unimportant because they are
long. Source: arXiv 2510.24606.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from regard._errors import InputError


def check_cuts(cuts: Int[Tensor, " ends"], length: int) -> None:
    """Raises `InputError` unless `cuts` runs, strictly rising, from 0 to `length`."""
    if (
        len(cuts) < 2
        or int(cuts[0]) != 0
        or int(cuts[-1]) != length
        or bool((cuts.diff() < 1).any())
    ):
        raise InputError.of(
            "cuts", given=cuts.tolist(), expected=f"strictly rising from 0 to {length}"
        )


def equal_cuts(length: int, size: int) -> Int[Tensor, " ends"]:
    """Cuts after every `size` tokens; the last chunk may be shorter.

    >>> equal_cuts(7, 3).tolist()
    [0, 3, 6, 7]
    """
    return torch.tensor([*range(0, length, size), length])


def chunk_index(cuts: Int[Tensor, " ends"]) -> Int[Tensor, " length"]:
    """The chunk of every token.

    >>> import torch
    >>> chunk_index(torch.tensor([0, 2, 5])).tolist()
    [0, 0, 1, 1, 1]
    """
    return torch.repeat_interleave(cuts.diff())


def chunk_mean(
    vectors: Float[Tensor, "length dim"], cuts: Int[Tensor, " ends"]
) -> Float[Tensor, "chunks dim"]:
    """The mean vector of every chunk, summed in float32 at least; O(length x dim)."""
    check_cuts(cuts, len(vectors))
    vectors = vectors if vectors.dtype == torch.float64 else vectors.float()
    sums = vectors.new_zeros(len(cuts) - 1, vectors.shape[1])
    return sums.index_add(0, chunk_index(cuts), vectors) / cuts.diff()[:, None]


def chunk_representation(
    vectors: Float[Tensor, "length dim"], cuts: Int[Tensor, " ends"]
) -> Float[Tensor, "chunks dim"]:
    """The mean vector of every chunk times the root of its length; O(length x dim).

    >>> import torch
    >>> chunk_representation(torch.ones(5, 1), torch.tensor([0, 1, 5])).flatten().tolist()
    [1.0, 2.0]
    """
    return chunk_mean(vectors, cuts) * cuts.diff().sqrt()[:, None]


def upsample_chunk_scores(
    scores: Float[Tensor, "blocks chunks"], cuts: Int[Tensor, " ends"]
) -> Float[Tensor, "blocks length"]:
    """Gives every token the score of its chunk; O(blocks x length).

    >>> import torch
    >>> upsample_chunk_scores(torch.tensor([[1.0, 2.0]]), torch.tensor([0, 1, 3])).tolist()
    [[1.0, 2.0, 2.0]]
    """
    return scores[:, chunk_index(cuts)]
