"""Run a model from one of its blocks on, for many variants of the same input at once.

What changes only in block l leaves everything before it as it was. The blocks before l therefore answer from the record of
one forward pass, and only the rest is computed, on as many copies of the input as there are variants. The model's own code
makes masks, positions, norms and logits, so nothing here depends on its architecture; where a model passes more between its
blocks than what they return, the first use notices (its losses differ from the plain ones) and whole passes are made instead.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from regard.attach import Stack
from regard.instruments._losses import next_tokens, streamed_losses, surprise, targets_of

TOLERANCE = (
    1e-3  # nats: a shortcut whose losses are farther than this from the plain ones is not used
)


class Replay:
    """Per-token losses of copies of `inputs`, computed from any block on.

    Args:
        model: a language model.
        inputs: tensors of one batch; what has the batch as its first dimension is repeated for each copy.
        stacks: the model's anatomy.

    Attributes:
        base: `[batch, tokens - 1]`, the losses of the recorded pass.
        order: for each block that runs exactly once, its place in the order of execution.
        partial: whether blocks can be skipped; `streamed`: whether losses are made without holding all logits.
    """

    def __init__(
        self, model: nn.Module, inputs: dict[str, Tensor], stacks: Sequence[Stack]
    ) -> None:
        self.model, self.inputs = model, inputs
        self.targets = targets_of(inputs)
        self.batch = self.targets.shape[0]
        self._modules = {(s.name, b.layer): b.module for s in stacks for b in s.blocks}
        known = inspect.signature(model.forward).parameters
        self._settings = {"use_cache": False} if "use_cache" in known else {}
        self._ran: list[nn.Module] = []
        self._answers: dict[int, Any] = {}
        self.partial = False
        self.streamed = self._can_stream()
        self.base = self._record()
        self.order = {
            key: self._ran.index(module)
            for key, module in self._modules.items()
            if module in self._ran
        }
        once = len({id(module) for module in self._ran}) == len(self._ran)
        self.partial = once and self._can_skip()

    def place(self, stack: str, layer: int) -> int:
        """How many blocks can be skipped before block `layer` of a stack (0 when none can)."""
        if not self.partial:
            return 0
        own = stack.removesuffix("cross").removesuffix(".")
        return self.order.get((own, layer), 0)

    def losses(self, copies: int = 1, skip: int = 0) -> Float[Tensor, "copies batch next"]:
        """The losses of `copies` copies of the inputs, with the first `skip` blocks answered from the record."""
        with ExitStack() as stack:
            if skip and self.partial:
                stack.enter_context(self._skipping(skip, copies))
            rows = self._forward(copies)
        return rows.view(copies, self.batch, -1)

    def _forward(self, copies: int, streamed: bool | None = None) -> Tensor:
        inputs = {name: self._repeat(value, copies) for name, value in self.inputs.items()}
        if self.streamed if streamed is None else streamed:
            with streamed_losses(self.model, self.targets) as found:
                self.model(**inputs, **self._settings)
            return found[-1]
        logits = self.model(**inputs, **self._settings).logits
        return surprise(logits[:, :-1], next_tokens(self.targets, logits.shape[0]))

    def _repeat(self, value: Any, copies: int) -> Any:
        if isinstance(value, tuple | list):
            return type(value)(self._repeat(item, copies) for item in value)
        if not isinstance(value, Tensor) or value.dim() == 0 or value.shape[0] != self.batch:
            return value
        return value.repeat(copies, *[1] * (value.dim() - 1))

    def _can_stream(self) -> bool:
        """Whether the losses made in the output layer are those of the model's logits, on a short piece."""
        kept = self.inputs, self.targets, self.batch
        self.inputs = {
            name: value[:1, :16] if value.dim() == 2 else value[:1]
            for name, value in self.inputs.items()
        }
        self.targets, self.batch = targets_of(self.inputs), 1
        try:
            plain = self._forward(1, streamed=False)
            return _same(self._forward(1, streamed=True), plain)
        except Exception:  # a model may refuse in any way; the whole logits are then read instead
            return False
        finally:
            self.inputs, self.targets, self.batch = kept

    def _record(self) -> Tensor:
        handles = [m.register_forward_hook(self._keep) for m in self._modules.values()]
        try:
            return self._forward(1)
        finally:
            for handle in handles:
                handle.remove()

    def _keep(self, module: nn.Module, args: tuple, output: Any) -> None:
        self._ran.append(module)
        self._answers[id(module)] = output

    def _can_skip(self) -> bool:
        """Whether a pass from the middle gives the losses of the whole pass, on two copies."""
        if len(self._ran) < 2:
            return False
        self.partial = True
        try:
            for skip in {len(self._ran) // 2, len(self._ran) - 1}:
                found = self.losses(2, skip)
                if not (_same(found[0], self.base) and _same(found[1], self.base)):
                    return False
            return True
        except Exception:  # as above: every pass then runs from the beginning
            return False

    @contextmanager
    def _skipping(self, skip: int, copies: int) -> Iterator[None]:
        replaced: list[tuple[nn.Module, Any]] = []
        try:
            for place, module in enumerate(self._ran[:skip]):
                answer = self._answers[id(module)]
                if place == skip - 1:
                    answer = self._repeat(answer, copies)
                replaced.append((module, vars(module).get("forward")))
                module.forward = _Answer(answer)
            yield
        finally:
            for module, kept in replaced:
                if kept is None:
                    del module.forward
                else:
                    module.forward = kept


class _Answer:
    """A forward function that always returns the same."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.value


def _same(found: Tensor, expected: Tensor) -> bool:
    if found.shape != expected.shape:
        return False
    return bool(torch.allclose(found, expected, rtol=0, atol=TOLERANCE, equal_nan=True))
