"""An exam: one context with facts planted in it, the text that follows, and questions about both.

Everything is planted into one context, so that one prefill serves every question. The questions
are unknown while the context is read: a cache that answers them has kept what nobody pointed at.

| measure | planted | asked | score |
|---|---|---|---|
| `needle` | up to 10 sentences `The secret code for CITY is 5 digits.`, each twice | each code | log-probability a token |
| `multikey` | up to 4 `One of the special magic numbers for KEY is: 7 digits.`, each once | each number | the same |
| `variables` | a chain `VAR A = 12345`, `VAR B = VAR A`, ... of up to 5 names | the names | the same |
| `copy` | nothing: passages of the document itself | a passage's second half after its first | the same |

`multikey` and `variables` have the form of RULER (Hsieh et al. 2024, arXiv 2404.06654; multi-key needles and
variable tracking). Repeated keys, digits and log-probabilities are what makes a small model's answers
steady enough to rank methods: exact answers of a model of 135 M parameters are mostly noise.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from regard._errors import InputError
from regard.bench.documents import CONTINUATION, Document

QUESTIONS = ("needle", "multikey", "variables", "copy")
SHORTEST = 256  # tokens of context below which nothing can be planted
_CITIES = (
    "Paris", "Oslo", "Lima", "Cairo", "Tokyo", "Delhi", "Quito", "Rome", "Dublin", "Havana", "Berlin", "Madrid",
    "Athens", "Vienna", "Prague", "Warsaw", "Lisbon", "Geneva", "Boston", "Sydney",
)  # fmt: skip
_FIRST = ("quiet", "silver", "rapid", "golden", "distant", "hollow", "crimson", "gentle")
_SECOND = ("river", "garden", "engine", "mountain", "lantern", "harbor", "window", "forest")
_LETTERS = "BCDFGHJKLMNPQRSTVWXZ"


@dataclass(frozen=True)
class Question:
    """`prompt` is read after the context; `answer` is what its log-probability is taken of.

    `depth` is where in the context the answer stands, from 0 (start) to 1 (end).
    """

    measure: str
    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    depth: float


@dataclass(frozen=True)
class Exam:
    """A context, the tokens that really follow it, and the questions."""

    name: str
    kind: str
    context: Int[Tensor, " tokens"]
    continuation: Int[Tensor, " following"]
    questions: tuple[Question, ...]
    planted: tuple[tuple[int, int], ...]
    """Spans of the context that were planted, start and end."""

    @property
    def length(self) -> int:
        return len(self.context)


@dataclass(frozen=True)
class _Fact:
    """A sentence to plant, and the question that it answers; `question` None for a second copy."""

    tokens: tuple[int, ...]
    measure: str = ""
    prompt: str = ""
    answer: str = ""


def make_exam(tokenizer: Any, document: Document, length: int, seed: int = 0) -> Exam:
    """Plant the facts in a document so that the context has `length` tokens exactly.

    Facts go to ends of sentences or lines, spread evenly; which fact goes where is drawn from `seed`
    and the document's name. About a sixth of a context of 2 048 tokens is planted.

    Raises:
        InputError: a length below 256, or a document shorter than context and continuation.

    Cost: some ten milliseconds; no model is run.
    """
    if length < SHORTEST:
        raise InputError.of("length", given=length, expected=f"at least {SHORTEST} tokens")
    draw = random.Random(f"{seed} {document.name}")
    facts = _facts(tokenizer, length, draw)
    room = length - sum(len(fact.tokens) for fact in facts)
    if len(document.ids) < room + CONTINUATION:
        raise InputError.of(
            f"document {document.name!r}",
            given=f"{len(document.ids)} tokens",
            expected=f"at least {room + CONTINUATION} for a context of {length}",
        )
    hay = document.ids[:room]
    cuts = _cuts(tokenizer, hay, len(facts))
    context: list[int] = []
    places: list[tuple[int, int]] = []
    for fact, start, end in zip([None, *facts], [0, *cuts], [*cuts, room], strict=True):
        if fact is not None:
            places.append((len(context), len(context) + len(fact.tokens)))
            context += fact.tokens
        context += hay[start:end]
    questions = _ask(tokenizer, facts, places, length) + _copies(context, places, draw)
    return Exam(
        document.name,
        document.kind,
        torch.tensor(context),
        torch.tensor(document.ids[room : room + CONTINUATION]),
        tuple(questions),
        tuple(places),
    )


def _facts(tokenizer: Any, length: int, draw: random.Random) -> list[_Fact]:
    """What to plant, in the order in which it will stand in the context."""
    cities = draw.sample(_CITIES, max(2, min(10, length // 200)))
    needles = []
    for city in cities:
        code = _digits(draw, 5)
        sentence = _ids(tokenizer, f" The secret code for {city} is {code}.")
        prompt = f"\n\nQuestion: What is the secret code for {city}?\nAnswer: The secret code for {city} is"
        needles.append(_Fact(sentence, "needle", prompt, f" {code}"))
    again = [_Fact(fact.tokens) for fact in needles]
    numbers = []
    for first, second in zip(
        draw.sample(_FIRST, 4)[: max(1, length // 500)], draw.sample(_SECOND, 4), strict=False
    ):
        key, value = f"{first}-{second}", _digits(draw, 7)
        sentence = _ids(tokenizer, f" One of the special magic numbers for {key} is: {value}.")
        prompt = (
            f"\n\nWhat is the special magic number for {key} mentioned in the provided text? "
            f"The special magic number for {key} mentioned in the provided text is"
        )
        numbers.append(_Fact(sentence, "multikey", prompt, f" {value}"))
    draw.shuffle(needles)
    draw.shuffle(again)
    rest = again + numbers
    draw.shuffle(rest)
    return _interleave(needles, rest, _chain(tokenizer, length, draw))


def _chain(tokenizer: Any, length: int, draw: random.Random) -> list[_Fact]:
    """One chain of assignments; the last one carries the question, when all of it has been read."""
    names = ["".join(draw.sample(_LETTERS, 3)) for _ in range(max(2, min(5, length // 400)))]
    value = _digits(draw, 5)
    prompt = (
        f"\n\nQuestion: Find all variables that are assigned the value {value} in the text above.\n"
        f"Answer: According to the chain of variable assignment in the text above, {len(names)} variables "
        f"are assigned the value {value}, they are:"
    )
    steps = [f" VAR {names[0]} = {value}."]
    steps += [f" VAR {b} = VAR {a}." for a, b in pairwise(names)]
    chain = [_Fact(_ids(tokenizer, step)) for step in steps]
    chain[-1] = _Fact(chain[-1].tokens, "variables", prompt, " " + ", ".join(names))
    return chain


def _interleave(*lists: list[_Fact]) -> list[_Fact]:
    """One list in which each of the given ones is spread evenly and keeps its order."""
    marked = [
        ((number + 0.5) / len(facts), which, fact)
        for which, facts in enumerate(lists)
        for number, fact in enumerate(facts)
    ]
    return [fact for _, _, fact in sorted(marked, key=lambda mark: mark[:2])]


def _ask(
    tokenizer: Any, facts: list[_Fact], places: list[tuple[int, int]], length: int
) -> list[Question]:
    asked = [
        Question(
            fact.measure,
            _ids(tokenizer, fact.prompt),
            _ids(tokenizer, fact.answer),
            round(start / length, 3),
        )
        for fact, (start, _) in zip(facts, places, strict=True)
        if fact.measure
    ]
    return sorted(asked, key=lambda question: QUESTIONS.index(question.measure))


def _copies(
    context: list[int], places: list[tuple[int, int]], draw: random.Random, half: int = 16
) -> list[Question]:
    """Passages of the document, `2 * half` tokens free of planted facts, one in each fifth of it."""
    planted = {position for start, end in places for position in range(start, end)}
    found = []
    for part in range(5):
        low, high = part * len(context) // 5, (part + 1) * len(context) // 5 - 2 * half
        free = [
            start
            for start in range(low, high)
            if planted.isdisjoint(range(start, start + 2 * half))
        ]
        if free:
            start = draw.choice(free)
            first, second = (
                tuple(context[start : start + half]),
                tuple(context[start + half : start + 2 * half]),
            )
            found.append(Question("copy", first, second, round(start / len(context), 3)))
    return found


def _cuts(tokenizer: Any, ids: tuple[int, ...], count: int) -> list[int]:
    """`count` ascending places in `ids`, each after a token that ends a sentence or a line."""
    pieces = [tokenizer.decode([token]) for token in ids]
    ends = [
        place + 1
        for place, (piece, after) in enumerate(zip(pieces, [*pieces[1:], "\n"], strict=True))
        if "\n" in piece or (piece.rstrip().endswith((".", ";", ":")) and after[:1].isspace())
    ]
    cuts = []
    last = 0
    for number in range(count):
        even = round((number + 0.5) * len(ids) / count)
        before = [end for end in ends if last < end <= even]
        last = before[-1] if before else max(last, even)
        cuts.append(last)
    return cuts


def _digits(draw: random.Random, count: int) -> str:
    return "".join(draw.choice("0123456789") for _ in range(count))


def _ids(tokenizer: Any, text: str) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
