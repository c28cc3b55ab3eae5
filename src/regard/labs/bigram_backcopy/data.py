"""The Bigram-Backcopy language, with transitions counted in text that ships with Python."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from regard import texts
from regard._errors import InputError


@dataclass(frozen=True, slots=True)
class Backcopy:
    """A language over V symbols; <s> has the number V.

    Attributes:
        transition: P, `[V, V]`, rows that sum to 1.
        marginal: pi, `[V]`.
        triggers: how many of the most frequent symbols are triggers, k.
    """

    transition: Float[Tensor, "V V"]
    marginal: Float[Tensor, " V"]
    triggers: int

    def __post_init__(self) -> None:
        if not 1 <= self.triggers < len(self.marginal):
            raise InputError.of(
                "triggers", given=self.triggers, expected=f"1 to {len(self.marginal) - 1}"
            )

    @property
    def is_trigger(self) -> Bool[Tensor, " longer"]:
        """Which symbols are triggers, `[V + 1]`; <s> is none."""
        found = torch.zeros(len(self.marginal) + 1, dtype=torch.bool)
        found[self.marginal.topk(self.triggers).indices] = True
        return found

    def draw(
        self, count: int, length: int, generator: torch.Generator
    ) -> Int[Tensor, "count length"]:
        """`count` sequences of `length` symbols, <s> included."""
        trigger = self.is_trigger
        first = torch.where(trigger[:-1], 0, self.marginal)
        table = self.transition.cumsum(1)
        ids = torch.full((count, length), len(self.marginal))
        ids[:, 1] = torch.multinomial(first, count, replacement=True, generator=generator)
        chance = torch.rand(count, length, generator=generator, dtype=table.dtype)
        last = len(self.marginal) - 1
        for i in range(1, length - 1):
            now = ids[:, i]
            drawn = (table[now] <= chance[:, i : i + 1]).sum(1).clamp_max(last)
            ids[:, i + 1] = torch.where(trigger[now], ids[:, i - 1], drawn)
        return ids

    def surprise(self, ids: Int[Tensor, "*batch longer"]) -> Float[Tensor, "*batch length"]:
        """Least possible expected loss of each query in nats: 0 at triggers, H(P[x, .]) elsewhere, H(x_1) at <s>."""
        first = torch.where(self.is_trigger[:-1], 0, self.marginal)
        rows = torch.cat([self.transition, (first / first.sum())[None]])
        entropy = torch.special.entr(rows).sum(1)
        entropy = torch.where(self.is_trigger, 0, entropy)
        return entropy[ids[..., :-1]]


def transitions(symbols: int = 32, characters: int = 120_000) -> tuple[Tensor, Tensor]:
    """P and pi from the pairs of characters in English prose, lower case, kept to the most frequent ones.

    Raises:
        InputError: fewer symbols in the text than asked for.
    """
    text = texts.prose(characters).lower()
    common = [c for c, _ in Counter(text).most_common(symbols)]
    if len(common) < symbols or symbols < 4:
        raise InputError.of("symbols", given=symbols, expected=f"4 to {len(common)}")
    number = {c: i for i, c in enumerate(common)}
    kept = torch.tensor([number[c] for c in text if c in number])
    pairs = torch.bincount(kept[:-1] * symbols + kept[1:], minlength=symbols**2)
    counts = pairs.view(symbols, symbols).float() + 0.01  # no pair is impossible
    return counts / counts.sum(1, keepdim=True), counts.sum(1) / counts.sum()


def backcopy(symbols: int = 32, triggers: int = 3) -> Backcopy:
    """The language with `symbols` characters and the `triggers` most frequent of them as triggers."""
    return Backcopy(*transitions(symbols), triggers)
