"""From results to a plan: least memory while the KL stays below a bound, then least loss on needles."""

from __future__ import annotations

import math

from torch import nn

from regard._errors import InputError
from regard.bench.results import FULL, LIBRARY, Results, Setting
from regard.cache.calibration import Calibration
from regard.plan import Named, Plan
from regard.plan.methods import Size


def best_setting(results: Results, max_kl: float, length: int | None = None) -> Setting:
    """The setting that keeps least memory, among those whose KL is at most `max_kl` in the worse end of its interval.

    Settings within a twentieth of the least memory count as equal; the one that loses least on needles is taken, since the KL
    says little of what is asked for later. With one document there is no interval, and the mean decides. Only the longest length
    is looked at, unless another is given.

    Raises:
        InputError: no setting stays below the bound; the message names the closest.
    """
    if not max_kl > 0:
        raise InputError.of("--max-kl", given=max_kl, expected="above 0, in nats a token")
    length = max(results.lengths()) if length is None else length
    found = []
    for setting in results.settings():
        if setting.length != length or setting.method in (FULL, LIBRARY):
            continue
        closeness, kept = results.estimate(setting, "kl"), results.estimate(setting, "kept")
        if closeness is not None and kept is not None:
            worst = closeness.mean if math.isnan(closeness.high) else closeness.high
            found.append((worst, kept.mean, setting))
    if not found:
        raise InputError("a plan needs at least one measured setting, got none")
    allowed = [one for one in found if one[0] <= max_kl]
    if not allowed:
        worst, _, closest = min(found, key=lambda one: one[0])
        raise InputError(
            f"no setting stays within a KL of {max_kl:g} nats; the closest is {closest.method} at {closest.budget} with "
            f"{worst:.2g}. Give a larger --max-kl, or more --budgets"
        )
    least = min(kept for _, kept, _ in allowed)
    equal = [(worst, setting) for worst, kept, setting in allowed if kept <= 1.05 * least]

    def badness(one: tuple[float, Setting]) -> tuple[float, float]:
        lost = results.lost(one[1], "needle")
        return (0.0 if lost is None else lost.mean), one[0]

    return min(equal, key=badness)[1]


def make_plan(
    results: Results, model: nn.Module, max_kl: float, calibration: Calibration | None = None
) -> Plan:
    """A plan with the best setting of a bench, and what it is expected to keep and to cost."""
    setting = best_setting(results, max_kl)
    expected = {}
    for measure in ("kept", "kl", "top1"):
        found = results.estimate(setting, measure)
        if found is not None:
            expected[measure] = round(found.mean, 5)
    for measure in ("needle", "multikey", "variables", "copy"):
        lost = results.lost(setting, measure)
        if lost is not None:
            expected[f"{measure}_lost"] = round(lost.mean, 5)
    named = Named.parse(setting.method)
    return Plan.make(
        model,
        setting.method,
        parse_size(setting.budget),
        calibration if named.calibrated else None,
        expected={**expected, "length": setting.length},
    )


def parse_size(text: str) -> Size:
    """A budget as the command line takes it: "0.2", "512" or "64MB".

    >>> parse_size("0.2"), parse_size("512"), parse_size("64MB")
    (0.2, 512, '64MB')
    """
    try:
        return int(text)
    except ValueError:
        pass
    try:
        return float(text)
    except ValueError:
        return text
