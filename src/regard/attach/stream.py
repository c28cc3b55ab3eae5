"""Hooks on the residual stream: what enters a block, what attention and MLP add, what leaves, and the MLP's neurons."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from regard._errors import AttachError
from regard.attach import compat
from regard.engine import State
from regard.engine.method import reading

if TYPE_CHECKING:
    from regard.attach.anatomy import BlockParts, Stack
    from regard.attach.session import Session


def _hidden(value: Any) -> Tensor | None:
    first = value[0] if isinstance(value, tuple | list) and value else value
    return first if isinstance(first, Tensor) else None


def _with_hidden(value: Any, hidden: Tensor) -> Any:
    if isinstance(value, tuple):
        return (hidden, *value[1:])
    if isinstance(value, list):
        return [hidden, *value[1:]]
    return hidden


class StreamHooks:
    """Registers forward hooks on blocks and hands `State`s to the session's methods.

    Only the block that is running is listened to: a sub-layer that several blocks share (Zamba) then counts for the right
    one, and copies of the model, which carry copies of these hooks, count for none.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        self.additive: dict[str, bool] = {}
        self._running: BlockParts | None = None
        self._shape: torch.Size | None = None
        self._parts: dict[str, Tensor] = {}
        self._checking: dict[str, BlockParts] = {}

    def register(self) -> list[Any]:
        if not self.session.stacks:
            raise AttachError(
                f"{type(self.session.model).__name__} has no stack of blocks whose residual stream could be read"
            )
        handles: list[Any] = []
        for stack in self.session.stacks:
            for block in stack.blocks:
                if block.attention_write is not None and block.mlp_write is not None:
                    self._checking.setdefault(stack.name, block)
                handles += self._register(stack, block)
        return handles

    def _register(self, stack: Stack, block: BlockParts) -> list[Any]:
        enter = self._enter(stack, block)
        handles = [block.module.register_forward_pre_hook(enter, with_kwargs=True)]
        if self.session.pipeline["residual"]:
            for part, module in (
                ("attention", block.attention_write),
                ("cross", block.cross_write),
                ("mlp", block.mlp_write),
            ):
                if module is not None:
                    handles.append(module.register_forward_hook(self._write(stack, block, part)))
            handles.append(block.module.register_forward_hook(self._leave(stack, block)))
        if self.session.pipeline["neurons"] and block.down_projection is not None:
            hook = self._neurons(stack, block)
            handles.append(block.down_projection.register_forward_pre_hook(hook))
        return handles

    def _show(
        self,
        stack: Stack,
        block: BlockParts,
        part: str,
        hidden: Tensor,
        module: nn.Module,
        hook: str = "residual",
    ) -> Tensor | None:
        """What the methods put in place of `hidden`, in its own shape; None when they leave it."""
        shape, valid, changed = hidden.shape, None, False
        batched = self._shape
        flat = hidden.dim() == 2 and batched is not None and len(batched) == 3
        if flat and batched is not None and hidden.shape[0] == batched[0] * batched[1]:
            hidden = hidden.view(*batched[:2], -1)
        if hidden.dim() == 3:
            valid = self.session.valid_tokens(stack.name, hidden.shape[0], hidden.shape[1])
        for method in self.session.pipeline[hook]:
            with reading(method):
                state = State(part, block.layer, stack.name, hidden, valid, module)
                replaced = getattr(method, hook)(state)
            if replaced is not None:
                hidden, changed = replaced, True
        return hidden.reshape(shape) if changed else None

    def _enter(self, stack: Stack, block: BlockParts) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
            hidden = _hidden(args) if args else kwargs.get("hidden_states")
            if hidden is None or module is not block.module:
                return None
            self._running, self._shape = block, hidden.shape
            changed = None
            if block.layer == 0 and self.session.pipeline["residual"]:
                changed = self._show(stack, block, "embed", hidden, module)
            if self._checking.get(stack.name) is block:
                self._parts = {"input": hidden if changed is None else changed}
            if changed is None:
                return None
            if args:
                return (changed, *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": changed}

        return compat.untraced(hook)

    def _write(self, stack: Stack, block: BlockParts, part: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple, output: Any) -> Any:
            hidden = _hidden(output)
            if hidden is None or self._running is not block:
                return None
            changed = self._show(stack, block, part, hidden, module)
            if self._checking.get(stack.name) is block:
                self._parts[part] = hidden if changed is None else changed
            return None if changed is None else _with_hidden(output, changed)

        return compat.untraced(hook)

    def _leave(self, stack: Stack, block: BlockParts) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple, output: Any) -> Any:
            hidden = _hidden(output)
            if hidden is None or module is not block.module:
                return None
            if self._checking.get(stack.name) is block:
                self._check(stack, hidden)
            changed = self._show(stack, block, "block", hidden, module)
            self._running = None
            return None if changed is None else _with_hidden(output, changed)

        return compat.untraced(hook)

    def _check(self, stack: Stack, hidden: Tensor) -> None:
        """Whether output = input + what the sub-layers wrote, on the first block that has both kinds."""
        parts, self._parts = self._parts, {}
        fits = {"input", "attention", "mlp"} <= set(parts) and all(
            part.numel() == hidden.numel() for part in parts.values()
        )
        if fits:
            with torch.no_grad():
                total = torch.zeros_like(hidden)
                for part in parts.values():
                    total += part.reshape(hidden.shape)
                scale = hidden.abs().amax().clamp_min(1e-6)
                fits = bool((hidden - total).abs().amax() <= 2e-2 * scale)
        self.additive[stack.name] = fits

    def _neurons(self, stack: Stack, block: BlockParts) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple) -> Any:
            if self._running is not block:
                return None
            changed = self._show(stack, block, "neurons", args[0], module, "neurons")
            return None if changed is None else (changed, *args[1:])

        return compat.untraced(hook)
