"""Proof that an attached model still computes what the untouched model computes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from regard._errors import AttachError, ModelError
from regard.attach.session import Session
from regard.engine import Block, Method


class _Reader(Method):
    """Reads every row and changes nothing: makes all attention go through the blockwise backend."""

    reads_only = True

    def weights(self, block: Block) -> None:
        return None


@dataclass(frozen=True, slots=True)
class Equality:
    """`difference` = max |attached - untouched| over the outputs of valid tokens; `scale` = max |untouched|."""

    difference: float
    scale: float
    tolerance: float

    @property
    def holds(self) -> bool:
        return self.difference <= self.tolerance * max(self.scale, 1.0)

    def __str__(self) -> str:
        return f"max |difference| to the untouched model = {self.difference:.1e} (outputs up to {self.scale:.3g})"


def equality(model: nn.Module, inputs: dict[str, Any], tolerance: float | None = None) -> Equality:
    """Runs the untouched and the attached model on `inputs` and compares their first output tensor.

    Cost: two forward passes. `tolerance` is relative to the largest output: 1e-4 for fp32 and wider for 16 bit by default.

    Raises:
        AttachError: when the difference exceeds the tolerance.
        ModelError: when the untouched model's output is not finite.
    """
    with torch.no_grad():
        output = model(**inputs)
        check_finite(model, output)
        plain = first_tensor(output)
        with Session(model, _Reader()):
            attached = first_tensor(model(**inputs))
    if tolerance is None:
        tolerance = 1e-4 if plain.dtype in (torch.float32, torch.float64) else 5e-2
    plain, attached = valid_part(plain, inputs).double(), valid_part(attached, inputs).double()
    result = Equality(float((plain - attached).abs().max()), float(plain.abs().max()), tolerance)
    if not result.holds:
        raise AttachError(
            f"{type(model).__name__}: {result}, above the tolerance {tolerance:g}; nothing was changed"
        )
    return result


def first_tensor(output: Any) -> Tensor:
    """The tensor that a model's output is compared by: logits, else the last hidden state, else the first tensor."""
    if isinstance(output, Tensor):
        return output
    for name in ("logits", "last_hidden_state", "logits_per_image"):
        value = getattr(output, name, None)
        if isinstance(value, Tensor):
            return value
    values = output.values() if isinstance(output, dict) else output
    return next(value for value in values if isinstance(value, Tensor))


def valid_part(tensor: Tensor, inputs: Mapping[str, Any]) -> Tensor:
    """The rows of `[batch, tokens, ...]` that are not padding by the attention mask among the inputs."""
    for name in ("decoder_attention_mask", "attention_mask"):
        mask = inputs.get(name)
        if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape == tensor.shape[:2]:
            return tensor[mask.bool()]
    return tensor


def check_finite(model: nn.Module, output: Any) -> None:
    """Raises `ModelError` when the output holds NaN or infinity, naming the first bad parameter if there is one."""
    values = first_tensor(output)
    if bool(torch.isfinite(values).all()):
        return
    bad = next(
        (name for name, p in model.named_parameters() if not bool(torch.isfinite(p).all())), None
    )
    where = (
        f"parameter {bad} holds NaN or infinite numbers"
        if bad
        else "its parameters are finite, so a layer overflowed"
    )
    raise ModelError(
        f"{type(model).__name__} gives NaN or infinite output: {where}; nothing it shows would be meaningful"
    )
