"""Arithmetic word problems with one whole-number answer, made from templates."""

from __future__ import annotations

import random
from dataclasses import dataclass

_NAMES = ("Ava", "Ben", "Chloe", "David", "Elena", "Farid", "Grace", "Hugo", "Iris", "Jonas")
_THINGS = ("apples", "marbles", "stickers", "books", "pencils", "shells", "coins", "stamps")


@dataclass(frozen=True)
class Problem:
    """A question, the numbers on the way to its answer, and the answer."""

    question: str
    steps: tuple[str, ...]
    answer: int


def arithmetic_problems(n: int, seed: int = 0) -> list[Problem]:
    """`n` different word problems of two or three steps, with answers between 1 and 999.

    >>> arithmetic_problems(1)[0].answer == arithmetic_problems(1)[0].answer
    True
    """
    draw = random.Random(seed)
    found: dict[str, Problem] = {}
    while len(found) < n:
        problem = _TEMPLATES[len(found) % len(_TEMPLATES)](draw)
        found[problem.question] = problem
    return list(found.values())


def _shares(draw: random.Random) -> Problem:
    who, other = draw.sample(_NAMES, 2)
    thing, boxes, each = draw.choice(_THINGS), draw.randint(3, 9), draw.randint(4, 12)
    given = draw.randint(2, boxes * each - 1)
    return Problem(
        f"{who} has {boxes} boxes with {each} {thing} in each box. {who} gives {given} {thing} to "
        f"{other}. How many {thing} does {who} have left?",
        (
            f"{boxes} * {each} = {boxes * each}",
            f"{boxes * each} - {given} = {boxes * each - given}",
        ),
        boxes * each - given,
    )


def _shopping(draw: random.Random) -> Problem:
    who = draw.choice(_NAMES)
    first, second = draw.sample(_THINGS, 2)
    n, p, m, q = (draw.randint(2, 9) for _ in range(4))
    total = n * p + m * q
    return Problem(
        f"{who} buys {n} {first} for {p} dollars each and {m} {second} for {q} dollars each. "
        f"How many dollars does {who} pay in total?",
        (f"{n} * {p} = {n * p}", f"{m} * {q} = {m * q}", f"{n * p} + {m * q} = {total}"),
        total,
    )


def _travel(draw: random.Random) -> Problem:
    who = draw.choice(_NAMES)
    hours, speed, more = draw.randint(2, 8), draw.randint(5, 60), draw.randint(3, 90)
    return Problem(
        f"{who} drives for {hours} hours at {speed} miles per hour, takes a break, and then drives "
        f"{more} more miles. How many miles does {who} drive altogether?",
        (
            f"{hours} * {speed} = {hours * speed}",
            f"{hours * speed} + {more} = {hours * speed + more}",
        ),
        hours * speed + more,
    )


def _groups(draw: random.Random) -> Problem:
    who, thing = draw.choice(_NAMES), draw.choice(_THINGS)
    groups, each, lost = draw.randint(2, 9), draw.randint(3, 12), draw.randint(2, 20)
    start = groups * each + lost
    return Problem(
        f"{who} collects {start} {thing} and loses {lost} of them. {who} puts the rest into "
        f"{groups} equal bags. How many {thing} are in each bag?",
        (f"{start} - {lost} = {groups * each}", f"{groups * each} / {groups} = {each}"),
        each,
    )


def _ages(draw: random.Random) -> Problem:
    who, other = draw.sample(_NAMES, 2)
    age, times, years = draw.randint(4, 15), draw.randint(2, 5), draw.randint(2, 20)
    return Problem(
        f"{who} is {age} years old. {other} is {times} times as old as {who}. How old will {other} "
        f"be in {years} years?",
        (f"{age} * {times} = {age * times}", f"{age * times} + {years} = {age * times + years}"),
        age * times + years,
    )


_TEMPLATES = (_shares, _shopping, _travel, _groups, _ages)
