"""Synthetic tasks and text on which mixers are compared: each draws as many samples as are wanted, from a seed.

| task | the sample | asked | what it takes |
|---|---|---|---|
| `recall` | pairs k v among filler, then keys again | the value of each | content-dependent lookup (MQAR, arXiv 2312.04927) |
| `selective_copy` | tokens among blanks, then a mark | the tokens, in order | choosing by content (arXiv 2312.00752) |
| `induction` | random tokens, one pair repeated | the token after the repeated one | a match and a step (arXiv 2209.11895) |
| `needle` | a marked value early in filler, a question at the end | the value | memory over a distance |
| `characters` | windows of English or of code, as bytes | every next byte | language |

Labels are aligned with the tokens (a model shifts them); -100 is not asked.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from regard import texts
from regard._errors import InputError

IGNORED = -100


@dataclass(frozen=True, slots=True)
class Samples:
    """Token ids and what is asked of them, `[count, length]` each; `labels` is -100 where nothing is asked."""

    ids: Int[Tensor, "count length"]
    labels: Int[Tensor, "count length"]


@dataclass(frozen=True, slots=True)
class Task:
    """A source of samples.

    Attributes:
        name: what it is called.
        vocabulary: size of the vocabulary.
        length: tokens of a sample.
        make: `(count, generator, held_out) -> Samples`.
    """

    name: str
    vocabulary: int
    length: int
    make: Callable[[int, torch.Generator, bool], Samples]

    def draw(self, count: int, seed: int, *, held_out: bool = False) -> Samples:
        """`count` samples; the same seed gives the same ones. `held_out` text is never drawn for training.

        >>> task = recall(vocabulary=16, length=12, pairs=2)
        >>> torch.equal(task.draw(3, 0).ids, task.draw(3, 0).ids)
        True
        """
        return self.make(count, torch.Generator().manual_seed(seed), held_out)

    @torch.no_grad()
    def evaluate(
        self, model: nn.Module, count: int = 256, seed: int = 10**6, *, batch: int = 32
    ) -> tuple[float, float]:
        """Share of asked tokens that are right, and mean nats of each, on held-out samples."""
        samples = self.draw(count, seed, held_out=True)
        was, right, nats, asked = model.training, 0, 0.0, 0
        model.eval()
        for ids, labels in zip(samples.ids.split(batch), samples.labels.split(batch), strict=True):
            output: Any = model(ids)
            logits, wanted = output.logits[:, :-1], labels[:, 1:]
            chosen = wanted != IGNORED
            right += int((logits.argmax(-1) == wanted)[chosen].sum())
            nats += float(
                nn.functional.cross_entropy(logits[chosen], wanted[chosen], reduction="sum")
            )
            asked += int(chosen.sum())
        model.train(was)
        return right / asked, nats / asked

    def accuracy(self, model: nn.Module, count: int = 256, seed: int = 10**6) -> float:
        """Share of asked tokens that are right, on held-out samples."""
        return self.evaluate(model, count, seed)[0]

    def loss(self, model: nn.Module, count: int = 256, seed: int = 10**6) -> float:
        """Mean nats of an asked token, on held-out samples."""
        return self.evaluate(model, count, seed)[1]


def recall(vocabulary: int = 64, length: int = 128, pairs: int = 8, *, spread: bool = True) -> Task:
    """Multi-query associative recall: `pairs` different keys with values, then each key once more, in another order.

    The first half of the vocabulary are keys, the second values; token 0 fills. With `spread`, pairs and questions are
    scattered over the first and the last half of the sample, otherwise they stand at its beginning and its end.

    Raises:
        InputError: pairs that do not fit.
    """
    keys = vocabulary // 2
    room = length // 2 // 2
    if not 1 <= pairs <= min(keys - 1, room):
        raise InputError.of(
            "pairs", given=pairs, expected=f"1 to {min(keys - 1, room)}", fix="lengthen the sample"
        )

    def make(count: int, generator: torch.Generator, held_out: bool) -> Samples:
        draw = functools.partial(torch.rand, generator=generator)
        key = draw(count, keys - 1).argsort(-1)[:, :pairs] + 1
        value = torch.randint(keys, vocabulary, (count, pairs), generator=generator)
        order = draw(count, pairs).argsort(-1)
        asked, answer = key.gather(1, order), value.gather(1, order)
        half = length // 2
        if spread:
            first = _scatter(draw(count, half // 2), pairs)
            second = half + _scatter(draw(count, (length - half) // 2), pairs)
        else:
            first = (2 * torch.arange(pairs)).expand(count, -1)
            second = first + length - 2 * pairs
        ids = torch.zeros(count, length, dtype=torch.long)
        labels = torch.full_like(ids, IGNORED)
        for place, left, right in ((first, key, value), (second, asked, answer)):
            ids.scatter_(1, place, left).scatter_(1, place + 1, right)
        labels.scatter_(1, second + 1, answer)
        return Samples(ids, labels)

    return Task("recall", vocabulary, length, make)


def selective_copy(vocabulary: int = 32, length: int = 128, copied: int = 8) -> Task:
    """`copied` tokens scattered among blanks (0), a mark (1), then the tokens in their order.

    Raises:
        InputError: more tokens than fit.
    """
    room = length - copied - 1
    if not 1 <= copied <= room or vocabulary < 4:
        raise InputError(
            f"selective_copy needs 1 <= copied <= {room} and a vocabulary of 4 or more, got copied={copied}, "
            f"vocabulary={vocabulary}"
        )

    def make(count: int, generator: torch.Generator, held_out: bool) -> Samples:
        tokens = torch.randint(2, vocabulary, (count, copied), generator=generator)
        places = (
            torch.rand(count, room, generator=generator).argsort(-1)[:, :copied].sort(-1).values
        )
        ids = torch.zeros(count, length, dtype=torch.long).scatter_(1, places, tokens)
        ids[:, room] = 1
        ids[:, room + 1 :] = tokens
        labels = torch.full_like(ids, IGNORED)
        labels[:, room + 1 :] = tokens
        return Samples(ids, labels)

    return Task("selective_copy", vocabulary, length, make)


def induction(vocabulary: int = 32, length: int = 64) -> Task:
    """Random tokens; the last but one repeats an earlier token that is unique so far, and what came after it is asked."""
    if vocabulary < 4 or length < 6:
        raise InputError(
            f"induction needs a vocabulary of 4 and a length of 6 or more, got {vocabulary}, {length}"
        )

    def make(count: int, generator: torch.Generator, held_out: bool) -> Samples:
        ids = torch.randint(1, vocabulary, (count, length), generator=generator)
        place = torch.randint(0, length - 3, (count, 1), generator=generator)
        # token 0 stands nowhere else, so that only one place answers
        ids.scatter_(1, place, 0)
        ids[:, -2] = 0
        answer = ids.gather(1, place + 1)
        ids[:, -1:] = answer
        labels = torch.full_like(ids, IGNORED)
        labels[:, -1:] = answer
        return Samples(ids, labels)

    return Task("induction", vocabulary, length, make)


def needle(
    vocabulary: int = 64, length: int = 256, *, depth: tuple[float, float] = (0.0, 0.5)
) -> Task:
    """A mark (1) and a value somewhere in the share `depth` of the filler, a question mark (2) at the end, and the value."""
    if vocabulary < 8 or length < 8 or not 0 <= depth[0] < depth[1] <= 1:
        raise InputError(
            f"needle needs a vocabulary and length of 8 or more and depths 0 <= a < b <= 1, got {vocabulary}, {length}, {depth}"
        )

    def make(count: int, generator: torch.Generator, held_out: bool) -> Samples:
        half = vocabulary // 2
        ids = torch.randint(3, half, (count, length), generator=generator)
        value = torch.randint(half, vocabulary, (count, 1), generator=generator)
        low, high = (round(share * (length - 4)) for share in depth)
        place = torch.randint(low, max(high, low + 1), (count, 1), generator=generator)
        ids.scatter_(1, place, 1).scatter_(1, place + 1, value)
        ids[:, -2] = 2
        ids[:, -1:] = value
        labels = torch.full_like(ids, IGNORED)
        labels[:, -1:] = value
        return Samples(ids, labels)

    return Task("needle", vocabulary, length, make)


def characters(length: int = 256, kind: str = "prose") -> Task:
    """Windows of text that ships with Python, as bytes, the last tenth held out.

    `prose` is the language reference (`pydoc_data.topics`), `code` the standard library.
    """
    if kind not in ("prose", "code"):
        raise InputError.of("kind", given=kind, expected="prose or code")

    def make(count: int, generator: torch.Generator, held_out: bool) -> Samples:
        text = _bytes(kind)
        edge = len(text) * 9 // 10
        low, high = (edge, len(text)) if held_out else (0, edge)
        starts = torch.randint(low, high - length, (count, 1), generator=generator)
        ids = text[starts + torch.arange(length)].long()
        return Samples(ids, ids.clone())

    return Task("characters", 256, length, make)


TASKS: dict[str, Callable[..., Task]] = {
    "characters": characters,
    "induction": induction,
    "needle": needle,
    "recall": recall,
    "selective_copy": selective_copy,
}
"""Every task by name."""


def _scatter(scores: Tensor, count: int) -> Int[Tensor, "rows count"]:
    """Even places of two tokens each, different in a row and in order."""
    return 2 * scores.argsort(-1)[:, :count].sort(-1).values


@functools.cache
def _bytes(kind: str) -> Tensor:
    if kind == "prose":
        from pydoc_data.topics import topics

        text = "\n\n".join(topics[name] for name in sorted(topics))
    else:
        text = texts.code(600_000)
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
