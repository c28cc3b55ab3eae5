"""Product keys: the best of n^2 keys, found among 2 n.

    key (i, j) = [a_i, b_j];      score of a query q = [q_1, q_2]:   q . key (i, j) = q_1 . a_i + q_2 . b_j

The k best pairs are made of the k best a_i and the k best b_j: whoever else were part of a pair, k pairs would be better. So
k^2 candidates are scored in place of n^2.

Source: Lample et al. 2019, "Large Memory Layers with Product Keys", arXiv 1907.05242.
"""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Float, Int
from torch import Tensor

from regard._errors import InputError


class ProductKeys(NamedTuple):
    """The keys that a query picks: their scores, highest first, and numbers, i n + j for the pair (i, j)."""

    scores: Float[Tensor, "*queries picked"]
    pairs: Int[Tensor, "*queries picked"]


def product_key_search(
    query: Float[Tensor, "*queries dim"],
    first: Float[Tensor, "keys half"],
    second: Float[Tensor, "keys half"],
    *,
    half_k: int,
    picked: int | None = None,
) -> ProductKeys:
    """The best pairs among those of the `half_k` best first and the `half_k` best second keys.

    Args:
        query: its first half meets `first`, its second half `second`.
        first: a.
        second: b.
        half_k: keys that each half proposes.
        picked: pairs that are returned, all half_k^2 by default. With `half_k` or fewer they are the best of all n^2.

    Cost: n dim multiplications a query and two selections.

    Raises:
        InputError: keys that are not half as wide as queries, or numbers to pick out of range.

    >>> import torch
    >>> keys = torch.eye(2)
    >>> product_key_search(torch.tensor([4.0, 1.0, 0.0, 2.0]), keys, keys, half_k=2)
    ProductKeys(scores=tensor([6., 4., 3., 1.]), pairs=tensor([1, 0, 3, 2]))
    """
    keys, half = first.shape
    if query.shape[-1] != 2 * half or second.shape != first.shape:
        raise InputError(
            f"queries {tuple(query.shape)} must be twice as wide as both {tuple(first.shape)} and {tuple(second.shape)} keys"
        )
    if not 1 <= half_k <= keys:
        raise InputError.of("half_k", given=half_k, expected=f"within 1 .. {keys} keys")
    picked = half_k**2 if picked is None else picked
    if not 1 <= picked <= half_k**2:
        raise InputError.of("picked", given=picked, expected=f"within 1 .. {half_k**2} candidates")
    left, right = query.split(half, -1)
    one, i = (left @ first.mT).topk(half_k, -1)
    two, j = (right @ second.mT).topk(half_k, -1)
    sums = (one[..., :, None] + two[..., None, :]).flatten(-2)
    pairs = (i[..., :, None] * keys + j[..., None, :]).flatten(-2)
    scores, best = sums.topk(picked, -1)
    return ProductKeys(scores, pairs.gather(-1, best))
