"""Keeping a model on regard's attention while one of regard's caches lives.

A cache whose heads hold different keys needs an attention function that knows it. `hold(model)` opens a session without methods,
shared by all caches of that model; when the last one lets go, the model is exactly as before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable
from weakref import WeakKeyDictionary, WeakSet

from torch import Tensor, nn
from transformers import PreTrainedModel

from regard.attach import compat
from regard.attach.cache_names import given_cache
from regard.attach.session import _LOCK, Session, arguments_of
from regard.engine import AttentionCall

_HOLDS: WeakKeyDictionary[nn.Module, Hold] = WeakKeyDictionary()


@runtime_checkable
class Held(Protocol):
    """What the attention function asks of the cache whose keys it was given (`key.held`)."""

    def lost(self, what: str) -> None:
        """The keys came with other values than the cache gave; raises AttachError where these were stand-ins."""

    def decode(
        self, module: nn.Module, query: Tensor, mask: Tensor | None, scaling: float
    ) -> Tensor | None:
        """The output `[batch, heads, 1, value_dim]` of one new token a row, or None if it is not as simple as that."""

    def place(self, call: AttentionCall, mask: Tensor | None) -> AttentionCall:
        """The call with what is really held as key, value, mask and bias."""
        ...

    def done(self, call: AttentionCall, mask: Tensor | None) -> None:
        """The call has its output."""


@runtime_checkable
class Listener(Protocol):
    """A cache, as a model's argument."""

    def entering(self, arguments: dict[str, Any]) -> None:
        """The model is called with the cache."""

    def leaving(self, failed: bool) -> None:
        """The call is over."""


class Hold(Session):
    """A session without methods; tells a cache when its model, or the base model inside, is called with it."""

    holds = True

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.users = 0
        self._listeners: list[Listener | None] = []

    def __enter__(self) -> Hold:
        super().__enter__()
        parts = [part for part in self.model.modules() if isinstance(part, PreTrainedModel)]
        self._parts = WeakSet(parts)
        enter, leave = map(compat.untraced, (self._called, self._returned))
        for part in parts:
            self._handles.append(part.register_forward_pre_hook(enter, with_kwargs=True))
            self._handles.append(part.register_forward_hook(leave, always_call=True))
        return self

    def _called(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if module not in self._parts:  # a copy of the model, which took the hooks along
            return
        given = arguments_of(module, args, kwargs) if args else kwargs
        listener = listener_of(given)
        self._listeners.append(listener)
        if listener is not None:
            listener.entering(given)

    def _returned(self, module: nn.Module, args: tuple, output: object) -> None:
        if module not in self._parts or not self._listeners:
            return
        listener = self._listeners.pop()
        if listener is not None:
            listener.leaving(failed=output is None)


def listener_of(arguments: dict[str, Any]) -> Listener | None:
    """regard's cache among a model's arguments, alone or as the decoder's part of an encoder-decoder cache."""
    given = given_cache(arguments)
    given = getattr(given, "self_attention_cache", given)
    return given if hasattr(given, "entering") else None


def hold(model: nn.Module) -> Callable[[], None]:
    """Puts `model` on regard's attention until the function that this returns is called (once or more).

    Raises:
        AttachError: when the model's attention is out of reach.
    """
    with _LOCK:
        held = _HOLDS.get(model)
        if held is None:
            held = Hold(model)
            held.__enter__()
            _HOLDS[model] = held
        held.users += 1

    pending = [held]

    def release() -> None:
        with _LOCK:
            if not pending:
                return
            mine = pending.pop()
            mine.users -= 1
            if mine.users == 0:
                _HOLDS.pop(mine.model, None)
                mine.close()

    return release
