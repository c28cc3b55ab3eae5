"""Methods by name, as plans, the bench and the command line say them: `scorer` or `scorer+rule`.

    h2o              H2O's score, the same number of keys for every head
    snapkv+ada       SnapKV's score, divided among the heads of a layer
    expected+global  Expected Attention's score, divided among all heads of all layers
    h2o+calibrated   H2O's score, in shares measured once for the model

Any scorer goes with any rule.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from regard._errors import InputError, nearest
from regard.cache import Budget, Cache, KVzip, Scorer, budgets, scorers
from regard.cache.calibration import Calibration

Size = float | int | str


@dataclass(frozen=True)
class Part:
    """A scorer or a rule by name: its title, where it comes from, and how to make it."""

    title: str
    source: str
    make: Callable[..., Any]


SCORERS: dict[str, Part] = {
    "streaming": Part("StreamingLLM", "Xiao et al. 2023, arXiv 2309.17453", scorers.Streaming),
    "h2o": Part("H2O", "Zhang et al. 2023, arXiv 2306.14048", scorers.H2O),
    "h2o-mean": Part(
        "H2O, mean",
        "H2O divided by the queries that see a key",
        lambda: scorers.H2O(normalise=True),
    ),
    "snapkv": Part("SnapKV", "Li et al. 2024, arXiv 2404.14469", scorers.SnapKV),
    "tova": Part("TOVA", "Oren et al. 2024, arXiv 2401.06104", scorers.TOVA),
    "keynorm": Part("Key norm", "Devoto et al. 2024, arXiv 2406.11430", scorers.KeyNorm),
    "expected": Part(
        "Expected Attention", "Devoto et al. 2025, arXiv 2510.00636", scorers.ExpectedAttention
    ),
    "cake": Part("CAKE", "Qin et al. 2025, arXiv 2503.12491", scorers.CAKE),
    "kvzip": Part("KVzip", "Kim et al. 2025, arXiv 2505.23416", scorers.KVzip),
}
RULES: dict[str, Part] = {
    "uniform": Part("uniform", "the same for every head", budgets.Uniform),
    "pyramid": Part("pyramid", "PyramidKV, arXiv 2406.02069: more to the lower layers", budgets.Pyramid),
    "cake": Part("CAKE's", "CAKE: by dispersion and shift of a layer's attention", budgets.CakePreference),
    "ada": Part("Ada", "AdaKV, arXiv 2407.11550: across the heads of a layer", budgets.Ada),
    "global": Part("global", "across all heads of all layers, by score", budgets.Global),
    "calibrated": Part("calibrated", "shares of layers and heads measured once for the model", budgets.Calibrated),
}  # fmt: skip
_OWN_RULE = {"cake": "cake", "kvzip": "global"}  # a method is known by the rule of its paper


@dataclass(frozen=True)
class Named:
    """A method: a scorer's name and a rule's name."""

    scorer: str
    rule: str

    @classmethod
    def parse(cls, name: str) -> Named:
        """From `scorer` or `scorer+rule`; InputError names the nearest ones.

        >>> Named.parse("snapkv"), str(Named.parse("snapkv+uniform"))
        (Named(scorer='snapkv', rule='uniform'), 'snapkv')
        """
        scorer, _, rule = name.strip().lower().partition("+")
        if scorer not in SCORERS:
            _unknown("method", name, scorer, [*SCORERS])
        rule = rule or _OWN_RULE.get(scorer, "uniform")
        if rule not in RULES:
            _unknown("budget rule", name, rule, [*RULES])
        return cls(scorer, rule)

    def __str__(self) -> str:
        return (
            self.scorer
            if self.rule == _OWN_RULE.get(self.scorer, "uniform")
            else f"{self.scorer}+{self.rule}"
        )

    @property
    def title(self) -> str:
        """As a reader says it: `H2O, calibrated`."""
        rule = "" if str(self) == self.scorer else f", {RULES[self.rule].title}"
        return SCORERS[self.scorer].title + rule

    @property
    def source(self) -> str:
        return f"{SCORERS[self.scorer].source}; budget: {RULES[self.rule].source}"

    @property
    def calibrated(self) -> bool:
        """Whether its rule needs shares that were measured for the model."""
        return self.rule == "calibrated"

    def make_scorer(self) -> Scorer:
        return SCORERS[self.scorer].make()

    def make_budget(self, size: Size, calibration: Calibration | None = None) -> Budget:
        """The rule at a size; the calibrated rule needs the model's `calibration`."""
        if not self.calibrated:
            return RULES[self.rule].make(size)
        if calibration is None:
            raise InputError(
                f"{self} needs the model's calibration; make one with regard.cache.calibrate(model, texts)"
            )
        return RULES[self.rule].make(size, calibration)

    def make_cache(
        self,
        model: nn.Module,
        size: Size,
        calibration: Calibration | None = None,
        every: int | None = None,
    ) -> Cache:
        """An empty cache of this method for a model."""
        budget = self.make_budget(size, calibration)
        if self.scorer == "kvzip":
            return KVzip(model, budget, every=every)
        return Cache(model, self.make_scorer(), budget, every=every)


def _unknown(what: str, name: str, part: str, known: list[str]) -> None:
    hint = nearest(part, known) or f"one of {', '.join(known)}"
    raise InputError(f"{what} {part!r} of {name!r} is not known; {hint}")
