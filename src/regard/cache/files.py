"""Saving a cache and taking it up again: one safetensors file with what is held, the token ids and the policy.

The file names the model it belongs to (its class, the shape of its attention and a digest of its weights), and is refused by any
other. It is written beside its place and moved there when complete, so a crash leaves the old file or none.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from regard._errors import InputError, OutputError
from regard.cache.budget import Budget
from regard.cache.cache import Cache, Full
from regard.cache.layer import Layer
from regard.cache.scorer import Scorer

FORMAT = "regard-cache/1"
OURS = "regard.cache."
SETTINGS = ("every", "sinks", "chunk")


def save(cache: Cache, path: str | os.PathLike[str]) -> Path:
    """Writes a cache to a safetensors file (atomically) and returns the path; what `Cache.save` does.

    Raises:
        InputError: a model with recurrent or convolutional states beside its attention.
        OutputError: a place that cannot be written.
    """
    target = Path(path)
    tensors: dict[str, Tensor] = {}
    described: list[dict[str, Any] | None] = []
    for index, layer in enumerate(cache.layers):
        if type(layer).__name__ == "DummyLayer":
            described.append(None)
        elif type(layer) is not Layer:
            raise InputError(
                f"layer {index} of {type(cache.model).__name__} keeps more than keys and values ({type(layer).__name__}); "
                "such caches cannot be saved"
            )
        else:
            described.append(_describe(layer, tensors))
    if cache.tokens is not None:
        tensors["tokens"] = cache.tokens
    head = {
        "format": FORMAT,
        "model": json.dumps(fingerprint(cache.model)),
        "policy": json.dumps(_policy(cache)),
        "layers": json.dumps(described),
    }
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        os.close(handle)
        try:
            save_file(tensors, name, metadata=head)
            os.replace(name, target)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except (OSError, SafetensorError) as error:
        raise OutputError(f"cannot write the cache to {target}: {error}") from error
    return target


def load(
    path: str | os.PathLike[str],
    model: nn.Module,
    scorer: Scorer | None = None,
    budget: Budget | float | int | str | None = None,
) -> Cache:
    """Takes up a cache that `Cache.save` wrote, on the model that it was made with.

    Args:
        path: the file.
        model: the same model (class, shape and weights).
        scorer: the scorer to go on with; the saved one unless given. Needed when it was a class of your own.
        budget: likewise.

    Raises:
        InputError: no such file, not a cache or damaged, another model's, or a policy that must be given.
    """
    head, tensors = _read(Path(path))
    try:
        saved = json.loads(head["model"])
        policy, described = json.loads(head["policy"]), json.loads(head["layers"])
    except (KeyError, ValueError) as error:
        raise InputError(f"{path} is damaged: its header is incomplete ({error!r})") from error
    here = fingerprint(model)
    differs = [name for name in here if saved.get(name) != here[name]]
    if differs:
        raise InputError(
            f"the cache in {path} belongs to another model: {differs[0]} is {saved.get(differs[0])!r} there and "
            f"{here[differs[0]]!r} in the {type(model).__name__} given"
        )
    scorer = scorer or _revive(policy["scorer"], Scorer, "scorer", path)
    budget = budget if budget is not None else _revive(policy["budget"], Budget, "budget", path)
    store = _revive(policy["store"], object, "store", path)
    cache = _make(policy, model, scorer, budget, store)
    try:
        for layer, about in zip(cache.layers, described, strict=True):
            if isinstance(layer, Layer):
                _restore(layer, about, tensors)
    except (KeyError, ValueError, RuntimeError) as error:
        cache.close()
        raise InputError(f"{path} is damaged: {error}") from error
    cache.tokens = tensors.get("tokens")
    return cache


def _make(policy: dict[str, Any], model: nn.Module, scorer: Any, budget: Any, store: Any) -> Cache:
    """An empty cache with the saved policy; of the saved class only where this does more than its scorer and budget."""
    if scorer is None:
        return Full(model, store)
    settings = {name: policy[name] for name in SETTINGS}
    module, _, name = policy["class"].partition(":")
    kind = getattr(importlib.import_module(module), name) if module.startswith(OURS) else Cache
    if kind._evict is Cache._evict and kind.leaving is Cache.leaving:
        return Cache(model, scorer, budget, store, **settings)
    cache = kind(model, budget, store=store, **settings)
    cache.scorer = scorer
    for name, value in policy["state"].items():
        setattr(cache, name, value)
    return cache


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """What tells a model from others: its class, dtype, the size of its attention, and a digest of some of its weights."""
    config: Any = model.config
    text = config.get_text_config(decoder=True)
    weights = list(model.parameters())
    digest = hashlib.sha256()
    for weight in (weights[0], weights[len(weights) // 2], weights[-1]):
        flat = weight.detach().flatten()
        few = flat[:: max(1, len(flat) // 256)][:256]
        digest.update(few.float().cpu().numpy().tobytes())
    names = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_size")
    return {
        "class": type(model).__name__,
        **{name: getattr(text, name, None) for name in names},
        "dtype": str(weights[0].dtype),
        "weights": digest.hexdigest(),
    }


def _describe(layer: Layer, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """What is held goes into `tensors`; the rest comes back."""
    about: dict[str, Any] = {"seen": layer.seen, "steps": layer.steps, "memory": []}
    if layer.rows is None:
        return about | {"rows": None}
    layer.complete()
    about |= {
        "rows": [layer.rows.batch, layer.rows.heads],
        "sizes": list(layer.rows.sizes),
        "real": layer.real.tolist(),
        "contiguous": layer.contiguous,
        "columns": list(layer.rows.columns),
    }
    for name in layer.rows.columns:
        tensors[f"{layer.index}.{name}"] = layer.rows.packed(name).contiguous()
    for name, kept in layer.memory.items():
        tensors[f"{layer.index}.memory.{name}"] = kept.contiguous().clone()
        about["memory"].append(name)
    return about


def _restore(layer: Layer, about: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    layer.seen, layer.steps = about["seen"], about["steps"]
    if about["rows"] is None:
        return
    columns = {name: tensors[f"{layer.index}.{name}"] for name in about["columns"]}
    slots = sum(about["sizes"])
    for name, column in columns.items():
        if len(column) != slots:
            raise ValueError(
                f"layer {layer.index} has {len(column)} numbers of {name}, not {slots}"
            )
    batch, heads = about["rows"]
    layer.begin(batch, heads, columns["key"])
    layer.rows.unpack(about["sizes"], **columns)
    layer.real = torch.tensor(about["real"])
    layer.contiguous = about["contiguous"]
    layer.memory = {name: tensors[f"{layer.index}.memory.{name}"] for name in about["memory"]}


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    if not path.is_file():
        raise InputError.of("path", given=str(path), expected="a file that Cache.save wrote")
    try:
        with safe_open(path, framework="pt") as file:
            head = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is damaged or no safetensors file: {error}") from error
    if head.get("format") != FORMAT:
        raise InputError(
            f"{path} is no saved cache of this version: its format is {head.get('format')!r}, expected {FORMAT!r}"
        )
    return head, tensors


def _policy(cache: Cache) -> dict[str, Any]:
    parts = {
        name: _freeze(getattr(cache, name)) if getattr(cache, name) is not None else None
        for name in ("scorer", "budget", "store")
    }
    own = {name: getattr(cache, name) for name in cache.state}
    kind = f"{type(cache).__module__}:{type(cache).__qualname__}"
    return parts | {name: getattr(cache, name) for name in SETTINGS} | {"class": kind, "state": own}


def _freeze(part: Any) -> Any:
    """A frozen dataclass as JSON, with the name of its class; parts of parts likewise."""
    if dataclasses.is_dataclass(part) and not isinstance(part, type):
        fields = {
            field.name: _freeze(getattr(part, field.name))
            for field in dataclasses.fields(part)
            if field.init
        }
        return {"class": f"{type(part).__module__}:{type(part).__qualname__}", "fields": fields}
    if isinstance(part, tuple | list):
        return [_freeze(item) for item in part]
    if isinstance(part, dict):
        return {"pairs": [[_freeze(key), _freeze(value)] for key, value in part.items()]}
    if isinstance(part, Tensor):
        return {"tensor": part.tolist()}
    if part is None or isinstance(part, bool | int | float | str):
        return part
    return {"class": f"{type(part).__module__}:{type(part).__qualname__}", "fields": None}


def _revive(frozen: Any, kind: type, name: str, path: object) -> Any:
    """The inverse of `_freeze`, for regard's own classes: a file must not choose what code runs."""
    if frozen is None:
        return None
    revived = _thaw(frozen)
    if revived is None or not isinstance(revived, kind):
        raise InputError(
            f"the {name} of {path} is {frozen['class']}, which is none of regard's; give it: load(path, model, {name}=...)"
        )
    return revived


def _thaw(frozen: Any) -> Any:
    if isinstance(frozen, list):
        return tuple(_thaw(item) for item in frozen)
    if not isinstance(frozen, dict):
        return frozen
    if "pairs" in frozen:
        return {_thaw(key): _thaw(value) for key, value in frozen["pairs"]}
    if "tensor" in frozen:
        return torch.tensor(frozen["tensor"])
    module, _, name = frozen["class"].partition(":")
    if frozen["fields"] is None or not module.startswith(OURS):
        return None
    kind = getattr(importlib.import_module(module), name, None)
    if not (isinstance(kind, type) and dataclasses.is_dataclass(kind)):
        return None
    return kind(**{field: _thaw(value) for field, value in frozen["fields"].items()})
