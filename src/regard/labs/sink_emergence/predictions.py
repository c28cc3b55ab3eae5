"""What the paper says of every arm, as checks of a course. Directions are compared within seeds; sizes are the paper's own."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float

from regard.labs.results import Check, interval
from regard.labs.sink_emergence.course import Course
from regard.labs.sink_emergence.metric import even_importance

FEW = 1.0
"""Percent of heads below which there is no sink."""
SOME = 5.0
"""Percent of heads from which there is one."""
LEAST = 1.0
"""Points by which two rates must differ."""
CLOSE = 0.05
"""Nats by which losses may differ that are called the same."""
NO_SINK = "the default run has no clear sink here, so there is nothing to compare with"
PREFIX = range(2, 6)
"""Positions of the prefix, without the first."""

Values = Float[np.ndarray, "seeds"]


@dataclass(frozen=True, slots=True)
class Prediction:
    """One statement about arms at the end of training.

    Attributes:
        name: short name.
        says: the sentence.
        arms: that it needs.
        value: the number of each seed that it is about.
        sense: ">" or "<" the bound, or "=" for the bound within `CLOSE`.
        bound: see there.
        unit: "%", "points" or "nats".
        paper: the paper's number; "" where it is not known here.
        why: of the bound, where it is not one of the above.
        compares: it says nothing where the default run has no sink.
    """

    name: str
    says: str
    arms: tuple[str, ...]
    value: Callable[[Course], Values]
    sense: str
    bound: float
    unit: str
    paper: str = ""
    why: str = ""
    compares: bool = False

    def check(self, course: Course) -> Check:
        """The statement beside the measurement, with the 95 % interval over seeds."""
        mean, half = interval(self.value(course))
        tolerance = CLOSE if self.sense == "=" else 0.0
        return Check(
            self.name,
            f"{self.says}, {self.unit}",
            float(mean),
            self.bound,
            tolerance,
            self.why,
            float(half),
            self.sense,
        )

    @property
    def expected(self) -> str:
        """The bound in words."""
        if self.sense == "=":
            return f"within {CLOSE:g} {self.unit} of {self.bound:g}"
        word = {">": "above", "<": "below"}[self.sense]
        return f"{word} {self.bound:g} {self.unit}, beyond the 95 % interval over seeds"


def compare(course: Course, context: int) -> list[Check]:
    """Every prediction whose arms were run; those that need a sink to compare with stay open where the default run has none."""
    able = [one for one in PREDICTIONS if set(one.arms) <= set(course.arms)]
    emerged = PREDICTIONS[0].check(course).holds is True
    found = [start(course, context)]
    for one in able:
        check = one.check(course)
        undecided = one.compares and not emerged
        found.append(replace(check, error=math.nan, why=NO_SINK) if undecided else check)
    return found


def start(course: Course, context: int) -> Check:
    """Importance of the first key before training, `H_T / T` where attention is even."""
    mean, half = interval(course.importance[course.row("default"), :, 0, 0])
    even = float(even_importance(context)[0])
    return Check(
        "start",
        "Before training attention is even: importance of the first key (closed form H_T / T)",
        float(mean),
        even,
        tolerance=0.1 * even,
        error=float(half),
        why="10 %: random queries and keys are not exactly alike",
    )


def sink(arm: str, position: int = 1) -> Callable[[Course], Values]:
    """Sink_k of an arm at the end; position 0 is the learnt key."""
    return lambda course: course.sink(arm, position)[:, -1]


def gap(
    more: Callable[[Course], Values], less: Callable[[Course], Values]
) -> Callable[[Course], Values]:
    """The difference of two numbers, seed by seed."""
    return lambda course: more(course) - less(course)


def loss(arm: str) -> Callable[[Course], Values]:
    """Held-out loss of an arm at the end."""
    return lambda course: course.loss[course.row(arm), :, -1]


def later(arm: str) -> Callable[[Course], Values]:
    """What the positions of the prefix after the first have together."""
    return lambda course: sum(
        (course.sink(arm, k)[:, -1] for k in PREFIX), np.zeros(len(course.seeds))
    )


def oldest(arm: str) -> Callable[[Course], Values]:
    """How often the oldest key in the window is a sink."""
    return lambda course: course.relative[course.row(arm), :, -1]


D, WINDOW = "default", "window of 16"
SAME = "0.05 nats; the paper has {} beside 3.73"

PREDICTIONS: tuple[Prediction, ...] = (
    Prediction(
        "emerges", "The sink emerges in training: Sink_1 of the default run at its end",
        (D,), sink(D), ">", SOME, "%", "18.2 %; between steps 1,000 and 2,000 of 20,000",
    ),
    Prediction(
        "rises", "... and is made by training: Sink_1 at the end minus at the start",
        (D,), lambda course: course.sink(D, 1)[:, -1] - course.sink(D, 1)[:, 0], ">", LEAST, "points", "18.2 points",
    ),
    Prediction(
        "repeat", "One token repeated has no sink in the trained runs either: Sink_1",
        (D,), lambda course: course.repeated[course.row(D), :, -1], "<", FEW, "%", "0.0 % (Llama, Mistral)", compares=True,
    ),
    Prediction(
        "slow", "A smaller learning rate makes less of a sink: Sink_1 of the default minus that at a quarter of its rate",
        (D, "rate / 4"), gap(sink(D), sink("rate / 4")), ">", LEAST, "points", "15.3 points (18.2 and 2.9 %)", compares=True,
    ),
    Prediction(
        "fast", "A larger one makes more: Sink_1 at twice the rate minus the default's",
        (D, "rate x 2"), gap(sink("rate x 2"), sink(D)), ">", LEAST, "points", "14.0 points (32.2 and 18.2 %)", compares=True,
    ),
    Prediction(
        "decay", "Weight decay makes more of it: Sink_1 at 0.5 minus at 0",
        ("decay 0", "decay 0.5"), gap(sink("decay 0.5"), sink("decay 0")), ">", LEAST, "points",
        "25.9 points (41.1 and 15.2 %)", compares=True,
    ),
    Prediction(
        "heavy decay", "... but not a very large one: Sink_1 at 5",
        ("decay 5",), sink("decay 5"), "<", FEW, "%", "0.0 %", compares=True,
    ),
    Prediction(
        "little text", "Little text makes no sink: Sink_1 of the default minus that on a 64th of the text",
        (D, "little text"), gap(sink(D), sink("little text")), ">", LEAST, "points",
        "18.2 points (none with 50 to 100 million tokens of 5 billion)", compares=True,
    ),
    Prediction(
        "random", "A uniformly random first token is still the sink: Sink_1",
        ("first token random",), sink("first token random"), ">", SOME, "%", "27.0 %", compares=True,
    ),
    Prediction(
        "two random", "With two random tokens the second is the sink: Sink_2 minus Sink_1",
        ("first two random",), gap(sink("first two random", 2), sink("first two random")), ">", LEAST, "points",
        "12.1 points (14.1 and 2.0 %)", compares=True,
    ),
    Prediction(
        "fixed 1", "A token fixed at the first position strengthens the sink: Sink_1 minus the default's",
        (D, "fixed token 1st"), gap(sink("fixed token 1st"), sink(D)), ">", LEAST, "points", "55.9 points (74.1 and 18.2 %)",
    ),
    Prediction(
        "fixed 2", "A token fixed at the second position takes the sink there: Sink_2 minus Sink_1",
        ("fixed token 2nd",), gap(sink("fixed token 2nd", 2), sink("fixed token 2nd")), ">", LEAST, "points",
        "Sink_2 69.0 %",
    ),
    Prediction(
        "fixed 3", "A token fixed at the third position takes the sink there: Sink_3 minus Sink_1",
        ("fixed token 3rd",), gap(sink("fixed token 3rd", 3), sink("fixed token 3rd")), ">", LEAST, "points",
        "Sink_3 69.6 %",
    ),
    Prediction(
        "prefix", "A prefix language model sinks among its prefix: Sink_2 + .. + Sink_5 with a prefix of 5 minus without",
        (D, "prefix of 5"), gap(later("prefix of 5"), later(D)), ">", LEAST, "points", "stated without a number", compares=True,
    ),
    Prediction(
        "window", "In a shifted window the first token of the text sinks, not the oldest in the window: Sink_1 minus its rate",
        (WINDOW,), gap(sink(WINDOW), oldest(WINDOW)), ">", LEAST, "points", "stated without a number", compares=True,
    ),
    Prediction(
        "narrow", "A narrow window makes less of a sink: Sink_1 of the default minus that with a window of 16",
        (D, WINDOW), gap(sink(D), sink(WINDOW)), ">", LEAST, "points", "stated without a number", compares=True,
    ),
    Prediction(
        "positions", "The sink needs no position encoding: Sink_1 of runs without",
        ("no positions",), sink("no positions"), ">", SOME, "%", "20.4 %", compares=True,
    ),
    Prediction(
        "sigmoid", "Sigmoid attention without normalisation has no sink: Sink_1 of its proxies",
        ("sigmoid",), sink("sigmoid"), "<", FEW, "%", "0.44 %", compares=True,
    ),
    Prediction(
        "sigmoid loss", "... and learns as well: its loss minus softmax's",
        (D, "sigmoid"), gap(loss("sigmoid"), loss(D)), "=", 0.0, "nats", "-0.03 nats (3.70 and 3.73)", SAME.format("3.70"),
    ),
    Prediction(
        "elu", "ELU + 1 attention without normalisation has no sink: Sink_1 of its proxies",
        ("ELU + 1",), sink("ELU + 1"), "<", FEW, "%", "0.80 %", compares=True,
    ),
    Prediction(
        "normalised", "Normalising the sigmoid's rows brings the sink back: Sink_1 with minus without",
        ("sigmoid", "sigmoid, normalised"), gap(sink("sigmoid, normalised"), sink("sigmoid")), ">", LEAST, "points",
        "29.8 points (30.2 and 0.44 %)",
    ),
    Prediction(
        "k takes", "A learnt key with value 0 (K bias) takes the sink over: Sink_* minus Sink_1",
        ("K biases",), gap(sink("K biases", 0), sink("K biases")), ">", LEAST, "points", "73.3 points (73.3 and 0.0 %)",
    ),
    Prediction(
        "k leaves", "... leaves nothing for the first token: Sink_1",
        ("K biases",), sink("K biases"), "<", FEW, "%", "0.0 %", compares=True,
    ),
    Prediction(
        "k loss", "... and costs nothing: loss minus the default's",
        (D, "K biases"), gap(loss("K biases"), loss(D)), "=", 0.0, "nats", "-0.01 nats (3.72 and 3.73)", SAME.format("3.72"),
    ),
    Prediction(
        "k carries", "A large fixed value with the key gives the sink back: Sink_1 with a value of norm 20 minus with 0",
        ("K biases", "K biases, value of norm 20"), gap(sink("K biases, value of norm 20"), sink("K biases")), ">", LEAST,
        "points", "up to 25.9 points (25.9 and 0.0 %)", compares=True,
    ),
    Prediction(
        "kv takes", "A learnt key and value (KV biases) take the sink over: Sink_* minus Sink_1",
        ("KV biases",), gap(sink("KV biases", 0), sink("KV biases")), ">", LEAST, "points",
    ),
    Prediction(
        "token takes", "A learnt sink token takes the sink over: Sink_* minus Sink_1",
        ("sink token",), gap(sink("sink token", 0), sink("sink token")), ">", LEAST, "points",
    ),
    Prediction(
        "v", "A learnt vector added to the heads' outputs (V biases) does not take it: Sink_1",
        ("V biases",), sink("V biases"), ">", SOME, "%", compares=True,
    ),
)  # fmt: skip
"""Every statement; the first is that there is a sink at all."""
