"""The text while it is being decoded: which positions are open, decided, just decided, and which may be decided next."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from regard._errors import InputError


@dataclass(frozen=True)
class Canvas:
    """One step's view of a batch of sequences of equal length.

    Attributes:
        tokens: `[batch, sequence]`, the mask token where nothing is decided.
        open: `[batch, sequence]`, positions that are still to be decided (masks behind an end of sequence are not).
        decoded: `[batch, sequence]`, positions that hold a token: the prompt and what has been decided.
        committed: `[batch, sequence]`, positions decided in the previous step.
        starts: `[batch]`, the first position of each answer.
        step: `[batch]`, steps done.
        sequences: `[batch]`, which sequences of the whole batch these are (finished ones drop out).
    """

    tokens: Int[Tensor, "batch sequence"]
    open: Bool[Tensor, "batch sequence"]
    decoded: Bool[Tensor, "batch sequence"]
    committed: Bool[Tensor, "batch sequence"]
    starts: Int[Tensor, " batch"]
    step: Int[Tensor, " batch"]
    sequences: Int[Tensor, " batch"]


@dataclass(frozen=True)
class Sliding:
    """The leftmost `size` open masks are decided next."""

    size: int = 16

    def __post_init__(self) -> None:
        _positive("window", self.size)

    def active(self, canvas: Canvas) -> Bool[Tensor, "batch sequence"]:
        return canvas.open & (canvas.open.cumsum(1) <= self.size)


@dataclass(frozen=True)
class Blocks:
    """The answer is cut into blocks of `size` positions, decided from left to right, each to its end."""

    size: int = 16

    def __post_init__(self) -> None:
        _positive("block", self.size)

    def block(self, canvas: Canvas) -> Bool[Tensor, "batch sequence"]:
        """All positions of the block that holds the first open mask."""
        places = torch.arange(canvas.tokens.shape[1], device=canvas.tokens.device)
        number = (places - canvas.starts[:, None]).div(self.size, rounding_mode="floor")
        first = canvas.open.to(torch.uint8).argmax(1, keepdim=True)
        return (number == number.gather(1, first)) & (number >= 0)

    def active(self, canvas: Canvas) -> Bool[Tensor, "batch sequence"]:
        return canvas.open & self.block(canvas)


Window = Sliding | Blocks


def window_rule(window: int | Window) -> Window:
    """A window given as a number slides.

    >>> window_rule(8)
    Sliding(size=8)
    """
    return Sliding(window) if isinstance(window, int) else window


def _positive(name: str, size: int) -> None:
    if size < 1:
        raise InputError.of(name, given=size, expected="a whole number >= 1")
