"""Silence neurons and cap the residual stream.

`ZeroNeurons` switches MLP neurons off. `CapActivations` and `CapRatio` clamp the residual stream: the dose in a dose-response of
massive activations (Sun et al. 2024, arXiv 2402.17762): a residual entry that is thousands of times the median acts as a bias
that feeds the attention sink; capping it at several limits shows how much of the model's loss depends on it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from regard._errors import InputError
from regard.coordinates import Neuron
from regard.coordinates import neurons as parse_neurons
from regard.engine import Method, State
from regard.interventions._places import SiteKey, neuron_grid


class ZeroNeurons(Method):
    """Chosen MLP neurons are 0: the channels of the down projection's input (`mlp.4.n17`).

    Args:
        neurons: in any form that `regard.coordinates.neurons` reads.
        phase: "all", or "decode" to act only where one token at a time is run.

    Raises:
        InputError: a neuron is outside the model (when attached).
    """

    def __init__(self, neurons: Any, *, phase: str = "all") -> None:
        if phase not in ("all", "decode"):
            raise InputError.of("phase", given=phase, expected="'all' or 'decode'")
        self.spec = neurons
        self.phase = phase
        self.chosen: tuple[Neuron, ...] = ()
        self._index: dict[SiteKey, Tensor] = {}

    def start(self, session: Any) -> None:
        grid = neuron_grid(session.stacks)
        if not grid:
            raise InputError(
                f"{type(session.model).__name__} has no MLP whose down projection regard can find, "
                "so its neurons have no coordinates"
            )
        self.chosen = parse_neurons(self.spec, grid=grid)
        for key in {neuron.key for neuron in self.chosen}:
            picked = [neuron.index for neuron in self.chosen if neuron.key == key]
            self._index[key] = torch.tensor(picked)

    def stop(self) -> None:
        self._index.clear()

    def neurons(self, state: State) -> Tensor | None:
        index = self._index.get((state.stack, state.layer))
        if index is None or (self.phase == "decode" and state.hidden.shape[-2] > 1):
            return None
        return state.hidden.index_fill(-1, index.to(state.hidden.device), 0)


class _Cap(Method):
    """Clamps the stream after each chosen block to plus or minus a limit."""

    def __init__(
        self,
        *,
        layers: Iterable[int] | None = None,
        dims: Iterable[int] | None = None,
        stack: str = "",
    ) -> None:
        self.layers = None if layers is None else frozenset(int(layer) for layer in layers)
        self.dims = None if dims is None else tuple(int(dim) for dim in dims)
        self.stack = stack

    def limit(self, hidden: Tensor) -> Tensor:
        raise NotImplementedError

    def start(self, session: Any) -> None:
        blocks = {s.name: len(s.blocks) for s in session.stacks}
        if self.stack not in blocks:
            raise InputError.of("stack", given=self.stack, expected=f"one of {sorted(blocks)}")
        last = blocks[self.stack] - 1
        if self.layers is not None and not all(0 <= layer <= last for layer in self.layers):
            raise InputError.of("layers", given=sorted(self.layers), expected=f"blocks 0..{last}")

    def residual(self, state: State) -> Tensor | None:
        if state.part != "block" or state.stack != self.stack:
            return None
        if self.layers is not None and state.layer not in self.layers:
            return None
        hidden, limit = state.hidden, self.limit(state.hidden)
        if self.dims is None:
            return torch.clamp(hidden, -limit, limit)
        width = hidden.shape[-1]
        if not all(0 <= dim < width for dim in self.dims):
            raise InputError.of("dims", given=self.dims, expected=f"dimensions 0..{width - 1}")
        index = torch.tensor(self.dims, device=hidden.device)
        return hidden.index_copy(-1, index, torch.clamp(hidden[..., index], -limit, limit))


class CapActivations(_Cap):
    """No entry of the residual stream is larger than `limit`: `x := clamp(x, -limit, limit)` after each block.

    Args:
        limit: the largest magnitude that stays, in the units of the stream; infinity changes nothing.
        layers: blocks after which to cap; all when None. (The next block starts from the capped stream.)
        dims: residual dimensions to cap; all when None.
        stack: the stack of blocks, "" for the main one.

    Raises:
        InputError: the limit is negative, or a layer or dimension is outside the model.
    """

    def __init__(
        self,
        limit: float | int,
        *,
        layers: Iterable[int] | None = None,
        dims: Iterable[int] | None = None,
        stack: str = "",
    ) -> None:
        if not limit >= 0:
            raise InputError.of("limit", given=limit, expected="a magnitude >= 0")
        super().__init__(layers=layers, dims=dims, stack=stack)
        self.cap = float(limit)

    def limit(self, hidden: Tensor) -> Tensor:
        return hidden.new_tensor(self.cap)


class CapRatio(_Cap):
    """No entry of a token's residual state is larger than `ratio` times the median magnitude of that state.

    Ordinary tokens stay as they are when `ratio` is large (a few hundred); only massive activations meet the limit.
    Other arguments and errors as in `CapActivations`.
    """

    def __init__(
        self,
        ratio: float | int,
        *,
        layers: Iterable[int] | None = None,
        dims: Iterable[int] | None = None,
        stack: str = "",
    ) -> None:
        if not (ratio > 0 and math.isfinite(ratio)):
            raise InputError.of("ratio", given=ratio, expected="a finite factor > 0")
        super().__init__(layers=layers, dims=dims, stack=stack)
        self.ratio = float(ratio)

    def limit(self, hidden: Float[Tensor, "*tokens dim"]) -> Float[Tensor, "*tokens 1"]:
        return self.ratio * hidden.abs().median(-1, keepdim=True).values
