"""A method: anything that reads or changes attention, written as overrides of a few hooks.

The engine looks at which hooks a method overrides and does no more work than these need: a method that only scales
head outputs leaves the fused kernel in place; one that reads weights gets them block by block.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from regard.engine.block import Block
    from regard.engine.call import AttentionCall


@dataclass(slots=True)
class State:
    """A place in the residual stream.

    `part` is "embed" (the input of block 0), "attention", "cross" or "mlp" (what that sub-layer adds to the stream; "cross"
    in decoders that attend to an encoder), "block" (the stream after the block) or "neurons" (the input of the MLP's down
    projection, `[batch, tokens, d_ff]`).
    """

    part: str
    layer: int
    stack: str
    hidden: Tensor
    valid: Tensor | None = None
    module: nn.Module | None = None


class Method:
    """Base of everything that can be attached. Override any hooks; return None to leave things as they are.

    `reads_late` says that `weights` only reads, and may see the rows of a decode step some steps later, many at once.
    """

    reads_late = False

    def start(self, session: Any) -> None:
        """Called when the method is attached to a model."""

    def stop(self) -> None:
        """Called when it is detached, also after an exception."""

    def before(self, call: AttentionCall) -> AttentionCall | None:
        """Sees query, key, value and mask; may return another call."""

    def scores(self, block: Block) -> Tensor | None:
        """Sees `block.scores` `[batch, heads, rows, keys]` before the softmax; may return others."""

    def weights(self, block: Block) -> Tensor | None:
        """Sees `block.weights` `[batch, heads, rows, keys]` after the softmax; may return others."""

    def heads(self, call: AttentionCall, output: Tensor) -> Tensor | None:
        """Sees head outputs `[batch, heads, queries, value_dim]` before the output projection; may return others."""

    def after(self, call: AttentionCall) -> None:
        """The call is finished; `call.output` is set."""

    def residual(self, state: State) -> Tensor | None:
        """Sees the residual stream and what each sub-layer adds to it; may return another tensor."""

    def neurons(self, state: State) -> Tensor | None:
        """Sees the MLP's hidden activations; may return others."""


def overrides(method: Method, hook: str) -> bool:
    """Whether `method` has its own version of `hook`."""
    return getattr(type(method), hook) is not getattr(Method, hook) or hook in vars(method)


def reading(method: Method) -> AbstractContextManager[object]:
    """What a hook runs in: a method that only reads leaves no trace in the autograd graph, so its sums can be kept."""
    if torch.is_grad_enabled() and getattr(method, "reads_only", False):
        return torch.no_grad()
    return _NOTHING


_NOTHING = nullcontext()


class Pipeline:
    """Methods in the order they were attached, sorted by the hooks they use."""

    hooks = ("before", "scores", "weights", "heads", "after", "residual", "neurons")

    def __init__(self, methods: tuple[Method, ...] | list[Method]) -> None:
        self.methods = tuple(methods)
        self.using = {
            hook: tuple(m for m in self.methods if overrides(m, hook)) for hook in self.hooks
        }

    def __getitem__(self, hook: str) -> tuple[Method, ...]:
        return self.using[hook]

    @property
    def needs_weights(self) -> bool:
        return bool(self.using["scores"] or self.using["weights"])

    @property
    def reads_only(self) -> bool:
        """True when no method can change scores or weights, so that the fused output stands."""
        return not self.using["scores"] and all(
            getattr(m, "reads_only", False) for m in self.using["weights"]
        )
