"""Everything that depends on how transformers is built, in one place.

Registers the attention function and its mask under the name `regard`. A custom attention function without an entry in the
mask interface would silently run without any mask, so both are registered together.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from regard.engine.masks import DeferredMask

NAME = "regard"


def register(function: Callable[..., tuple[Tensor, None]]) -> None:
    """Makes `function` the attention implementation called `regard`."""
    AttentionInterface.register(NAME, function)
    AttentionMaskInterface.register(NAME, deferred_mask)


def deferred_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Tensor] | None = None,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **rest: Any,
) -> Tensor | None:
    """transformers' mask request answered by a rule instead of a queries x keys tensor.

    None is returned in the cases in which the fused kernel needs no mask (plain causal, plain full). Rules that are not
    index-based (`use_vmap`) are built as a tensor by transformers itself.
    """
    settings = dict(
        batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset, device=device
    )
    if use_vmap:
        return sdpa_mask(
            **settings,
            mask_function=mask_function,  # type: ignore[arg-type]
            attention_mask=attention_mask,
            local_size=local_size,
            allow_is_causal_skip=allow_is_causal_skip,
            allow_is_bidirectional_skip=allow_is_bidirectional_skip,
            use_vmap=True,
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
    assert mask_function is not None

    def rule(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        visible = mask_function(batch, head, query, key)
        if key_valid is not None:
            visible = visible & key_valid[:, None, None, :]
        return visible

    shape = (int(batch_size), 1, int(q_length), int(kv_length))
    return DeferredMask(
        rule, shape, query_offset=offset, key_offset=int(kv_offset), key_valid=key_valid, device=device
    )


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
    for owner in type(module).__mro__:
        if owner is nn.Module:
            break
        try:
            if "ALL_ATTENTION_FUNCTIONS" in inspect.getsource(owner):
                return True
        except (OSError, TypeError):
            continue
    return False


def file_uses_interface(model: nn.Module) -> bool:
    """Whether the file that defines the model's class mentions the attention interface at all."""
    module = sys.modules.get(type(model).__module__)
    try:
        return module is not None and "ALL_ATTENTION_FUNCTIONS" in inspect.getsource(module)
    except (OSError, TypeError):
        return False


def is_transformers(model: nn.Module) -> bool:
    return isinstance(model, PreTrainedModel) or any(isinstance(m, PreTrainedModel) for m in model.modules())
