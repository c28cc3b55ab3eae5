"""Which heads and neurons a model has, read from its modules before it has run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from regard._errors import InputError
from regard.attach.anatomy import CROSS, BlockParts, Stack, anatomy
from regard.coordinates import Head, Neuron, scored
from regard.coordinates import heads as parse_heads
from regard.coordinates import neurons as parse_neurons

SiteKey = tuple[str, int]

_COUNTS = ("num_attention_heads", "num_heads", "n_heads", "n_head", "attention_heads")


def head_grid(stacks: Iterable[Stack]) -> dict[SiteKey, int]:
    """`{(stack, layer): query heads}` of the attention modules that say how many heads they have."""
    grid: dict[SiteKey, int] = {}
    for stack in stacks:
        for block in stack.blocks:
            for name, module in block.attentions.items():
                crossing = bool(CROSS.search(name)) or getattr(module, "is_cross_attention", False)
                label = stack.name
                if crossing:
                    label = f"{stack.name}.cross" if stack.name else "cross"
                count = head_count(module)
                if count is not None:
                    grid.setdefault((label, block.layer), count)
    return grid


def head_count(module: nn.Module) -> int | None:
    """Query heads of an attention module, from the module, what it wraps, or its configuration."""
    for owner in module.modules():
        for source in (owner, getattr(owner, "config", None)):
            for name in _COUNTS:
                value = getattr(source, name, None)
                if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                    return value
    return None


def neuron_grid(stacks: Iterable[Stack]) -> dict[SiteKey, int]:
    """`{(stack, layer): neurons}` of the MLPs whose down projection is known."""
    grid: dict[SiteKey, int] = {}
    for stack in stacks:
        for block in stack.blocks:
            width = _width(block)
            if width is not None:
                grid[stack.name, block.layer] = width
    return grid


def _width(block: BlockParts) -> int | None:
    down = block.down_projection
    if isinstance(down, nn.Linear):
        return down.in_features
    weight = getattr(down, "weight", None)
    outputs = getattr(down, "nf", None)  # transformers' Conv1D keeps [in, out]
    if weight is None or outputs is None:
        return None
    return int(weight.shape[0])


def find_heads(model: nn.Module, spec: Any) -> tuple[Head, ...]:
    """The heads that `spec` names in `model`; every wildcard expanded, every head checked.

    Raises:
        InputError: a head is outside the model; the message names the admissible range.
    """
    return parse_heads(spec, grid=head_grid(anatomy(model)))


def find_neurons(model: nn.Module, spec: Any) -> tuple[Neuron, ...]:
    """The neurons that `spec` names in `model`; as `find_heads`."""
    grid = neuron_grid(anatomy(model))
    if not grid:
        raise InputError(
            f"{type(model).__name__} has no MLP whose down projection regard can find, "
            "so its neurons have no coordinates"
        )
    return parse_neurons(spec, grid=grid)


def split(spec: Any) -> tuple[list[Any], list[Any]]:
    """Mixed coordinates as `(heads, neurons)`; anything that is not a neuron is left to the heads.

    >>> split("L5H3 mlp.4.n17")
    (['L5H3'], ['mlp.4.n17'])
    """
    heads: list[Any] = []
    neurons: list[Any] = []
    for part in _flat(spec):
        is_neuron = isinstance(part, Neuron) or (
            isinstance(part, str) and Neuron.grammar.fullmatch(part) is not None
        )
        (neurons if is_neuron else heads).append(part)
    return heads, neurons


def _flat(spec: Any) -> Iterable[Any]:
    """The single names and tuples in any nesting; `(layer, head)` and `(stack, layer, head)` are one place."""
    if isinstance(spec, str):
        yield from spec.replace(",", " ").split()
    elif isinstance(spec, tuple) and len(spec) in (2, 3) and hasattr(spec[-1], "__index__"):
        yield spec
    elif scored(spec, (Head, Neuron)):
        yield spec[0]
    elif isinstance(spec, Iterable) and not isinstance(spec, (bytes, Mapping)):
        for part in spec:
            yield from _flat(part)
    else:
        yield spec
