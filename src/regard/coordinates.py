"""Names for places in a model: `L5H3`, `mlp.4.n17`, `resid.5.d42`.

A coordinate is a small frozen value that prints as its name and parses back from it. Layers, heads,
neurons and dimensions count from 0. Models with more than one stack put the stack's name in front:
`encoder.L5H3`, `cross.L0H1`; the main text stack has the empty name and no prefix.

| coordinate | what it names |
|---|---|
| `L5H3` | query head 3 of the attention in block 5 (a *query* head, also in grouped models) |
| `mlp.4.n17` | neuron 17 in block 4: channel 17 of the input of the MLP's down projection |
| `resid.5.d42` | dimension 42 of the residual stream after block 5 |

`heads`, `neurons` and `dimensions` read the flexible forms that commands and methods accept:
wildcards (`L5H*`), ranges with both ends included (`L3-5H0`), whole layers (`L5`), tuples, and
lists of any of these. The names of the same places in other tools are in `regard.addresses`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import ClassVar, TypeAlias, TypeVar

from regard._errors import InputError

_STACK = r"(?:(?P<stack>[A-Za-z_]\w*)\.)?"
_SPAN = r"\*|\d+(?:-\d+)?"

Grid: TypeAlias = tuple[int, int] | Mapping[tuple[str, int], int]
"""Sizes to expand and check against: `(layers, units in each)` for a model with one stack, or
`{(stack, layer): units}` for any model, e.g. `{site.key: site.heads for site in session.sites}`."""


@dataclass(frozen=True, order=True)
class _Coordinate:
    stack: str
    layer: int
    unit: int

    what: ClassVar[str] = "unit"
    units: ClassVar[str] = "units"
    example: ClassVar[str] = ""
    template: ClassVar[str] = ""
    grammar: ClassVar[re.Pattern[str]] = re.compile("")

    def __str__(self) -> str:
        name = self.template.format(layer=self.layer, unit=self.unit)
        return f"{self.stack}.{name}" if self.stack else name

    @property
    def key(self) -> tuple[str, int]:
        """`(stack, layer)`, the key of the attention site or block that holds this place."""
        return self.stack, self.layer

    def _check(self) -> None:
        if self.layer < 0 or self.unit < 0:
            raise InputError(
                f"layers and {self.units} count from 0 upwards, got layer {self.layer} "
                f"and {self.what} {self.unit}"
            )
        if self.stack and not re.fullmatch(r"[A-Za-z_]\w*", self.stack):
            raise InputError(f"a stack is named by one word such as 'encoder', got {self.stack!r}")


C = TypeVar("C", bound=_Coordinate)


@dataclass(frozen=True, order=True, init=False, repr=False)
class Head(_Coordinate):
    """Query head `head` of the attention in block `layer` of `stack`.

    >>> Head(5, 3), str(Head(0, 1, "encoder")), Head.parse("L5H3").layer
    (L5H3, 'encoder.L0H1', 5)
    """

    what: ClassVar[str] = "head"
    units: ClassVar[str] = "heads"
    example: ClassVar[str] = "L5H3, L5H*, L3-5H0, L5, encoder.L0H1"
    template: ClassVar[str] = "L{layer}H{unit}"
    grammar: ClassVar[re.Pattern[str]] = re.compile(
        rf"{_STACK}L(?P<layer>{_SPAN})(?:H(?P<unit>{_SPAN}))?", re.IGNORECASE
    )

    def __init__(self, layer: int, head: int, stack: str = "") -> None:
        _fill(self, layer, head, stack)

    @property
    def head(self) -> int:
        return self.unit

    @classmethod
    def parse(cls, text: str) -> Head:
        """The one head that `text` names. Raises InputError for anything else."""
        return _one(cls, text)

    __repr__ = _Coordinate.__str__


@dataclass(frozen=True, order=True, init=False, repr=False)
class Neuron(_Coordinate):
    """Neuron `index` of the MLP in block `layer`: a channel of its down projection's input.

    >>> Neuron(4, 17), Neuron.parse("encoder.mlp.4.n17").stack
    (mlp.4.n17, 'encoder')
    """

    what: ClassVar[str] = "neuron"
    units: ClassVar[str] = "neurons"
    example: ClassVar[str] = "mlp.4.n17, mlp.4.n0-9, mlp.4, encoder.mlp.4.n17"
    template: ClassVar[str] = "mlp.{layer}.n{unit}"
    grammar: ClassVar[re.Pattern[str]] = re.compile(
        rf"{_STACK}mlp\.(?P<layer>{_SPAN})(?:\.n(?P<unit>{_SPAN}))?", re.IGNORECASE
    )

    def __init__(self, layer: int, index: int, stack: str = "") -> None:
        _fill(self, layer, index, stack)

    @property
    def index(self) -> int:
        return self.unit

    @classmethod
    def parse(cls, text: str) -> Neuron:
        """The one neuron that `text` names. Raises InputError for anything else."""
        return _one(cls, text)

    __repr__ = _Coordinate.__str__


@dataclass(frozen=True, order=True, init=False, repr=False)
class Dimension(_Coordinate):
    """Dimension `index` of the residual stream after block `layer`.

    >>> Dimension(5, 42), Dimension.parse("resid.5.d42") == Dimension(5, 42)
    (resid.5.d42, True)
    """

    what: ClassVar[str] = "dimension"
    units: ClassVar[str] = "dimensions"
    example: ClassVar[str] = "resid.5.d42, resid.*.d42, resid.3-5.d0, encoder.resid.5.d42"
    template: ClassVar[str] = "resid.{layer}.d{unit}"
    grammar: ClassVar[re.Pattern[str]] = re.compile(
        rf"{_STACK}resid\.(?P<layer>{_SPAN})(?:\.d(?P<unit>{_SPAN}))?", re.IGNORECASE
    )

    def __init__(self, layer: int, index: int, stack: str = "") -> None:
        _fill(self, layer, index, stack)

    @property
    def index(self) -> int:
        return self.unit

    @classmethod
    def parse(cls, text: str) -> Dimension:
        """The one dimension that `text` names. Raises InputError for anything else."""
        return _one(cls, text)

    __repr__ = _Coordinate.__str__


def parse(text: str) -> Head | Neuron | Dimension:
    """The one place that `text` names, whatever its kind.

    >>> parse("mlp.4.n17"), parse("resid.5.d42"), parse("L5H3")
    (mlp.4.n17, resid.5.d42, L5H3)
    """
    for kind in (Neuron, Dimension, Head):
        if kind.grammar.fullmatch(text.strip()):
            return _one(kind, text)
    raise InputError(f"{text!r} names no place in a model; write L5H3, mlp.4.n17 or resid.5.d42")


def heads(*spec: object, grid: Grid | None = None) -> tuple[Head, ...]:
    """The heads that `spec` names, in the order given and each once.

    Accepts names, ranges and wildcards in one string or several, `(layer, head)` and
    `(stack, layer, head)` tuples, `Head`s, `(Head, score)` pairs, and lists of these. Wildcards, and the check that every
    head exists, need `grid`. A name without a prefix means the main stack.

    >>> heads("L5H3 L0-1H2", (4, 0))
    (L5H3, L0H2, L1H2, L4H0)
    >>> heads("L1", "L*H0", grid=(2, 3))
    (L1H0, L1H1, L1H2, L0H0)

    Raises InputError naming the admissible range when a head is outside `grid`.
    """
    return _expand(Head, spec, grid)


def neurons(*spec: object, grid: Grid | None = None) -> tuple[Neuron, ...]:
    """The neurons that `spec` names; forms and errors as in `heads`.

    >>> neurons("mlp.4.n1-3")
    (mlp.4.n1, mlp.4.n2, mlp.4.n3)
    """
    return _expand(Neuron, spec, grid)


def dimensions(*spec: object, grid: Grid | None = None) -> tuple[Dimension, ...]:
    """The residual dimensions that `spec` names; forms and errors as in `heads`.

    >>> dimensions("resid.*.d42", grid=(3, 64))
    (resid.0.d42, resid.1.d42, resid.2.d42)
    """
    return _expand(Dimension, spec, grid)


def _fill(place: _Coordinate, layer: int, unit: int, stack: str) -> None:
    for name, value in (("stack", stack), ("layer", int(layer)), ("unit", int(unit))):
        object.__setattr__(place, name, value)
    place._check()


def _one(kind: type[C], text: str) -> C:
    found = _expand(kind, (text,), None)
    if len(found) != 1:
        raise InputError(f"{text!r} names {len(found)} {kind.units}, expected one")
    return found[0]


def _expand(kind: type[C], spec: Iterable[object], grid: Grid | None) -> tuple[C, ...]:
    sizes = _sizes(grid)
    found: dict[C, None] = {}
    for part in spec:
        for place in _read(kind, part, sizes):
            _inside(place, sizes)
            found[place] = None
    return tuple(found)


def _read(kind: type[C], part: object, sizes: dict[tuple[str, int], int] | None) -> Iterable[C]:
    if isinstance(part, kind):
        return (part,)
    if scored(part, kind):
        return (part[0],)  # type: ignore[index]
    if isinstance(part, str):
        words = re.split(r"[\s,]+", part.strip())
        return [place for word in words for place in _word(kind, word, sizes)]
    if isinstance(part, tuple) and len(part) in (2, 3) and all(map(_whole, part[-2:])):
        stack = part[0] if len(part) == 3 else ""
        if isinstance(stack, str):
            return (kind(int(part[-2]), int(part[-1]), stack),)  # type: ignore[call-arg]
    if isinstance(part, Iterable) and not isinstance(part, (bytes, Mapping)):
        return [place for inner in part for place in _read(kind, inner, sizes)]
    raise InputError(f"{part!r} names no {kind.what}; write {kind.example} or (layer, index)")


def _word(kind: type[C], word: str, sizes: dict[tuple[str, int], int] | None) -> list[C]:
    match = kind.grammar.fullmatch(word)
    if match is None:
        raise InputError(f"{word!r} names no {kind.what}; write {kind.example}")
    stack = match["stack"] or ""
    all_layers = sorted(layer for name, layer in sizes if name == stack) if sizes else None
    places = []
    for layer in _span(match["layer"], all_layers, f"the layers of {word!r}"):
        count = sizes.get((stack, layer)) if sizes else None
        # Without a layer of that number there is nothing to expand; _inside names the range.
        units = range(1) if sizes and count is None else (None if count is None else range(count))
        spans = _span(match["unit"] or "*", units, f"the {kind.units} of {word!r}")
        places += [kind(layer, unit, stack) for unit in spans]  # type: ignore[call-arg]
    return places


def _span(text: str, known: Iterable[int] | None, what: str) -> Iterable[int]:
    if text == "*":
        if known is None:
            raise InputError(
                f"{what} are open-ended; give the model's sizes (grid=) to expand them"
            )
        return known
    low, _, high = text.partition("-")
    if high and int(high) < int(low):
        raise InputError(f"{what} run backwards ({text}); write {high}-{low}")
    return range(int(low), int(high or low) + 1)


def _sizes(grid: Grid | None) -> dict[tuple[str, int], int] | None:
    if grid is None or isinstance(grid, Mapping):
        return None if grid is None else dict(grid)
    layers, units = grid
    return {("", layer): units for layer in range(layers)}


def _inside(place: _Coordinate, sizes: dict[tuple[str, int], int] | None) -> None:
    if sizes is None:
        return
    layers = sorted(layer for stack, layer in sizes if stack == place.stack)
    if not layers:
        stacks = sorted({stack for stack, _ in sizes})
        named = ", ".join(repr(stack) if stack else "no prefix (main)" for stack in stacks)
        raise InputError(f"{place}: the model has no stack {place.stack!r}; it has {named}")
    if place.key not in sizes:
        where = (
            f"{layers[0]}..{layers[-1]}"
            if layers == list(range(layers[0], layers[-1] + 1))
            else ", ".join(map(str, layers))
        )
        raise InputError(f"{place} is outside the model: layers with {place.units} are {where}")
    if place.unit >= sizes[place.key]:
        raise InputError(
            f"{place} is outside the model: layer {place.layer} has {place.units} "
            f"0..{sizes[place.key] - 1}"
        )


def scored(part: object, kind: type | tuple[type, ...]) -> bool:
    """Whether `part` is a `(place, score)` pair, as results list them; two places are not one."""
    if not isinstance(part, tuple) or len(part) != 2:
        return False
    return isinstance(part[0], kind) and isinstance(part[1], Real)


def _whole(value: object) -> bool:
    return hasattr(value, "__index__") and not isinstance(value, bool)
