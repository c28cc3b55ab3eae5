"""Position interpolation: squeeze a longer sequence into the positions that a model knows.

    angle(position) -> angle(position / factor)

for every rotary frequency (Chen et al. 2023, arXiv 2306.15595). Without training it lets a model run on `factor` times the
length at some loss; a short fine-tuning removes the loss.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from regard._errors import InputError, ModelError

BUFFERS = ("inv_freq", "original_inv_freq")


def rope_interpolate(model: nn.Module, factor: float | int) -> Interpolation:
    """Divides all positions of a rotary model by `factor`, at once and until undone.

    `with rope_interpolate(model, 4): ...` undoes it at the end of the block; `change = rope_interpolate(model, 4)` keeps it until
    `change.undo()`. The config follows (`rope_type` "linear", its factor, `max_position_embeddings`), so that a model saved in
    between is loaded with the same positions. Factors multiply when nested; undo them in reverse order.

    Raises:
        InputError: `factor` is not above 0, or the model scales its positions in another way already.
        ModelError: the model has no rotary frequencies that can be found.

    Cost: a few hundred numbers.
    """
    return Interpolation(model, factor)


class Interpolation:
    """A change of a model's positions that can be taken back; see `rope_interpolate`."""

    def __init__(self, model: nn.Module, factor: float | int) -> None:
        if not factor > 0:
            raise InputError.of("factor", given=factor, expected="a number above 0")
        rotary = [module for module in model.modules() if _frequencies(module)]
        if not rotary:
            raise ModelError(
                f"{type(model).__name__} has no rotary embedding (a module with inv_freq), so no positions to interpolate"
            )
        for module in rotary:
            kind = getattr(module, "rope_type", "default")
            if kind not in ("default", "linear"):
                raise InputError(
                    f"rope_interpolate needs plain or linearly scaled positions, got rope_type {kind!r}; "
                    "change the factor in the model's config instead"
                )
        self.factor = factor
        self._buffers: list[tuple[nn.Module, str, Tensor]] = []
        self._settings: list[tuple[Any, str, Any]] = []
        for module in rotary:
            for name, held in _frequencies(module).items():
                self._buffers.append((module, name, held))
                setattr(module, name, held / factor)
        for config in _configs(model, rotary):
            self._rewrite(config)

    def undo(self) -> None:
        """Puts frequencies and config back; safe to call twice."""
        for module, name, held in self._buffers:
            setattr(module, name, held)
        for config, name, held in self._settings:
            setattr(config, name, held)
        self._buffers, self._settings = [], []

    def __enter__(self) -> Interpolation:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.undo()

    def _rewrite(self, config: Any) -> None:
        held = config.rope_parameters
        before = float(held.get("factor", 1.0)) if held.get("rope_type") == "linear" else 1.0
        changed = {**held, "rope_type": "linear", "factor": before * self.factor}
        most = config.max_position_embeddings
        for name, value in (
            ("rope_parameters", changed),
            ("max_position_embeddings", round(most * self.factor)),
        ):
            self._settings.append((config, name, getattr(config, name)))
            setattr(config, name, value)


def _frequencies(module: nn.Module) -> dict[str, Tensor]:
    found = {name: getattr(module, name, None) for name in BUFFERS}
    held = {name: buffer for name, buffer in found.items() if isinstance(buffer, torch.Tensor)}
    return held if "inv_freq" in held else {}


def _configs(model: nn.Module, rotary: list[nn.Module]) -> list[Any]:
    """The configs, each once, that say how the positions of these modules are scaled."""
    known = [getattr(module, "config", None) for module in (model, *rotary)]
    configs: dict[int, Any] = {}
    for config in known:
        plain = isinstance(getattr(config, "rope_parameters", None), dict)
        if plain and hasattr(config, "max_position_embeddings"):
            configs[id(config)] = config
    return list(configs.values())
