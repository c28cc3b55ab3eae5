"""Attach methods to a live model and take them off again.

While a session is open, every attention module of the model calls `attention` below instead of its own kernel; on leaving,
also after an exception, configs and hooks are exactly as before. Sessions nest: methods run in the order of attachment.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from regard._errors import AttachError, InputError
from regard.attach import compat
from regard.attach.anatomy import CROSS, Stack, anatomy
from regard.attach.stream import StreamHooks
from regard.engine import AttentionCall, DeferredMask, Method, Pipeline, Site, Workspace, as_mask, attend

_SESSIONS: WeakKeyDictionary[nn.Module, list[Session]] = WeakKeyDictionary()
_ORIGINALS: dict[int, tuple[Any, Any, int]] = {}
_LOCK = threading.RLock()
_LOCAL = threading.local()


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
        unhooked: attention modules that do not use transformers' attention interface.

    Raises:
        AttachError: when the model has no attention, or none that can be hooked.
    """

    def __init__(self, model: nn.Module, *methods: Method, rows: float | None = None, seed: int = 0) -> None:
        for method in methods:
            if not isinstance(method, Method):
                raise InputError(f"attach expects methods (instances of regard.engine.Method), got {type(method).__name__}")
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
        self.generator = torch.Generator()
        self._modules: list[nn.Module] = []
        self._places: dict[int, tuple[str, Stack, int]] = {}
        self._configs: list[Any] = []
        self._handles: list[Any] = []
        self._started: list[Method] = []
        self._masks: dict[str, Tensor] = {}
        self._calls = 0
        self._open = False

    @property
    def uses_attention(self) -> bool:
        return any(self.pipeline[hook] for hook in ("before", "scores", "weights", "heads", "after"))

    @property
    def additive(self) -> dict[str, bool]:
        """Per stack: whether block output = input + attention write + MLP write held when it was last checked."""
        return self._stream.additive

    def __enter__(self) -> Session:
        if self._open:
            raise InputError("this session is open already; make a new one with regard.attach(model, ...)")
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
                    self._handles.append(self.model.register_forward_pre_hook(self._entering, with_kwargs=True))
                    self._handles.append(self.model.register_forward_hook(self._leaving))
            for method in self.methods:
                method.start(self)
                self._started.append(method)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

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
        for method in reversed(self._started):
            try:
                method.stop()
            except BaseException as error:
                errors.append(error)
        self._started.clear()
        if not _SESSIONS:
            workspace().clear()
        if errors:
            raise errors[0]

    def _hook_attention(self) -> None:
        names = {id(module): name for name, module in self.model.named_modules()}
        found: list[nn.Module] = []
        for stack in self.stacks:
            for block in stack.blocks:
                for module in block.attentions.values():
                    for inner in module.modules():
                        if _is_hookable(inner):
                            self._places[id(inner)] = (names[id(inner)], stack, block.layer)
                            found.append(inner)
                            break
                    else:
                        self.unhooked.append(f"{names[id(module)]} ({type(module).__name__})")
        kind = type(self.model).__name__
        if not self.stacks:
            raise AttachError(f"{kind} has no attention layers that regard can find (a list of blocks with an attention module)")
        if not found:
            raise AttachError(
                f"{kind} computes attention inside {self.unhooked[0]} without transformers' attention interface, "
                "so its weights cannot be reached without changing the model's code; "
                "families that use the interface are listed in the architecture table of the documentation"
            )
        for module in found:
            _SESSIONS.setdefault(module, []).append(self)
            self._modules.append(module)
        for config in compat.configs_of(self.model):
            kept, original, count = _ORIGINALS.get(id(config), (config, compat.read_implementation(config), 0))
            _ORIGINALS[id(config)] = (kept, original, count + 1)
            self._configs.append(config)
            compat.write_implementation(config, compat.NAME)

    def _entering(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self._calls = 0
        self._masks = {
            name: value
            for name in ("attention_mask", "decoder_attention_mask")
            if isinstance(value := kwargs.get(name), Tensor) and value.dim() == 2
        }

    def _leaving(self, module: nn.Module, args: tuple, output: object) -> None:
        self._masks = {}
        if self.uses_attention and self._calls == 0:
            raise AttachError(
                f"{type(self.model).__name__} ran without one attention call reaching regard, so nothing was observed; "
                "the model does not use transformers' attention interface in this configuration"
            )

    def valid_tokens(self, stack: str, batch: int, tokens: int) -> Tensor | None:
        """`[batch, tokens]`, False at padding, for the newest tokens of a stack; None without padding."""
        name = "attention_mask"
        if stack == "cross" or (stack == "" and any(s.name == "encoder" for s in self.stacks)):
            name = "decoder_attention_mask"
        mask = self._masks.get(name)
        if mask is None or mask.shape[0] != batch or mask.shape[1] < tokens or stack in ("vision", "audio"):
            return None
        mask = mask[:, -tokens:].bool()
        return None if bool(mask.all()) else mask

    def site(self, module: nn.Module, call: AttentionCall) -> Site:
        """The site of an attention module (made once)."""
        name, stack, layer = self._places[id(module)]
        crossing = bool(CROSS.search(name[len(stack.path) :])) or bool(getattr(module, "is_cross_attention", False))
        label = ("cross" if stack.name == "" else f"{stack.name}.cross") if crossing else stack.name
        found = self.sites.get((label, layer))
        if found is not None and found.name != name:
            label = f"{label or 'self'}:{name.rsplit('.', 1)[-1]}"
            found = self.sites.get((label, layer))
        if found is None:
            causal = not crossing and bool(getattr(module, "is_causal", False))
            found = Site(layer, name, "cross" if crossing else "self", causal, call.heads, call.kv_heads, label)
            self.sites[found.key] = found
        self._calls += 1
        return found


def workspace() -> Workspace:
    """The score buffers of this thread."""
    if not hasattr(_LOCAL, "workspace"):
        _LOCAL.workspace = Workspace()
    return _LOCAL.workspace


def _is_hookable(module: nn.Module) -> bool:
    return bool(getattr(type(module), "attends_through_regard", False)) or compat.uses_interface(module)


def dispatch(module: nn.Module, call: AttentionCall) -> Tensor:
    """Runs a call through every session that holds `module`; the seam that all adapters share."""
    sessions = _SESSIONS.get(module, ())
    if not sessions:
        return attend(call, _EMPTY, workspace=workspace())
    sites = [session.site(module, call) for session in sessions]
    call.site = sites[-1]
    if call.valid is None:
        call.valid = sessions[-1].valid_tokens(call.site.stack, call.query.shape[0], call.queries)
    if len(sessions) == 1:
        pipeline, fraction = sessions[0].pipeline, sessions[0].rows
    else:
        pipeline = Pipeline([method for session in sessions for method in session.methods])
        reading = {session.rows for session in sessions if session.pipeline.needs_weights}
        if len(reading) > 1:
            raise AttachError(f"nested sessions that read weights must sample the same rows, got rows={sorted(map(str, reading))}")
        fraction = reading.pop() if reading else None
    return attend(call, pipeline, fraction=fraction, generator=sessions[-1].generator, workspace=workspace())


_EMPTY = Pipeline(())


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **rest: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: tensors `[batch, heads, tokens, dim]` in, `[batch, tokens, heads, dim]` out."""
    causal = is_causal if is_causal is not None else bool(getattr(module, "is_causal", True))
    queries, keys = query.shape[2], key.shape[2]
    if attention_mask is None and causal and queries > 1 and keys > queries:
        key, value = key[:, :, :queries], value[:, :, :queries]
        position_bias = None if position_bias is None else position_bias[..., :queries]
        keys = queries
    mask = as_mask(attention_mask, queries, keys, causal)
    offset, valid, key_valid = 0, None, None
    if isinstance(mask, DeferredMask):
        offset = mask.query_offset - mask.key_offset
        key_valid = mask.key_valid
        if key_valid is not None and 0 <= offset and offset + queries <= key_valid.shape[1]:
            valid = key_valid[:, offset : offset + queries]
            valid = None if bool(valid.all()) else valid
    elif getattr(module, "is_causal", causal):
        offset = max(keys - queries, 0)
    if s_aux is not None and s_aux.dim() != 1:
        s_aux = s_aux.reshape(-1)
    call = AttentionCall(
        query,
        key,
        value,
        mask,
        float(scaling) if scaling is not None else query.shape[-1] ** -0.5,
        softcap=softcap,
        sinks=s_aux,
        bias=position_bias,
        dropout=dropout,
        valid=valid,
        key_valid=key_valid,
        query_offset=offset,
        module=module,
    )
    return dispatch(module, call).transpose(1, 2).contiguous(), None


compat.register(attention)
