"""A plan: how one model's cache is to be kept, as a small JSON file.

`regard bench --plan` writes the best setting it found, with what it is expected to cost; `regard.apply` installs it::

    plan = regard.plan.Plan.load("plan.json")
    with regard.apply(model, plan):
        model.generate(**inputs)          # every generation starts with a planned cache

    model.generate(**inputs, past_key_values=plan.cache(model))   # or one at a time

A plan holds no weights and no text: the model's fingerprint, a method, a budget, and for calibrated budgets the shares of its
heads.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from torch import nn

from regard._errors import InputError
from regard.cache import Cache
from regard.cache.budget import check_size
from regard.cache.calibration import Calibration
from regard.plan.fingerprint import difference, fingerprint
from regard.plan.methods import Named, Size

FORMAT = "regard.plan/1"


@dataclass(frozen=True)
class Plan:
    """One model's cache setting.

    Attributes:
        model: fingerprint of the model it was made for (`regard.plan.fingerprint`).
        method: `scorer` or `scorer+rule`, of `regard.plan.SCORERS` and `regard.plan.RULES`.
        budget: a fraction of the text, tokens per KV head, or bytes such as "64MB".
        calibration: shares of layers and heads, for calibrated budgets.
        expected: what the bench measured for this setting, by measure (KL, needle loss, bytes kept, ...).
        every: also evict while decoding, every so many steps; None keeps all generated tokens.

    Raises:
        InputError: an unknown method, a budget out of range, or a calibrated method without its calibration.
    """

    model: Mapping[str, Any]
    method: str
    budget: Size
    calibration: Calibration | None = None
    expected: Mapping[str, float] = field(default_factory=dict)
    every: int | None = None

    def __post_init__(self) -> None:
        check_size(self.budget)
        Named.parse(self.method).make_budget(self.budget, self.calibration)

    @classmethod
    def make(
        cls,
        model: nn.Module,
        method: str,
        budget: Size,
        calibration: Calibration | None = None,
        **rest: Any,
    ) -> Plan:
        """A plan for `model`, with its fingerprint taken."""
        return cls(fingerprint(model), method, budget, calibration, **rest)

    def check(self, model: nn.Module) -> None:
        """Raises InputError unless the plan was made for `model`: the same architecture with the same weights."""
        other = difference(dict(self.model), fingerprint(model))
        if other:
            raise InputError(
                f"this plan was made for another model ({other}); "
                "make one for this model with: regard bench MODEL --plan plan.json"
            )

    def cache(self, model: nn.Module) -> Cache:
        """An empty cache as planned: `model.generate(**inputs, past_key_values=plan.cache(model))`.

        Raises:
            InputError: the plan was made for another model.
        """
        self.check(model)
        return self._new(model)

    def _new(self, model: nn.Module) -> Cache:
        named = Named.parse(self.method)
        return named.make_cache(model, self.budget, self.calibration, self.every)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes the plan as JSON, whole or not at all."""
        from regard.report import check_writable
        from regard.report.files import write_atomic

        held = {"format": FORMAT} | asdict(self)
        text = json.dumps(held, indent=1, ensure_ascii=False, allow_nan=False)
        return write_atomic(check_writable(path), text + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Reads what `save` wrote.

        Raises:
            InputError: no such file, not a plan, or a damaged one.
        """
        try:
            held = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
        except OSError as error:
            raise InputError(f"cannot read the plan {path}: {error.strerror}") from None
        except ValueError:
            raise InputError(f"{path} is not a plan: it is not JSON") from None
        if not isinstance(held, dict) or held.pop("format", None) != FORMAT:
            raise InputError(f"{path} is not a plan of the format {FORMAT}")
        names = {one.name for one in fields(cls)}
        missing = {"model", "method", "budget"} - set(held)
        if missing or set(held) - names:
            wrong = ", ".join(sorted(missing or set(held) - names))
            raise InputError(
                f"{path} is a damaged plan: {'it lacks' if missing else 'it has the unknown'} {wrong}"
            )
        try:
            if held.get("calibration") is not None:
                held["calibration"] = calibration_of(held["calibration"])
            return cls(**held)
        except (TypeError, KeyError, ValueError) as error:
            raise InputError(f"{path} is a damaged plan: {error}") from None


def calibration_of(held: dict[str, Any]) -> Calibration:
    """A calibration from the plain values that `dataclasses.asdict` and JSON made of it."""
    shares = tuple(tuple(map(tuple, layers)) for layers in held["shares"])
    return Calibration(**{**held, "fractions": tuple(held["fractions"]), "shares": shares})
