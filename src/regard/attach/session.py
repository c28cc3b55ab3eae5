"""Attach methods to a live model and take them off again.

While a session is open, every attention module of the model calls `attention` below instead of its own kernel; on leaving,
also after an exception, configs and hooks are exactly as before. Sessions nest: methods run in the order of attachment.
"""

from __future__ import annotations

import functools
import inspect
import threading
import warnings
from collections import OrderedDict
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from regard._errors import AttachError, InputError
from regard.attach import compat
from regard.attach.anatomy import CROSS, BlockParts, Stack, anatomy
from regard.attach.cache_names import given_cache
from regard.attach.stream import StreamHooks
from regard.engine import AttentionCall, LateReader, Method, Pipeline, Site, Workspace, attend

_SESSIONS: WeakKeyDictionary[nn.Module, list[Session]] = WeakKeyDictionary()
_ORIGINALS: dict[int, tuple[Any, Any, int]] = {}
_LOCK = threading.RLock()
_LOCAL = threading.local()


class PartialAttachWarning(UserWarning):
    """Some of a model's softmax attention is out of reach; the rest is attached."""


class Place(NamedTuple):
    """Where an attention module stands; a module that several blocks share has several places."""

    name: str
    stack: Stack
    block: BlockParts


class Session:
    """Methods attached to one model; use it as a context manager.

    Args:
        model: a transformers model (any task), or a module built from `regard`'s own attention modules.
        methods: what to attach, in this order.
        rows: None to see every query row; a fraction such as 1/16 to show reading methods a random row of each 16.
        seed: seed of the row sampling.

    Attributes:
        sites: the attention sites seen so far, in the order in which the model ran them.
        stacks: the model's anatomy.
        unhooked: softmax attention that cannot be reached; a `PartialAttachWarning` names it when there is any.
        mixers: layers that mix tokens without a softmax (linear attention, delta rules), which have no weights to see.

    Raises:
        AttachError: when the model has no attention, or none that can be hooked.
    """

    holds = False
    """Whether the model runs regard's attention although no method asks for it (`regard.attach.hold`)."""

    def __init__(
        self, model: nn.Module, *methods: Method, rows: float | None = None, seed: int = 0
    ) -> None:
        for method in methods:
            if not isinstance(method, Method):
                raise InputError(
                    f"attach expects methods (instances of regard.engine.Method), got {type(method).__name__}"
                )
        if rows is not None and not 0 < rows <= 1:
            raise InputError(f"rows must be None (every row) or a fraction in (0, 1], got {rows}")
        self.model = model
        self.methods = tuple(methods)
        self.rows = None if rows is None or rows >= 1 else float(rows)
        self.seed = seed
        self.pipeline = Pipeline(self.methods)
        self.sites: OrderedDict[tuple[str, int], Site] = OrderedDict()
        self.stacks: list[Stack] = anatomy(model)
        self.unhooked: list[str] = []
        self.mixers: list[str] = []
        self.generator = torch.Generator()
        self._modules: list[nn.Module] = []
        self._places: dict[int, list[Place]] = {}
        self._sites: dict[tuple[int, int], Site] = {}
        self._running: BlockParts | None = None
        self._configs: list[Any] = []
        self._handles: list[Any] = []
        self._started: list[Method] = []
        self._masks: dict[str, Tensor] = {}
        self._late = LateReader(self.pipeline)
        self._appending = False
        self._calls = 0
        self._open = False

    @property
    def modules(self) -> dict[str, nn.Module]:
        """The hooked attention modules by their path in the model."""
        return {self._places[id(module)][0].name: module for module in self._modules}

    @property
    def uses_attention(self) -> bool:
        return self.holds or any(
            self.pipeline[hook] for hook in ("before", "scores", "weights", "heads", "after")
        )

    @property
    def additive(self) -> dict[str, bool]:
        """Per stack: whether block output = input + attention write + MLP write held when it was last checked."""
        return self._stream.additive

    def __enter__(self) -> Session:
        if self._open:
            raise InputError(
                "this session is open already; make a new one with regard.attach(model, ...)"
            )
        self.generator.manual_seed(self.seed)
        self._stream = StreamHooks(self)
        try:
            with _LOCK:
                self._open = True
                if self.uses_attention:
                    self._hook_attention()
                if self.pipeline["residual"] or self.pipeline["neurons"]:
                    self._handles += self._stream.register()
                if self.methods:
                    enter, leave = map(compat.untraced, (self._entering, self._leaving))
                    self._handles += [
                        self.model.register_forward_pre_hook(enter, with_kwargs=True),
                        self.model.register_forward_hook(leave),
                    ]
            for method in self.methods:
                method.start(self)
                self._started.append(method)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __deepcopy__(self, memo: dict[int, Any]) -> Session:
        """A copied model is not attached: its copied hooks keep this session, which answers to its own model only."""
        return self

    def close(self) -> None:
        """Takes everything off the model. Safe to call twice."""
        with _LOCK:
            for handle in self._handles:
                handle.remove()
            self._handles.clear()
            for module in self._modules:
                held = _SESSIONS.get(module, [])
                if self in held:
                    held.remove(self)
                if not held:
                    _SESSIONS.pop(module, None)
            self._modules.clear()
            for config in self._configs:
                kept, original, count = _ORIGINALS[id(config)]
                if count == 1:
                    del _ORIGINALS[id(config)]
                    compat.write_implementation(kept, original)
                else:
                    _ORIGINALS[id(config)] = (kept, original, count - 1)
            self._configs.clear()
            self._masks.clear()
            self._open = False
        errors: list[BaseException] = []
        for end in (self.read_late, *(method.stop for method in reversed(self._started))):
            try:
                end()
            except BaseException as error:
                errors.append(error)
        self._started.clear()
        if not _SESSIONS:
            workspace().clear()
        if errors:
            raise errors[0]

    def read_late(self) -> None:
        """Shows the methods what they have not yet seen: decode steps are read many at a time (`regard.engine.late`)."""
        self._late.flush()

    def attend(self, call: AttentionCall, buffers: Workspace | None) -> Tensor:
        """Runs a call through this session's methods."""
        if self._appending and self._late.takes(call):
            output = attend(call, self._late.rest, workspace=buffers)
            self._late.add(call)
            return output
        self._late.flush(call.site.key)
        return attend(
            call, self.pipeline, fraction=self.rows, generator=self.generator, workspace=buffers
        )

    def _hook_attention(self) -> None:
        names = {id(module): name for name, module in self.model.named_modules()}
        found: dict[int, nn.Module] = {}
        self._places, self._sites, self.unhooked, self.mixers = {}, {}, [], []
        for stack in self.stacks:
            for block in stack.blocks:
                for module in block.attentions.values():
                    hookable = [inner for inner in module.modules() if compat.is_hookable(inner)]
                    for inner in hookable:
                        place = Place(names[id(inner)], stack, block)
                        self._places.setdefault(id(inner), []).append(place)
                        found[id(inner)] = inner
                    if not hookable:
                        place = f"{names[id(module)] or 'the model'} ({type(module).__name__})"
                        has_weights = any(
                            compat.computes_softmax(inner) for inner in module.modules()
                        )
                        (self.unhooked if has_weights else self.mixers).append(place)
        kind = type(self.model).__name__
        if not found and self.unhooked:
            raise AttachError(
                f"{kind} computes attention inside {self.unhooked[0]} without transformers' attention interface, "
                "so its weights cannot be reached without changing the model's code; "
                "families that use the interface are listed in the architecture table of the documentation"
            )
        if not found:
            mixing = (
                f"; its layers mix tokens by {self.mixers[0]}, without a softmax"
                if self.mixers
                else ""
            )
            raise AttachError(
                f"{kind} has no attention layers that regard can find (a list of blocks with an attention module){mixing}"
            )
        if self.unhooked and not self.holds:
            more = f" and {len(self.unhooked) - 1} more" if len(self.unhooked) > 1 else ""
            warnings.warn(
                f"{kind}: attention in {self.unhooked[0]}{more} does not use transformers' attention interface and is "
                f"not observed or changed (session.unhooked lists all); {len(found)} other attention modules are",
                PartialAttachWarning,
                stacklevel=4,
            )
        for module in found.values():
            _SESSIONS.setdefault(module, []).append(self)
            self._modules.append(module)
        for config in compat.configs_of(self.model):
            kept, original, count = _ORIGINALS.get(
                id(config), (config, compat.read_implementation(config), 0)
            )
            _ORIGINALS[id(config)] = (kept, original, count + 1)
            self._configs.append(config)
            compat.write_implementation(config, compat.name_for(original))

        shared = {
            id(p.block): p.block
            for places in self._places.values()
            if len(places) > 1
            for p in places
        }
        for block in shared.values():
            self._handles.append(block.module.register_forward_pre_hook(self._running_block(block)))

    def _running_block(self, block: BlockParts) -> Any:
        """Notes which block runs, for attention modules that several blocks share (Zamba)."""

        def hook(module: nn.Module, args: tuple) -> None:
            if module is block.module:
                self._running = block

        return compat.untraced(hook)

    def _entering(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if module is not self.model:
            return
        self._calls = 0
        given = arguments_of(module, args, kwargs)
        places = compat.growing_keys(given_cache(given))
        self._appending = places is not None
        self._late.keep(places or ())
        self._masks = {
            name: value
            for name in ("attention_mask", "decoder_attention_mask")
            if isinstance(value := given.get(name), Tensor) and value.dim() == 2
        }

    def _leaving(self, module: nn.Module, args: tuple, output: object) -> None:
        if module is not self.model:
            return
        self._masks = {}
        if self.uses_attention and self._calls == 0:
            raise AttachError(
                f"{type(self.model).__name__} ran without one attention call reaching regard, so nothing was observed; "
                "the model does not use transformers' attention interface in this configuration"
                + (f", its attention is in {self.unhooked[0]}" if self.unhooked else "")
            )

    def valid_tokens(self, stack: str, batch: int, tokens: int) -> Tensor | None:
        """`[batch, tokens]`, False at padding, for the newest tokens of a stack; None without padding."""
        name = "attention_mask"
        if stack == "cross" or (stack == "" and any(s.name == "encoder" for s in self.stacks)):
            name = "decoder_attention_mask"
        mask = self._masks.get(name)
        if (
            mask is None
            or mask.shape[0] != batch
            or mask.shape[1] < tokens
            or stack in ("vision", "audio")
        ):
            return None
        mask = mask[:, -tokens:].bool()
        return None if bool(mask.all()) else mask

    def site(self, module: nn.Module, call: AttentionCall) -> Site:
        """The site of an attention module (made once)."""
        places = self._places[id(module)]
        place = places[0]
        if len(places) > 1:
            place = next((p for p in places if p.block is self._running), place)
        name, stack, layer = place.name, place.stack, place.block.layer
        self._calls += 1
        known = self._sites.get((id(module), layer))
        if known is not None:
            return known
        crossing = bool(CROSS.search(name[len(stack.path) :])) or bool(
            getattr(module, "is_cross_attention", False)
        )
        label = ("cross" if stack.name == "" else f"{stack.name}.cross") if crossing else stack.name
        found = self.sites.get((label, layer))
        if found is not None and found.name != name:
            label = f"{label or 'self'}:{name.rsplit('.', 1)[-1]}"
            found = self.sites.get((label, layer))
        if found is None:
            causal = not crossing and _is_causal(module, call)
            found = Site(
                layer,
                name,
                "cross" if crossing else "self",
                causal,
                call.heads,
                call.kv_heads,
                label,
            )
            self.sites[found.key] = found
        self._sites[id(module), layer] = found
        return found


def observed(module: nn.Module) -> bool:
    """Whether any method is attached to the module."""
    return any(session.methods for session in _SESSIONS.get(module, ()))


def workspace() -> Workspace:
    """The score buffers of this thread."""
    if not hasattr(_LOCAL, "workspace"):
        _LOCAL.workspace = Workspace()
    return _LOCAL.workspace


def _is_causal(module: nn.Module, call: AttentionCall) -> bool:
    """Whether no query of the call sees a later key, by its mask: what a module says of itself is often wrong."""
    if call.queries == 1 or call.query_offset < 0:
        return bool(getattr(module, "is_causal", False))
    for row in {0, call.queries // 2}:
        window = call.mask.window(torch.tensor([row], device=call.query.device))
        position = row + call.query_offset
        if window.hi > position + 1:
            visible = window.visible(1, call.query.device)
            if visible is None or bool(visible[..., max(position + 1 - window.lo, 0) :].any()):
                return False
    return True


@functools.cache
def _arguments(kind: type[nn.Module]) -> tuple[str, ...]:
    """The names of the positional arguments of a model's `forward`."""
    return tuple(inspect.signature(kind.forward).parameters)[1:]


def arguments_of(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """What a model was called with, by name."""
    return {**dict(zip(_arguments(type(module)), args, strict=False)), **kwargs}


def dispatch(module: nn.Module, call: AttentionCall) -> Tensor:
    """Runs a call through every session that holds `module`; the seam that all adapters share."""
    sessions = _SESSIONS.get(module, ())
    if not sessions:
        return attend(call, _EMPTY)
    sites = [session.site(module, call) for session in sessions]
    call.site = sites[-1]
    if call.valid is None:
        call.valid = sessions[-1].valid_tokens(call.site.stack, call.query.shape[0], call.queries)
    # a method that runs a model inside its hook finds the buffers in use by the outer call
    busy = getattr(_LOCAL, "busy", False)
    buffers = None if busy else workspace()
    _LOCAL.busy = True
    try:
        if len(sessions) == 1:
            return sessions[0].attend(call, buffers)
        for session in sessions:
            session.read_late()
        pipeline = Pipeline([method for session in sessions for method in session.methods])
        reading = {session.rows for session in sessions if session.pipeline.needs_weights}
        if len(reading) > 1:
            raise AttachError(
                f"nested sessions that read weights must sample the same rows, got rows={sorted(map(str, reading))}"
            )
        fraction, generator = reading.pop() if reading else None, sessions[-1].generator
        return attend(call, pipeline, fraction=fraction, generator=generator, workspace=buffers)
    finally:
        _LOCAL.busy = busy


_EMPTY = Pipeline(())
