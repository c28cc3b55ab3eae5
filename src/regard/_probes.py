"""Token sequences with a known right answer: random tokens, and random tokens repeated.

A second copy of random tokens can be predicted only by looking back at the first, which is what
induction heads do (Olsson et al. 2022, "In-context Learning and Induction Heads").
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from regard._errors import InputError


@dataclass(frozen=True)
class InductionBatch:
    """Blocks of random tokens, repeated.

    `tokens` `[batch, prefix + repeats * length]`: `prefix` special tokens that the tokenizer puts
    first (0 or more), then one block of `length` different tokens, `repeats` times. From position
    `prefix + length` on, the token at `t` is predicted by looking at `t - length + 1` (induction);
    `t - length` is the same token (duplicate); `t - 1` is the previous one.
    """

    tokens: Int[Tensor, "batch sequence"]
    prefix: int
    length: int
    repeats: int

    @property
    def second(self) -> slice:
        """The positions whose token occurred before."""
        return slice(self.prefix + self.length, None)


def random_tokens(
    tokenizer: Any, length: int, batch: int = 1, seed: int = 0
) -> Int[Tensor, "batch length"]:
    """Different ordinary tokens in random order, without special tokens.

    Args:
        tokenizer: a tokenizer, or a vocabulary size (then every id below it is ordinary).
        length: tokens in each row; all different within a row.
        batch: rows.
        seed: of the draw.

    Raises:
        InputError: the vocabulary has fewer than `length` ordinary tokens.
    """
    ordinary = _ordinary(tokenizer)
    if not 0 < length <= len(ordinary):
        raise InputError.of("length", given=length, expected=f"in 1..{len(ordinary)}")
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randperm(len(ordinary), generator=generator)[:length] for _ in range(batch)]
    return ordinary[torch.stack(rows)]


def repeated_random_tokens(
    tokenizer: Any, length: int, repeats: int = 2, batch: int = 1, seed: int = 0
) -> Int[Tensor, "batch sequence"]:
    """`random_tokens` of the given length, `repeats` times in a row: `[batch, repeats * length]`.

    >>> repeated_random_tokens(50, length=2, repeats=3).shape
    torch.Size([1, 6])
    """
    if repeats < 1:
        raise InputError.of("repeats", given=repeats, expected="at least 1")
    return random_tokens(tokenizer, length, batch, seed).repeat(1, repeats)


def induction_batch(
    tokenizer: Any, length: int = 64, repeats: int = 2, batch: int = 8, seed: int = 0
) -> InductionBatch:
    """Repeated random tokens behind whatever special tokens the tokenizer puts first."""
    tokens = repeated_random_tokens(tokenizer, length, repeats, batch, seed)
    prefix = _prefix(tokenizer)
    front = torch.tensor(prefix, dtype=tokens.dtype).expand(batch, -1)
    return InductionBatch(torch.cat([front, tokens], dim=1), len(prefix), length, repeats)


def _ordinary(tokenizer: Any) -> Int[Tensor, " ids"]:
    if isinstance(tokenizer, int):
        return torch.arange(tokenizer)
    special = set(tokenizer.all_special_ids) | set(getattr(tokenizer, "added_tokens_decoder", {}))
    return torch.tensor([id for id in range(len(tokenizer)) if id not in special])


def _prefix(tokenizer: Any) -> list[int]:
    if isinstance(tokenizer, int):
        return []
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    return full[: next(i for i in range(len(full)) if full[i : i + len(bare)] == bare)]
