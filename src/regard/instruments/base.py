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
                self.accumulate(
                    name, key, copy.copy(value) if isinstance(value, list) else value.clone()
                )
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
            raise InputError(
                f"{type(self).__name__} has no per-head result to tabulate; use compute()"
            )
        return polars.concat(frames)

    def plot(self) -> Any:
        """One heat map for each per-head result (needs the `plot` extra)."""
        import matplotlib.pyplot as plt

        measures = list(self.measures().values())
        figure, axes = plt.subplots(
            1, len(measures), figsize=(4.2 * len(measures), 5), squeeze=False, layout="constrained"
        )
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
                **{
                    f"{name}.{part}": "sum"
                    for name in cls.quantities
                    for part in ("sum", "square", "rows", "of")
                },
            }

    def __init__(self) -> None:
        super().__init__()
        self._pending: dict[str, list[tuple[Tensor, Tensor | None]]] = {}
        self._call: AttentionCall | None = None
        self._share = 1.0

    def add_rows(self, block: Block, included: Tensor | None = None, **rows: Tensor) -> None:
        """Adds one `[batch, heads, rows]` for each quantity; `included` `[batch|1, rows]` leaves out more than padding.

        Rows are only put aside here and reduced once per call, which keeps small operations out of the block loop.
        """
        if self._call is not block.call:
            self._call, self._pending, self._share = block.call, {}, block.share
        valid = block.valid
        if included is not None and not bool(included.all()):
            included = included.expand(block.weights.shape[0], -1)
            valid = included if valid is None else valid & included
        for name, values in rows.items():
            self._pending.setdefault(name, []).append((values, valid))

    def after(self, call: AttentionCall) -> None:
        if self._call is not call:
            return
        key = call.site.key
        for name, parts in self._pending.items():
            kept = [
                v.double() if ok is None else torch.where(ok[:, None], v, 0).double()
                for v, ok in parts
            ]
            rows = torch.cat(kept, -1) if len(kept) > 1 else kept[0]
            count = sum(
                float(v.shape[0] * v.shape[2]) if ok is None else float(ok.sum()) for v, ok in parts
            )
            size = torch.tensor([count])
            self.accumulate(f"{name}.sum", key, rows.sum((0, 2)))
            self.accumulate(f"{name}.square", key, rows.square().sum((0, 2)))
            self.accumulate(f"{name}.rows", key, size)
            self.accumulate(f"{name}.of", key, size * self._share)
        self._call, self._pending = None, {}

    def stop(self) -> None:
        self._call, self._pending = None, {}

    def mean(self, name: str) -> HeadMeasure:
        """The mean over rows of one quantity."""
        unit, definition = self.quantities[name]
        measure = HeadMeasure(name, unit, {}, {}, definition)
        for key, total in self.state[f"{name}.sum"].items():
            n, of = float(self.state[f"{name}.rows"][key]), float(self.state[f"{name}.of"][key])
            mean = total / n if n else torch.full_like(total, float("nan"))
            measure.values[key] = mean.float()
            if of > n > 1:
                variance = (
                    (self.state[f"{name}.square"][key] / n - mean.square()).clamp_min(0)
                    * n
                    / (n - 1)
                )
                measure.error[key] = (variance / n * (1 - n / of)).sqrt().float()
        return measure

    def compute(self) -> dict[str, HeadMeasure]:
        return {name: self.mean(name) for name in self.quantities}


class SeriesInstrument(Instrument):
    """Keeps numbers for each (head, token), one `[batch, heads, tokens]` for every sequence: O(tokens) memory.

    A call whose query 0 is the first token opens a new sequence; decoding extends the open one.
    """

    def __init__(self) -> None:
        super().__init__()
        self._open: dict[tuple[str, SiteKey], AttentionCall] = {}

    def series(
        self, name: str, block: Block, tokens: int, fill: float = 0.0, heads: int | None = None
    ) -> Tensor:
        """The open tensor of state `name`, `[batch, heads, tokens or more]`, ready to write into."""
        call, key = block.call, block.site.key
        sequences = self.state[name].setdefault(key, [])
        if self._open.get((name, key)) is not call:
            self._open[name, key] = call
            shape = (call.query.shape[0], heads or call.heads)
            if call.query_offset == 0 or not sequences or sequences[-1].shape[:2] != shape:
                dtype = block.weights.dtype
                sequences.append(
                    torch.full((*shape, tokens), fill, dtype=dtype, device=block.rows.device)
                )
        held = sequences[-1]
        if held.shape[-1] < tokens:
            grown = held.new_full((*held.shape[:2], tokens), fill)
            grown[..., : held.shape[-1]] = held
            sequences[-1] = held = grown
        return held

    def reset(self) -> None:
        super().reset()
        self._open.clear()

    def stop(self) -> None:
        self._open.clear()


__all__ = [
    "HeadMeasure",
    "Instrument",
    "RowInstrument",
    "SeriesInstrument",
    "SiteKey",
    "TokenMeasure",
]
