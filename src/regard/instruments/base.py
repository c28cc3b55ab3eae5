"""The accumulator contract of all instruments: update in hooks, `compute`, `reset`, `merge`.

An instrument declares its states; a state is one tensor for each attention site, with the rule that combines two of them:

* "sum", "max", "min": elementwise, for totals over rows and batches;
* "list": kept one after the other, for per-token series (O(tokens) each).

So batches accumulate by themselves, two instruments merge exactly (`a.merge(b)`), and several processes merge with
`gather()`. Nothing here holds a queries x keys map.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor

from regard._errors import InputError
from regard.engine import AttentionCall, Block, Method
from regard.instruments.results import HeadMeasure, SiteKey, TokenMeasure

if TYPE_CHECKING:
    import polars

REDUCTIONS: dict[str, Callable[[Any, Any], Any]] = {
    "sum": lambda a, b: a + b,
    "max": torch.maximum,
    "min": torch.minimum,
    "list": lambda a, b: a + b,
}


class Instrument(Method):
    """Base of everything that reads attention. Subclasses set `states` and write hooks and `compute`."""

    reads_only = True
    states: ClassVar[dict[str, str]] = {}

    def __init__(self) -> None:
        self.state: dict[str, dict[SiteKey, Any]] = {name: {} for name in self.states}

    def reset(self) -> None:
        """Forgets everything observed."""
        self.state = {name: {} for name in self.states}

    def accumulate(self, name: str, key: SiteKey, value: Any) -> None:
        """Combines `value` into state `name` of one site by the state's reduction."""
        held = self.state[name]
        held[key] = value if key not in held else REDUCTIONS[self.states[name]](held[key], value)

    def merge(self, other: Self) -> Self:
        """Adds what `other` observed; the result is as if one instrument had seen both."""
        if type(other) is not type(self) or self.settings() != other.settings():
            raise InputError(
                f"only instruments of the same kind and settings merge: {self.settings()} and {other.settings()}"
            )
        for name, table in other.state.items():
            for key, value in table.items():
                self.accumulate(name, key, copy.copy(value) if isinstance(value, list) else value.clone())
        return self

    def gather(self) -> Self:
        """Merges the observations of all processes of the default torch.distributed group (no-op without one)."""
        dist = torch.distributed
        if not (dist.is_available() and dist.is_initialized()):
            return self
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, self.state)
        self.reset()
        for state in everyone:
            for name, table in state.items():
                for key, value in table.items():
                    self.accumulate(name, key, value)
        return self

    def settings(self) -> dict[str, Any]:
        """The configuration, by which instruments are compared before they merge."""
        hidden = {"state"}
        plain = {k: v for k, v in vars(self).items() if k not in hidden and not k.startswith("_")}
        return {"kind": type(self).__name__, **plain}

    def compute(self) -> Any:
        raise TypeError(f"{type(self).__name__} does not define compute()")

    def measures(self) -> dict[str, HeadMeasure]:
        """The per-head results by name; empty for instruments that have none."""
        result = self.compute()
        found = result.values() if isinstance(result, dict) else [result]
        return {m.name: m for m in found if isinstance(m, HeadMeasure)}

    def to_frame(self) -> polars.DataFrame:
        """All per-head results as one tidy table (needs the `frames` extra)."""
        import polars

        frames = [measure.to_frame() for measure in self.measures().values()]
        if not frames:
            raise InputError(f"{type(self).__name__} has no per-head result to tabulate; use compute()")
        return polars.concat(frames)

    def plot(self) -> Any:
        """One heat map for each per-head result (needs the `plot` extra)."""
        import matplotlib.pyplot as plt

        measures = list(self.measures().values())
        figure, axes = plt.subplots(1, len(measures), figsize=(4.2 * len(measures), 5), squeeze=False, layout="constrained")
        for ax, measure in zip(axes[0], measures, strict=True):
            measure.plot(ax, stack=measure.stacks()[0])
        return figure

    def __repr__(self) -> str:
        seen = max((len(table) for table in self.state.values()), default=0)
        given = ", ".join(f"{k}={v!r}" for k, v in self.settings().items() if k != "kind")
        return f"{type(self).__name__}({given}) [{seen} sites observed]"


