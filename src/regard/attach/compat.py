"""Everything that depends on how transformers is built, in one place.

Registers the attention function and its mask under the name `regard`. A custom attention function without an entry in the
mask interface would silently run without any mask, so both are registered together.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.masking_utils import (
    AttentionMaskInterface,
    causal_mask_function,
    eager_mask,
    sdpa_mask,
)

from regard.engine.masks import DeferredMask

NAME = "regard"
EAGER = "regard_eager"
"""For models that run eager: they expect additive masks, and a mask in every case."""


F = TypeVar("F", bound=Callable[..., Any])


def untraced(function: F) -> F:
    """Keeps `torch.compile` out of a hook: the graph breaks there, and methods stay the Python they are."""
    disabled: Any = torch.compiler.disable
    return disabled(function)


def register(
    function: Callable[..., tuple[Tensor, None]], eager: Callable[..., tuple[Tensor, None]]
) -> None:
    """Makes these functions the attention implementations called `regard` and `regard_eager`.

    No name of ours may contain "flash" (taken for a request for a kernel) or start with "paged|".
    """
    AttentionInterface.register(NAME, function)
    AttentionMaskInterface.register(NAME, deferred_mask)
    AttentionInterface.register(EAGER, eager)
    AttentionMaskInterface.register(EAGER, deferred_eager_mask)


def name_for(original: Any) -> str:
    """The implementation that replaces `original`: without one, transformers runs eager."""
    return EAGER if original in ("eager", None) else NAME


def deferred_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int | Tensor = 0,
    mask_function: Callable[..., Tensor] | None = None,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    additive: torch.dtype | None = None,
    **rest: Any,
) -> Tensor | None:
    """transformers' mask request answered by a rule instead of a queries x keys tensor.

    None is returned in the cases in which the fused kernel needs no mask (plain causal, plain full): the same cases as in
    transformers, since models compute with the mask (Doge, for one, is only causal where it gets one). Rules that are not
    index-based (`use_vmap`) are built as a tensor by transformers itself. `additive` is the dtype of a mask for eager models.
    """
    if use_vmap:
        build = sdpa_mask if additive is None else eager_mask
        return build(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=int(q_offset),
            kv_offset=int(kv_offset),
            mask_function=mask_function,  # type: ignore[arg-type]
            attention_mask=attention_mask,
            local_size=local_size,
            allow_is_causal_skip=allow_is_causal_skip,
            allow_is_bidirectional_skip=allow_is_bidirectional_skip,
            use_vmap=True,
            device=device,
            **({} if additive is None else {"dtype": additive}),
            **rest,
        )
    offset = int(q_offset)
    key_valid = _key_valid(attention_mask, int(kv_length), int(kv_offset))
    padded = key_valid is not None
    narrow = local_size is not None and kv_length >= local_size
    if not padded and not narrow:
        if allow_is_causal_skip and (q_length == 1 or kv_length == q_length):
            return None
        if allow_is_bidirectional_skip:
            return None
    if allow_is_causal_skip and not narrow and offset == 0 and _only_future(key_valid, q_length):
        return None
    assert mask_function is not None

    def rule(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        visible = mask_function(batch, head, query, key)
        if key_valid is not None:
            visible = visible & key_valid[:, None, None, :]
        return visible

    shape = (int(batch_size), 1, int(q_length), int(kv_length))
    return DeferredMask(  # pyright: ignore[reportCallIssue]  (a Tensor class with its own __new__)
        rule,
        shape,
        query_offset=offset,
        key_offset=int(kv_offset),
        key_valid=key_valid,
        causal=not padded and mask_function is causal_mask_function,
        unpadded=mask_function,
        past=mask_function is causal_mask_function,
        dtype=torch.bool if additive is None else additive,
        device=device,
    )


def deferred_eager_mask(
    *args: Any, dtype: torch.dtype = torch.float32, allow_is_causal_skip: bool = False, **rest: Any
) -> Tensor | None:
    """The same for models that run eager: a causal mask is never left out, and computes as an additive one."""
    return deferred_mask(*args, **rest, allow_is_causal_skip=False, additive=dtype)


def _only_future(key_valid: Tensor | None, queries: int) -> bool:
    """Whether only slots after the queries are unused: the first prefill into a static cache."""
    if key_valid is None:
        return True
    return bool(key_valid[:, :queries].all()) and not bool(key_valid[:, queries:].any())


def _key_valid(attention_mask: Tensor | None, keys: int, offset: int) -> Tensor | None:
    """The padding mask over the key slots that take part, or None when nothing is padded."""
    if attention_mask is None:
        return None
    mask = attention_mask.bool()
    missing = keys + offset - mask.shape[-1]
    if missing > 0:
        mask = torch.nn.functional.pad(mask, (0, missing))
    mask = mask[:, offset : offset + keys]
    return None if bool(mask.all()) else mask


def configs_of(model: nn.Module) -> Iterator[Any]:
    """Every distinct config object that a module of the model consults, nested ones included."""
    seen: set[int] = set()
    waiting = [module.config for module in model.modules() if hasattr(module, "config")]
    while waiting:
        config = waiting.pop()
        if id(config) in seen or not hasattr(config, "_attn_implementation"):
            continue
        seen.add(id(config))
        yield config
        for value in vars(config).values():
            if hasattr(value, "_attn_implementation"):
                waiting.append(value)


def read_implementation(config: Any) -> Any:
    return config._attn_implementation_internal


def write_implementation(config: Any, value: Any) -> None:
    """Sets one config's implementation without touching its sub-configs."""
    config._attn_implementation_internal = value


def uses_interface(module: nn.Module) -> bool:
    """Whether the module's own `forward` (or a helper in its class) looks its attention function up in the interface."""
    return not isinstance(module, PreTrainedModel) and _mentions(
        type(module), ("ALL_ATTENTION_FUNCTIONS",)
    )


def is_hookable(module: nn.Module) -> bool:
    """Whether attention inside the module reaches the engine: by transformers' interface or by `HookedAttention`."""
    return bool(getattr(type(module), "attends_through_regard", False)) or uses_interface(module)


def computes_softmax(module: nn.Module) -> bool:
    """Whether the module's class computes attention weights of its own: what cannot be hooked but has weights."""
    return isinstance(module, nn.MultiheadAttention) or _mentions(
        type(module),
        ("softmax(", "logsumexp(", "scaled_dot_product_attention(", "flash_attn", "nn.Softmax"),
    )


@functools.cache
def _mentions(kind: type[nn.Module], words: tuple[str, ...]) -> bool:
    for owner in kind.__mro__:
        if owner is nn.Module:
            break
        try:
            source = inspect.getsource(owner)
        except (OSError, TypeError):
            continue
        if any(word in source for word in words):
            return True
    return False


def is_transformers(model: nn.Module) -> bool:
    return isinstance(model, PreTrainedModel) or any(
        isinstance(m, PreTrainedModel) for m in model.modules()
    )


def growing_keys(cache: object) -> set[int] | None:
    """The places in memory (`data_ptr`) of the keys of a cache that only appends: transformers' own growing cache.

    None for every other cache. Beams that change places, and rows that are chosen or repeated, put the keys in another
    place; a crop leaves them where they are, but fewer. Keys that somebody overwrites in place are not noticed.
    """
    if type(cache) is not DynamicCache:
        return None
    layers = cache.layers
    if any(type(one) is not DynamicLayer for one in layers):
        return None
    keys = [getattr(one, "keys", None) for one in layers]
    return {one.data_ptr() for one in keys if isinstance(one, Tensor)}
