"""The accumulator contract of all instruments: update in hooks, `compute`, `reset`, `merge`.

An instrument declares its states; a state is one tensor for each attention site, with the rule that combines two of them:

* "sum", "max", "min": elementwise, for totals over rows and batches;
* "list": kept one after the other, for per-token series (O(tokens) each).

So batches accumulate by themselves, two instruments merge exactly (`a.merge(b)`), and several processes merge with
`gather()`. Nothing here holds a queries x keys map.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from regard._errors import InputError
from regard.engine import AttentionCall, Block, Method
from regard.instruments.results import HeadMeasure, SiteKey, TokenMeasure

if TYPE_CHECKING:
    import polars

LATE = 128
"""Decode steps that are put aside before they are reduced together."""

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

    def merge(self, other: Instrument) -> Instrument:
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

    def gather(self) -> Instrument:
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
    """Averages of a number for each (head, query row): `self.add_rows(block, entropy=rows)`.

    A sampled row stands for the `block.share` rows of its stratum, so sampled and exact calls add up. The standard error treats
    the sampled slots of a call as a simple random sample without replacement; the sequences of a batch share their slots, so a
    slot, not a row, is the unit. Strata only make the true error smaller. Where a few rows carry the mean (the sink share
    of a short text), the error is right on average over draws, but one draw's band covers less than a normal one.
    """

    reads_late = True
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
                    for part in ("sum", "rows", "square", "cross", "spread")
                },
            }

    def __init__(self) -> None:
        super().__init__()
        self._pending: dict[str, list[tuple[Tensor, Tensor | None]]] = {}
        self._rooms: dict[str, tuple[Tensor, int]] = {}
        self._late: dict[SiteKey, dict[str, list[tuple[Tensor, Tensor | None]]]] = {}
        self._call: AttentionCall | None = None
        self._share = 1.0
        self._session: Any = None

    def start(self, session: Any) -> None:
        self._session = session

    def add_rows(self, block: Block, included: Tensor | None = None, **rows: Tensor) -> None:
        """Adds one `[batch, heads, rows]` for each quantity; `included` `[batch|1, rows]` leaves out more than padding.

        Rows are only put aside here and reduced once per call, which keeps small operations out of the block loop. They
        go into one room for the whole call: small tensors left behind by every block would break up the memory.
        """
        call = block.call
        if self._call is not call:
            self._call, self._pending, self._share = call, {}, block.share
            self._rooms = {}
        valid = block.valid
        if included is not None and not bool(included.all()):
            included = included.expand(block.weights.shape[0], -1)
            valid = included if valid is None else valid & included
        for name, values in rows.items():
            if name not in self._rooms:
                count = call.queries if call.rows is None else len(call.rows)
                self._rooms[name] = values.new_empty(*values.shape[:2], count), 0
            room, filled = self._rooms[name]
            place = room[..., filled : filled + values.shape[-1]].copy_(values)
            self._rooms[name] = room, filled + values.shape[-1]
            self._pending.setdefault(name, []).append((place, valid))

    def after(self, call: AttentionCall) -> None:
        if self._call is not call:
            return
        key, done = call.site.key, self._pending
        self._call, self._pending, self._rooms = None, {}, {}
        if call.phase == "prefill":
            self.reduce(key, done, self._share)
            return
        late = self._late.setdefault(key, {})
        for name, parts in done.items():
            held = late.setdefault(name, [])
            if held and held[0][0].shape[:2] != parts[0][0].shape[:2]:
                self.reduce(key, {name: held}, 1.0)
                late[name] = held = []
            held += parts
        if any(len(parts) >= LATE for parts in late.values()):
            self.reduce(key, self._late.pop(key), 1.0)

    def flush(self) -> None:
        """Adds the decode steps that were put aside: single rows are read and reduced many at a time."""
        if self._session is not None:
            self._session.read_late()
        while self._late:
            self.reduce(*self._late.popitem(), 1.0)

    def reduce(
        self, key: SiteKey, pending: dict[str, list[tuple[Tensor, Tensor | None]]], share: float
    ) -> None:
        """Adds rows `[batch, heads, rows]` with their `[batch, rows]` that count (None: all); each stands for `share` rows."""
        for name, parts in pending.items():
            kept = [v if ok is None else torch.where(ok[:, None], v, 0) for v, ok in parts]
            slots = (torch.cat(kept, -1) if len(kept) > 1 else kept[0]).double().sum(0)
            rows = sum(
                float(v.shape[0] * v.shape[2]) if ok is None else float(ok.sum()) for v, ok in parts
            )
            weight = torch.tensor([rows * share], dtype=torch.float64)
            self.accumulate(f"{name}.sum", key, slots.sum(-1) * share)
            self.accumulate(f"{name}.rows", key, weight)
            if share > 1:
                self._add_spread(name, key, slots, _counts(parts), share)

    def _add_spread(
        self, name: str, key: SiteKey, slots: Tensor, counts: Tensor, share: float
    ) -> None:
        """Keeps what the variance of `sum over slots - mean x rows` needs; unknown (NaN) when one slot was sampled."""
        number = slots.shape[-1]
        scale = share * (share - 1) * number / (number - 1) if number > 1 else math.nan
        slots, counts = slots - slots.mean(-1, keepdim=True), counts - counts.mean()
        self.accumulate(f"{name}.square", key, scale * slots.square().sum(-1))
        self.accumulate(f"{name}.cross", key, scale * (slots @ counts))
        self.accumulate(f"{name}.spread", key, scale * counts.square().sum()[None])

    def stop(self) -> None:
        self._call, self._pending, self._rooms = None, {}, {}
        self.flush()
        self._session = None

    def reset(self) -> None:
        self.flush()
        super().reset()

    def merge(self, other: Instrument) -> Instrument:
        self.flush()
        if isinstance(other, RowInstrument):
            other.flush()
        return super().merge(other)

    def gather(self) -> Instrument:
        self.flush()
        return super().gather()

    def mean(self, name: str) -> HeadMeasure:
        """The mean over rows of one quantity."""
        self.flush()
        unit, definition = self.quantities[name]
        measure = HeadMeasure(name, unit, {}, {}, definition)
        for key, total in self.state[f"{name}.sum"].items():
            rows = float(self.state[f"{name}.rows"][key])
            mean = total / rows if rows else torch.full_like(total, float("nan"))
            measure.values[key] = mean.float()
            if key in self.state[f"{name}.square"] and rows:
                square, cross, spread = (
                    self.state[f"{name}.{part}"][key] for part in ("square", "cross", "spread")
                )
                variance = square - 2 * mean * cross + mean.square() * spread
                measure.error[key] = (variance.clamp_min(0).sqrt() / rows).float()
        return measure

    def compute(self) -> dict[str, HeadMeasure]:
        return {name: self.mean(name) for name in self.quantities}


def _counts(parts: list[tuple[Tensor, Tensor | None]]) -> Tensor:
    """`[slots]`: how many sequences of the batch count at each sampled slot."""
    return torch.cat(
        [
            v.new_full((v.shape[2],), v.shape[0], dtype=torch.float64)
            if ok is None
            else ok.sum(0).double()
            for v, ok in parts
        ]
    )


class SeriesInstrument(Instrument):
    """Keeps numbers for each (head, token), one `[batch, heads, tokens]` for every sequence: O(tokens) memory.

    A call whose query 0 is the first token opens a new sequence; decoding extends the open one. Beam search, which reorders the
    rows of a batch between steps, is not followed.
    """

    def __init__(self) -> None:
        super().__init__()
        self._open: dict[tuple[str, SiteKey], AttentionCall] = {}

    def series(
        self, name: str, block: Block, tokens: int, fill: float = 0.0, heads: int | None = None
    ) -> Tensor:
        """The open tensor of state `name`, `[batch, heads, tokens or more]`, ready to write into.

        Slots count from the first token: see `slots_before`.
        """
        call, key = block.call, block.site.key
        sequences = self.state[name].setdefault(key, [])
        if self._open.get((name, key)) is not call:
            self._open[name, key] = call
            shape = (call.query.shape[0], heads or call.heads)
            begins = call.query_offset + slots_before(call) == 0
            if begins or not sequences or sequences[-1].shape[:2] != shape:
                dtype = block.weights.dtype
                sequences.append(
                    torch.full((*shape, tokens), fill, dtype=dtype, device=block.rows.device)
                )
        held = sequences[-1]
        if held.shape[-1] < tokens or (
            held.is_inference() and not torch.is_inference_mode_enabled()
        ):
            grown = torch.full(
                (*held.shape[:2], max(tokens, held.shape[-1])),
                fill,
                dtype=held.dtype,
                device=held.device,
            )
            grown[..., : held.shape[-1]] = held
            sequences[-1] = held = grown
        return held

    def after(self, call: AttentionCall) -> None:
        # a finished call is let go: it holds the layer's queries, keys and values
        self._open = {place: held for place, held in self._open.items() if held is not call}

    def reset(self) -> None:
        super().reset()
        self._open.clear()

    def stop(self) -> None:
        self._open.clear()

    def tokens(self) -> TokenMeasure:
        """The number for each head and token."""
        return self.compute()

    def to_frame(self) -> polars.DataFrame:
        """Every observed sequence: columns `stack, layer, head, sequence, row, position, measure, value`.

        `sequence` numbers the batches in the order observed, `row` the sequences inside one (needs the `frames` extra).
        """
        import polars

        measure, frames = self.tokens(), []
        for (stack, layer), sequences in measure.values.items():
            for number, values in enumerate(sequences):
                grid = [torch.arange(size) for size in values.shape]
                row, head, position = (
                    axis.flatten().numpy() for axis in torch.meshgrid(*grid, indexing="ij")
                )
                frames.append(
                    polars.DataFrame({"head": head, "row": row, "position": position}).select(
                        polars.lit(stack).alias("stack"),
                        polars.lit(layer).alias("layer"),
                        "head",
                        polars.lit(number).alias("sequence"),
                        "row",
                        "position",
                        polars.lit(measure.name).alias("measure"),
                        polars.Series("value", values.detach().flatten().float().cpu().numpy()),
                    )
                )
        if not frames:
            raise InputError(f"{type(self).__name__} has not observed anything yet")
        return polars.concat(frames)

    def plot(
        self,
        ax: Any = None,
        *,
        heads: list[Any] | None = None,
        stack: str = "",
        sequence: int = -1,
        batch: int = 0,
    ) -> Any:
        """The number along the text, one line for each of `heads` ("L5H3"), else mean and middle 80 % of all heads.

        Returns matplotlib Axes (needs the `plot` extra).
        """
        import matplotlib.pyplot as plt

        from regard.coordinates import Head

        measure = self.tokens()
        table = measure.tensor(stack, sequence, batch)
        if ax is None:
            _, ax = plt.subplots(figsize=(9, 3), layout="constrained")
        if heads:
            for name in heads:
                head = Head.parse(name) if isinstance(name, str) else name
                ax.plot(table[head.layer, head.head].numpy(), linewidth=1, label=str(head))
            ax.legend(frameon=False)
        else:
            flat = table.flatten(0, 1)
            low, high = flat.nanquantile(torch.tensor([0.1, 0.9]), 0)
            ax.fill_between(
                range(flat.shape[1]), low, high, alpha=0.2, label="middle 80 % of heads"
            )
            ax.plot(flat.nanmean(0).numpy(), linewidth=1, label="mean over heads")
            ax.legend(frameon=False)
        ax.set(xlabel="token", ylabel=measure.unit, title=measure.name)
        return ax


def slots_before(call: AttentionCall) -> int:
    """Tokens that have left the cache before the call's first key slot (a sliding window's cache while decoding)."""
    return int(getattr(call.mask, "key_offset", 0)) if call.site.kind == "self" else 0


__all__ = [
    "HeadMeasure",
    "Instrument",
    "RowInstrument",
    "SeriesInstrument",
    "SiteKey",
    "TokenMeasure",
    "slots_before",
]
