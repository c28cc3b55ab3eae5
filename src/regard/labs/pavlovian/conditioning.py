"""Conditioning protocols with orthonormal cues A, B, C and a scalar outcome, for any rule; and closed forms for four of them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields

import torch
from torch import Tensor

from regard.labs.pavlovian import theory
from regard.labs.pavlovian.rules import Decaying, Hebbian, Oja, RescorlaWagner, Rule, responses

A, B, C = torch.eye(3, dtype=torch.float64)


@dataclass(frozen=True, slots=True)
class Phenomena:
    """What a rule makes of each protocol; V_X is what cue X predicts, outcomes are 1 or 0.

    Attributes:
        acquired: V_A after n1 trials A+.
        extinguished: V_A after n2 more trials A-.
        blocked: V_B after n1 trials A+ and n2 trials AB+.
        control: V_B after n1 trials C+ and n2 trials AB+.
        shadowed: V_A after many trials AB+ with the saliences, over that after as many trials A+ at the same salience.
        inhibited: V_B after many pairs of trials A+, AB-.
        generalised: response to a query with cos(q, A) = 1/2, over V_A, after n1 trials A+.
        delayed: V_A after n1 trials A+ and n2 empty ones, over V_A before these.
        second_order: V_B after n2 trials of B whose outcome is what A predicts after n1 trials A+: the retrieved outcome
            teaches, which takes a second layer.
    """

    acquired: float
    extinguished: float
    blocked: float
    control: float
    shadowed: float
    inhibited: float
    generalised: float
    delayed: float
    second_order: float

    def off(self, other: Phenomena) -> dict[str, float]:
        """Absolute differences by name."""
        mine, its = asdict(self), asdict(other)
        return {one.name: abs(mine[one.name] - its[one.name]) for one in fields(self)}


def phenomena(
    rule: Rule,
    first: int = 15,
    second: int = 20,
    *,
    many: int = 400,
    saliences: tuple[float, float] = (1.0, 0.5),
) -> Phenomena:
    """Runs every protocol: n1 = `first`, n2 = `second`.

    >>> found = phenomena(Hebbian(0.1))
    >>> found.blocked == found.control
    True
    """
    strong, weak = saliences[0] * A, saliences[1] * B
    half = 0.5 * A + 0.75**0.5 * C
    acquired = _ends(rule, [(A, 1.0, first)], A)
    return Phenomena(
        acquired=acquired,
        extinguished=_ends(rule, [(A, 1.0, first), (A, 0.0, second)], A),
        blocked=_ends(rule, [(A, 1.0, first), (A + B, 1.0, second)], B),
        control=_ends(rule, [(C, 1.0, first), (A + B, 1.0, second)], B),
        shadowed=_ends(rule, [(strong + weak, 1.0, many)], strong)
        / _ends(rule, [(strong, 1.0, many)], strong),
        inhibited=_ends(rule, [(A, 1.0, 1), (A + B, 0.0, 1)] * many, B),
        generalised=_ends(rule, [(A, 1.0, first)], half) / acquired,
        delayed=_ends(rule, [(A, 1.0, first), (0 * C, 0.0, second)], A) / acquired,
        second_order=_ends(rule, [(B, acquired, second)], B),
    )


def predictions(
    rule: Rule,
    first: int = 15,
    second: int = 20,
    *,
    many: int = 400,
    saliences: tuple[float, float] = (1.0, 0.5),
) -> Phenomena:
    """The closed forms of `phenomena` for Hebb's rule, a decaying trace, Rescorla-Wagner and Oja's rule.

    Inhibition has the limit of endless trials, which for Rescorla-Wagner is -V_A = -1.

    Raises:
        TypeError: another rule.
    """
    b = rule.rate
    if isinstance(rule, RescorlaWagner):
        v = theory.delta_acquisition(b, first)
        return Phenomena(
            acquired=v,
            extinguished=v * (1 - b) ** second,
            blocked=theory.blocked_response(b, first, second),
            control=theory.blocked_response(b, 0, second),
            shadowed=theory.overshadowed_response(b, *saliences, many)
            / theory.overshadowed_response(b, saliences[0], 0.0, many),
            inhibited=-1.0,
            generalised=0.5,
            delayed=1.0,
            second_order=v * theory.delta_acquisition(b, second),
        )
    if isinstance(rule, Oja):
        v = theory.oja_acquisition(b, first)
        beside = theory.oja_acquisition(b, second)
        # the outcome v of second-order trials also sets how fast the row shrinks: b v / (b v^2) = 1 / v is its limit
        return Phenomena(
            acquired=v,
            extinguished=v,
            blocked=beside,
            control=beside,
            shadowed=1.0,
            inhibited=0.0,
            generalised=0.5,
            delayed=1.0,
            second_order=(1 - (1 - b * v**2) ** second) / v,
        )
    if isinstance(rule, Hebbian | Decaying):
        keep = rule.keep if isinstance(rule, Decaying) else 1.0
        total = lambda n: (  # noqa: E731
            theory.decay_acquisition(b, keep, n) if keep < 1 else b * n
        )
        v, beside = total(first), total(second)
        return Phenomena(
            acquired=v,
            extinguished=v * keep**second,
            blocked=beside,
            control=beside,
            shadowed=1.0,
            inhibited=0.0,
            generalised=0.5,
            delayed=keep**second,
            second_order=v * beside,
        )
    raise TypeError(f"no closed forms are known here for {type(rule).__name__}")


def trials(protocol: list[tuple[Tensor, float, int]]) -> tuple[Tensor, Tensor]:
    """Keys and outcomes of `(cue, outcome, how often)` in turn."""
    keys = torch.stack([cue for cue, _, count in protocol for _ in range(count)])
    outcomes = [outcome for _, outcome, count in protocol for _ in range(count)]
    return keys, torch.tensor(outcomes, dtype=torch.float64)


def _ends(rule: Rule, protocol: list[tuple[Tensor, float, int]], probe: Tensor) -> float:
    """What a probe predicts at the end."""
    return float(responses(rule, *trials(protocol), probe[None])[-1, 0])
