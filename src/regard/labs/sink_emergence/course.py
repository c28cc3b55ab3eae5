"""What was seen while runs were trained: sink rates, losses and attention maps at every logged step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from regard._errors import InputError

SHOWN = 16
"""Key positions that are kept, from the first."""

MEASURED = ("loss", "rates", "importance", "learnt", "relative", "repeated")


@dataclass(frozen=True, slots=True)
class Course:
    """Every arm and seed at every logged step.

    Attributes:
        arms: names.
        seeds: of the runs of each arm.
        steps: after which it was measured.
        loss: held-out nats a token.
        rates: Sink_k in percent, for the first key positions k.
        importance: a_k, mean over heads and sequences, for the first key positions.
        learnt: Sink_* in percent, of a learnt key or token; 0 where there is none.
        relative: percent of heads that sink on the oldest key in their window; 0 where there is no window.
        repeated: Sink_1 in percent on sequences of one repeated token.
        maps: attention by query (every second) and key (a learnt one, then the first positions), mean over sequences and over
            the heads of all layers but the first; of all seeds, or of the first only.
    """

    arms: list[str]
    seeds: list[int]
    steps: Int[np.ndarray, "steps"]
    loss: Float[np.ndarray, "arms seeds steps"]
    rates: Float[np.ndarray, "arms seeds steps positions"]
    importance: Float[np.ndarray, "arms seeds steps positions"]
    learnt: Float[np.ndarray, "arms seeds steps"]
    relative: Float[np.ndarray, "arms seeds steps"]
    repeated: Float[np.ndarray, "arms seeds steps"]
    maps: Float[np.ndarray, "arms filmed steps queries keys"]

    def row(self, arm: str) -> int:
        """Where an arm is.

        Raises:
            InputError: it was not run.
        """
        if arm not in self.arms:
            raise InputError.of("arm", given=arm, expected=f"one of {', '.join(self.arms)}")
        return self.arms.index(arm)

    def sink(self, arm: str, position: int) -> Float[np.ndarray, "seeds steps"]:
        """`Sink_k` of an arm in percent; position 0 is the learnt key."""
        row = self.row(arm)
        return self.learnt[row] if position == 0 else self.rates[row, ..., position - 1]

    def plain(self) -> dict[str, Any]:
        """As lists, with maps of three digits of the first seed only (they are for pictures)."""
        found = {one.name: getattr(self, one.name) for one in fields(self)}
        found["maps"] = np.round(self.maps[:, :1], 3)
        return {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in found.items()}

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> Course:
        """What `plain` gave."""
        arrays = {
            key: np.array(value, float)
            for key, value in plain.items()
            if key not in ("arms", "seeds")
        }
        arrays["steps"] = arrays["steps"].astype(int)
        return cls(list(plain["arms"]), list(plain["seeds"]), **arrays)


def join(courses: Sequence[Course]) -> Course:
    """The arms of several courses of the same seeds and steps, one after the other.

    Raises:
        InputError: they differ in seeds or steps.
    """
    first = courses[0]
    for one in courses:
        if one.seeds != first.seeds or one.steps.tolist() != first.steps.tolist():
            raise InputError(
                f"courses need the same seeds and steps, got {first.seeds}, {first.steps.tolist()} and "
                f"{one.seeds}, {one.steps.tolist()}"
            )
    names = (*MEASURED, "maps")
    stacked = {name: np.concatenate([getattr(one, name) for one in courses]) for name in names}
    return Course([arm for one in courses for arm in one.arms], first.seeds, first.steps, **stacked)


def side_by_side(courses: Sequence[Course]) -> Course:
    """The seeds of several courses of the same arms and steps, one after the other; maps stay those of the first.

    Raises:
        InputError: they differ in arms or steps.
    """
    first = courses[0]
    for one in courses:
        if one.arms != first.arms or one.steps.tolist() != first.steps.tolist():
            raise InputError(
                f"courses need the same arms and steps, got {first.arms}, {first.steps.tolist()} and "
                f"{one.arms}, {one.steps.tolist()}"
            )
    stacked = {
        name: np.concatenate([getattr(one, name) for one in courses], 1) for name in MEASURED
    }
    seeds = [seed for one in courses for seed in one.seeds]
    return Course(first.arms, seeds, first.steps, **stacked, maps=first.maps[:, :1])
