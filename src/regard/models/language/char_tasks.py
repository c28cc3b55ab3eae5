"""What the small masked-diffusion model is trained on: strings with exact answers, and English text.

Four fifths of the samples are tasks. The prompt is a string of different letters and digits; the answer is the string
backwards, a bar, its characters in order (digits first), a bar, and the running sum of its digits modulo 10:

    prompt  k3a9       answer  9a3k|39ak|0332

Each part has its own dependencies between tokens: the reversed string copies, the ordered string needs the whole prompt,
the running sum needs its own left neighbour. The other samples are windows of English prose
(`regard.texts.prose`, lower case) that a prompt begins and the model goes on with.
"""

from __future__ import annotations

import functools
import random
import re
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from regard import texts
from regard._errors import InputError

DIGITS = "0123456789"
LETTERS = "abcdefghijklmnopqrstuvwxyz"
CHARACTERS = DIGITS + LETTERS + "| .,;:'\"`()[]{}<>=+-*/_!#"
EOS, MASK = len(CHARACTERS), len(CHARACTERS) + 1
VOCABULARY = 64
SHORTEST, LONGEST = 10, 14
LENGTH = 64
"""Tokens of a sample: prompt, answer, and end-of-sequence tokens up to here."""


@dataclass(frozen=True)
class Samples:
    """`tokens` `[batch, LENGTH]` without masks; `prompts` `[batch]` tokens of each that are given."""

    tokens: Int[Tensor, "batch sequence"]
    prompts: Int[Tensor, " batch"]


def encode(text: str) -> list[int]:
    """Token ids of a text.

    >>> encode("0ab")
    [0, 10, 11]

    Raises:
        InputError: a character is not in the vocabulary.
    """
    unknown = sorted(set(text) - set(CHARACTERS))
    if unknown:
        raise InputError.of(
            "text", given=text, expected=f"made of {CHARACTERS!r}", fix=f"replace {unknown}"
        )
    return [CHARACTERS.index(character) for character in text]


def decode(tokens: list[int] | Tensor) -> str:
    """The text of token ids up to the first end of sequence; a mask shows as …."""
    ids = tokens.tolist() if isinstance(tokens, Tensor) else list(tokens)
    ids = ids[: ids.index(EOS)] if EOS in ids else ids
    return "".join(CHARACTERS[i] if i < len(CHARACTERS) else "…" for i in ids)


def answer(prompt: str) -> str:
    """The right answer to a task.

    >>> answer("k3a9")
    '9a3k|39ak|0332'
    """
    total, sums = 0, []
    for character in prompt:
        total += int(character) if character in DIGITS else 0
        sums.append(str(total % 10))
    return f"{prompt[::-1]}|{''.join(sorted(prompt))}|{''.join(sums)}"


def right_parts(given: str, prompt: str) -> float:
    """Share of an answer's three parts that are right: backwards, in order, sums.

    >>> right_parts("9a3k|39ka|0332", "k3a9")
    0.6666666666666666
    """
    wanted = answer(prompt).split("|")
    return sum(a == b for a, b in zip(given.split("|"), wanted, strict=False)) / len(wanted)


def task_prompts(
    count: int, seed: int, *, shortest: int = SHORTEST, longest: int = LONGEST
) -> list[str]:
    """Random strings of different letters and digits, a third to a half of them digits."""
    draw = random.Random(seed)
    prompts = []
    for _ in range(count):
        length = draw.randint(shortest, longest)
        digits = draw.randint(length // 3, length // 2)
        chosen = draw.sample(DIGITS, digits) + draw.sample(LETTERS, length - digits)
        draw.shuffle(chosen)
        prompts.append("".join(chosen))
    return prompts


def task_samples(count: int, seed: int) -> Samples:
    """Tasks with their answers."""
    rows = [(encode(prompt), encode(answer(prompt))) for prompt in task_prompts(count, seed)]
    return _pack([(len(prompt), prompt + response) for prompt, response in rows])


def text_samples(count: int, seed: int, *, held_out: bool = False) -> Samples:
    """Windows of prose of which the first 8 to 32 characters are given; the last tenth of the prose is held out."""
    draw, prose = random.Random(seed), _prose()
    edge = len(prose) * 9 // 10
    low, high = (edge, len(prose)) if held_out else (0, edge)
    rows = []
    for _ in range(count):
        start = draw.randrange(low, high - LENGTH)
        rows.append((draw.randint(8, 32), encode(prose[start : start + LENGTH])))
    return _pack(rows)


def mixed_samples(count: int, seed: int, *, text: float = 0.2) -> Samples:
    """Training data: a share `text` of prose, tasks else."""
    prose = round(count * text)
    tasks, windows = task_samples(count - prose, seed), text_samples(prose, seed)
    return Samples(
        torch.cat([tasks.tokens, windows.tokens]), torch.cat([tasks.prompts, windows.prompts])
    )


def _pack(rows: list[tuple[int, list[int]]]) -> Samples:
    tokens = torch.full((len(rows), LENGTH), EOS)
    for i, (_, ids) in enumerate(rows):
        tokens[i, : len(ids)] = torch.tensor(ids)
    return Samples(tokens, torch.tensor([prompt for prompt, _ in rows], dtype=torch.long))


@functools.cache
def _prose() -> str:
    lowered = texts.prose(100_000).lower()
    kept = "".join(c if c in CHARACTERS else " " for c in lowered)
    return re.sub(r"\s+", " ", kept)
