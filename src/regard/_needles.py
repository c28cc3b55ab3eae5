"""A needle in a haystack: a text with one odd sentence in it, and a question only it answers.

The task of Wu et al. 2024 (arXiv 2404.15574), by which retrieval heads are found. The needle is
inserted by token ids at a full stop, so that the place of its answer is known exactly.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from regard._errors import InputError

_HOLE = "\x00haystack\x00"


@dataclass(frozen=True)
class Needle:
    """`statement` + `answer` + "." is the sentence that is hidden; `question` asks for `answer`."""

    statement: str
    answer: str
    question: str


NEEDLES: tuple[Needle, ...] = tuple(
    Needle(f"{subject} is", answer, f"What is {subject[0].lower()}{subject[1:]}?")
    for subject, answer in (
        ("The secret password of the old library", "purple elephant seven"),
        ("The favourite breakfast of captain Mirella", "smoked pumpkin waffles"),
        ("The hidden treasure of Fort Galdane", "a copper violin"),
        ("The best thing to do in Port Sandrel", "feeding the turquoise pelicans"),
        ("The name of the clockmaker's youngest goat", "Bartholomew Quince"),
        ("The prize of the midnight sailing race", "eleven jars of walnut honey"),
        ("The first ingredient of the giant's soup", "crushed juniper berries"),
        ("The colour of the ambassador's umbrella", "pale mustard with crimson dots"),
        ("The only plant in the observatory", "a frozen magnolia"),
        ("The code word of the night gardener", "velvet marble hurricane"),
        ("The cargo of the vanished steamboat", "ninety wooden accordions"),
        ("The weekly dance in the lighthouse", "a slow peasant tarantella"),
    )
)


@dataclass(frozen=True)
class NeedlePrompt:
    """One prompt. `ids[start:end]` are the tokens of the needle's answer, the span that counts.

    `permuted` holds the same tokens shifted by one place: scoring against it instead of
    `ids[start:end]` gives the hits that chance alone would give.
    """

    ids: Int[Tensor, " sequence"]
    start: int
    end: int
    needle: Needle
    depth: float

    @property
    def answer_ids(self) -> Int[Tensor, " answer"]:
        return self.ids[self.start : self.end]

    @property
    def permuted(self) -> Int[Tensor, " answer"]:
        return self.answer_ids.roll(1)

    def recall(self, text: str) -> float:
        """The share of the answer's words that `text` contains; above 0.5 counts as answered."""
        return rouge1_recall(self.needle.answer, text)


def needle_prompts(
    tokenizer: Any,
    *,
    lengths: Iterable[int] = (300, 600, 1000),
    depths: Iterable[float | int] = (0.1, 0.4, 0.6, 0.9),
    needles: int | Iterable[Needle] = 10,
    chat: bool | None = None,
    seed: int = 0,
) -> list[NeedlePrompt]:
    """A prompt for every length, depth and needle.

    Args:
        tokenizer: of the model under test.
        lengths: tokens in the whole prompt. Prompts of one length can be batched without padding.
        depths: where in the haystack the needle goes, from 0 (start) to 1 (end). It moves back to
            the last full stop before that place (on to the first one when there is none before, and to
            the start of a haystack that has none).
        needles: how many of `NEEDLES` to use, or needles of your own.
        chat: use the tokenizer's chat template; by default when it has one.
        seed: of the haystacks, which are `prose` in another order for each prompt.

    Returns:
        `len(lengths) * len(depths) * needles` prompts, in that nesting.

    Raises:
        InputError: a length too short for needle and question, or a depth outside [0, 1].

    Cost: some milliseconds a prompt; no model is run.
    """
    chosen = NEEDLES[:needles] if isinstance(needles, int) else tuple(needles)
    if not chosen or (isinstance(needles, int) and needles > len(NEEDLES)):
        raise InputError.of("needles", given=needles, expected=f"1..{len(NEEDLES)} or a list")
    if chat is None:
        chat = bool(getattr(tokenizer, "chat_template", None))
    cases = itertools.product(lengths, depths, chosen)
    return [
        _prompt(tokenizer, needle, length, float(depth), chat, 1000 * seed + case)
        for case, (length, depth, needle) in enumerate(cases)
    ]


def rouge1_recall(reference: str, text: str) -> float:
    """The share of the words of `reference` that occur in `text`, each as often (ROUGE-1 recall).

    >>> rouge1_recall("purple elephant seven", "It is a purple elephant.")
    0.6666666666666666
    """
    wanted, found = (Counter(re.findall(r"\w+", part.lower())) for part in (reference, text))
    return sum((wanted & found).values()) / max(1, sum(wanted.values()))


def _prompt(
    tokenizer: Any, needle: Needle, length: int, depth: float, chat: bool, seed: int
) -> NeedlePrompt:
    if not 0 <= depth <= 1:
        raise InputError.of("depth", given=depth, expected="in [0, 1]")
    before, after = _frame(tokenizer, needle.question, chat)
    sentence, start, end = _sentence(tokenizer, needle)
    room = length - len(before) - len(after) - len(sentence)
    if room < 16:
        raise InputError.of(
            "length", given=length, expected=f"at least {length - room + 16} for this needle"
        )
    hay = _haystack(tokenizer, room, seed)
    cut = _full_stop(tokenizer, hay, round(depth * room))
    ids = before + hay[:cut] + sentence + hay[cut:] + after
    shift = len(before) + cut
    return NeedlePrompt(torch.tensor(ids), start + shift, end + shift, needle, depth)


def _frame(tokenizer: Any, question: str, chat: bool) -> tuple[list[int], list[int]]:
    """The tokens before and after the haystack."""
    if chat:
        content = f"{_HOLE}\n\nAnswer from the text above in one sentence. {question}"
        rendered = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        first, last = rendered.split(_HOLE)
        return _ids(tokenizer, first), _ids(tokenizer, last)
    from regard._probes import _prefix

    return _prefix(tokenizer), _ids(tokenizer, f"\n\nQuestion: {question}\nAnswer:")


def _sentence(tokenizer: Any, needle: Needle) -> tuple[list[int], int, int]:
    """The needle's tokens and the span of its answer among them."""
    head = f" {needle.statement} "
    text = f"{head}{needle.answer}."
    if not getattr(tokenizer, "is_fast", False):  # no offsets: join three parts instead
        parts = [_ids(tokenizer, part) for part in (head.rstrip(), f" {needle.answer}", ".")]
        return [*itertools.chain(*parts)], len(parts[0]), len(parts[0]) + len(parts[1])
    marks = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    lo, hi = len(head), len(head) + len(needle.answer)
    inside = [i for i, (a, b) in enumerate(marks["offset_mapping"]) if b > lo and a < hi]
    return list(marks["input_ids"]), inside[0], inside[-1] + 1


def _haystack(tokenizer: Any, room: int, seed: int) -> list[int]:
    from regard.texts import prose

    ids = _ids(tokenizer, prose(min(6 * room + 400, 110_000), seed).replace("\n\n", " "))
    if len(ids) < room:
        raise InputError.of("length", given=room, expected=f"at most about {len(ids)} tokens")
    return ids[:room]


def _full_stop(tokenizer: Any, ids: list[int], place: int) -> int:
    """The last place up to `place` that follows a full stop, else the first place after it, else 0."""
    for cut in (*range(place, 0, -1), *range(place + 1, len(ids))):
        sentence, following = tokenizer.decode(ids[cut - 1]), tokenizer.decode(ids[cut : cut + 1])
        if sentence.rstrip().endswith(".") and (not following or following[0].isspace()):
            return cut
    return 0


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
