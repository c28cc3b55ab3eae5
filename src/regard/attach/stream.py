"""Hooks on the residual stream: what enters a block, what attention and MLP add, what leaves, and the MLP's neurons."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from regard._errors import AttachError
from regard.engine import State

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
    """Registers forward hooks on blocks and hands `State`s to the session's methods."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.additive: dict[str, bool] = {}
        self._parts: dict[str, Tensor] = {}

    def register(self) -> list[Any]:
        handles: list[Any] = []
        if not self.session.stacks:
            raise AttachError(f"{type(self.session.model).__name__} has no stack of blocks whose residual stream could be read")
        for stack in self.session.stacks:
            for block in stack.blocks:
                if self.session.pipeline["residual"]:
                    handles += self._register_block(stack, block)
                if self.session.pipeline["neurons"] and block.down_projection is not None:
                    handles.append(block.down_projection.register_forward_pre_hook(self._neurons(stack, block)))
        return handles

    def _register_block(self, stack: Stack, block: BlockParts) -> list[Any]:
        check = block.layer == 0
        handles = [block.module.register_forward_pre_hook(self._enter(stack, block, check), with_kwargs=True)]
        for part, module in (("attention", block.attention_write), ("mlp", block.mlp_write)):
            if module is not None:
                handles.append(module.register_forward_hook(self._write(stack, block, part, check)))
        handles.append(block.module.register_forward_hook(self._leave(stack, block, check)))
        return handles

    def _show(self, stack: Stack, block: BlockParts, part: str, hidden: Tensor, module: nn.Module, hook: str) -> Tensor | None:
        valid = None
        if hidden.dim() == 3:
            valid = self.session.valid_tokens(stack.name, hidden.shape[0], hidden.shape[1])
        changed = None
        for method in self.session.pipeline[hook]:
            state = State(part, block.layer, stack.name, hidden if changed is None else changed, valid, module)
            replaced = getattr(method, hook)(state)
            if replaced is not None:
                changed = replaced
        return changed

    def _enter(self, stack: Stack, block: BlockParts, check: bool) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
            named = "hidden_states" if not args else None
            hidden = kwargs.get("hidden_states") if named else _hidden(args)
            if hidden is None or block.layer != 0:
                return None
            if check:
                self._parts = {"embed": hidden}
            changed = self._show(stack, block, "embed", hidden, module, "residual")
            if changed is None:
                return None
            return (args, {**kwargs, "hidden_states": changed}) if named else ((changed, *args[1:]), kwargs)

        return hook

    def _write(self, stack: Stack, block: BlockParts, part: str, check: bool) -> Any:
        def hook(module: nn.Module, args: tuple, output: Any) -> Any:
            hidden = _hidden(output)
            if hidden is None:
                return None
            changed = self._show(stack, block, part, hidden, module, "residual")
            if check:
                self._parts[part] = hidden if changed is None else changed
            return None if changed is None else _with_hidden(output, changed)

        return hook

    def _leave(self, stack: Stack, block: BlockParts, check: bool) -> Any:
        def hook(module: nn.Module, args: tuple, output: Any) -> Any:
            hidden = _hidden(output)
            if hidden is None:
                return None
            if check:
                self._check(stack, hidden)
            changed = self._show(stack, block, "block", hidden, module, "residual")
            return None if changed is None else _with_hidden(output, changed)

        return hook

    def _check(self, stack: Stack, hidden: Tensor) -> None:
        parts = [self._parts.get(name) for name in ("embed", "attention", "mlp")]
        fits = [p is not None and p.shape == hidden.shape for p in parts]
        if all(fits):
            total = parts[0] + parts[1] + parts[2]  # type: ignore[operator]
            scale = hidden.detach().abs().amax().clamp_min(1e-6)
            self.additive[stack.name] = bool((hidden - total).detach().abs().amax() <= 2e-2 * scale)
        else:
            self.additive[stack.name] = False
        self._parts = {}

    def _neurons(self, stack: Stack, block: BlockParts) -> Any:
        def hook(module: nn.Module, args: tuple) -> Any:
            changed = self._show(stack, block, "neurons", args[0], module, "neurons")
            return None if changed is None else (changed, *args[1:])

        return hook