class RowInstrument(Instrument):
    """Averages of a number for each (head, query row): `self.add_rows("entropy", block, rows)`.

    Keeps, for each named quantity, the sum, the sum of squares and the number of valid rows; the standard error of a sampled
    mean is `sqrt(var / n * (1 - n / N))` over the n rows seen of N (an upper bound for stratified sampling).
    """

    quantities: ClassVar[dict[str, tuple[str, str]]] = {}
    """name -> (unit, definition)"""

    def __init_subclass__(cls, **rest: Any) -> None:
        super().__init_subclass__(**rest)
        if cls.quantities:
            cls.states = {
                **cls.states,
                **{f"{name}.{part}": "sum" for name in cls.quantities for part in ("sum", "square", "rows", "of")},
            }

    def add_rows(self, name: str, block: Block, rows: Tensor, included: Tensor | None = None) -> None:
        """Adds `[batch, heads, rows]`; `included` `[batch|1, rows]` leaves rows out besides the padding ones."""
        valid = block.valid
        if included is not None:
            included = included.expand(rows.shape[0], -1)
            valid = included if valid is None else valid & included
        if valid is None:
            count = rows.shape[0] * rows.shape[2]
            total, square = rows.sum((0, 2)), rows.square().sum((0, 2))
        else:
            count = int(valid.sum())
            rows = torch.where(valid[:, None], rows, 0)
            total, square = rows.sum((0, 2)), rows.square().sum((0, 2))
        key = block.site.key
        size = torch.tensor([float(count)])
        self.accumulate(f"{name}.sum", key, total.double())
        self.accumulate(f"{name}.square", key, square.double())
        self.accumulate(f"{name}.rows", key, size)
        self.accumulate(f"{name}.of", key, size * block.share)

    def mean(self, name: str) -> HeadMeasure:
        """The mean over rows of one quantity."""
        unit, definition = self.quantities[name]
        measure = HeadMeasure(name, unit, {}, {}, definition)
        for key, total in self.state[f"{name}.sum"].items():
            n, of = float(self.state[f"{name}.rows"][key]), float(self.state[f"{name}.of"][key])
            mean = total / n if n else torch.full_like(total, float("nan"))
            measure.values[key] = mean.float()
            if of > n > 1:
                variance = (self.state[f"{name}.square"][key] / n - mean.square()).clamp_min(0) * n / (n - 1)
                measure.error[key] = (variance / n * (1 - n / of)).sqrt().float()
        return measure

    def compute(self) -> Any:
        return {name: self.mean(name) for name in self.quantities}


class Series:
    """Per-token numbers `[batch, heads, tokens]` of the sequences that pass by, one list entry for each prefill.

    Decoding extends the last entry. `put` writes query rows, `add` sums into keys.
    """

    def __init__(self, fill: float = float("nan")) -> None:
        self.fill = fill

    def current(self, held: dict[SiteKey, list[Tensor]], call: AttentionCall, tokens: int) -> Tensor:
        """The open tensor of a site, grown to `tokens`; the caller starts a new one with `begin`."""
        sequences = held[call.site.key]
        last = sequences[-1]
        if last.shape[-1] < tokens:
            room = max(tokens, 2 * last.shape[-1]) if call.phase == "decode" else tokens
            grown = last.new_full((*last.shape[:2], room), self.fill)
            grown[..., : last.shape[-1]] = last
            sequences[-1] = grown
        return sequences[-1]

    def begin(self, held: dict[SiteKey, list[Tensor]], call: AttentionCall, tokens: int) -> None:
        """Opens a new sequence when the call starts one (query 0 is the first token), or when none is open."""
        sequences = held.setdefault(call.site.key, [])
        fresh = call.query_offset == 0
        if fresh or not sequences or sequences[-1].shape[0] != call.query.shape[0]:
            shape = (call.query.shape[0], call.heads, tokens)
            dtype = torch.float64 if call.query.dtype == torch.float64 else torch.float32
            sequences.append(torch.full(shape, self.fill, dtype=dtype, device=call.query.device))


__all__ = ["HeadMeasure", "Instrument", "RowInstrument", "Series", "SiteKey", "TokenMeasure"]
