"""The full proof for one live model: with methods attached that only read, nothing about the model changes, and what the
methods see is what the model computes.

Four comparisons, each against the model itself:

* outputs on every given input, attached (weights read block by block; then head outputs and residual stream read with the
  fused kernel left in place) against untouched, in the implementation that the model runs by default;
* tokens and logits of a greedy `generate()`, which prefills, decodes and fills a cache;
* attention weights reassembled from the blocks against the maps of the model's own eager implementation, and entropy and
  received attention against a float64 computation from these maps;
* implementation names, hooks and outputs after leaving against those before.

Meant for small inputs: maps are held in full, `O(sites x heads x queries x keys)` numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from regard._errors import AttachError, InputError
from regard.attach import compat
from regard.attach.equality import first_tensor, valid_part
from regard.attach.session import Session
from regard.engine import AttentionCall, Block, Method, Site, State


@dataclass(slots=True)
class Verification:
    """What was compared and how far apart it was, as max |difference| / max(1, max |untouched|) over valid tokens.

    A comparison that does not apply is absent from `outputs` or None: `generate` without a text decoder, `maps` where the
    eager implementation returns none. `problems` says in words what exceeds the tolerance.
    """

    model: str
    implementation: str
    tolerance: float
    sites: tuple[Site, ...] = ()
    windowed: bool = False
    softcap: bool = False
    sinks: bool = False
    outputs: dict[str, float] = field(default_factory=dict)
    generate: float | None = None
    maps: float | None = None
    mapped: int = 0
    entropy: float | None = None
    received: float | None = None
    additive: dict[str, bool] = field(default_factory=dict)
    unhooked: tuple[str, ...] = ()
    restored: bool = True
    problems: list[str] = field(default_factory=list)

    @property
    def holds(self) -> bool:
        return not self.problems

    @property
    def grouped(self) -> bool:
        """Whether several query heads share a KV head anywhere."""
        return any(site.heads > site.kv_heads for site in self.sites)

    def __str__(self) -> str:
        verdict = "equal" if self.holds else "NOT equal: " + "; ".join(self.problems)
        worst = max(
            (v for v in (*self.outputs.values(), self.generate, self.maps) if v is not None),
            default=math.nan,
        )
        return f"{self.model}: {len(self.sites)} sites, largest difference {worst:.1e}, {verdict}"


class _Maps(Method):
    """Keeps every attention map and the statistics that blocks offer, for each attention module in order of its calls."""

    reads_only = True

    def __init__(self) -> None:
        self.calls: dict[int, list[dict[str, Any]]] = {}
        self._open: dict[str, Any] = {}

    def before(self, call: AttentionCall) -> None:
        shape = (call.query.shape[0], call.heads, call.queries, call.keys)
        held = call.query.new_zeros(shape, dtype=torch.float64)
        self._open = {
            "map": held,
            "entropy": held.new_zeros(shape[:3]),
            "received": held.new_zeros((shape[0], shape[1], shape[3])),
            "valid": call.valid,
            "sinks": call.sinks is not None,
            "softcap": call.softcap is not None,
            "narrow": False,
        }
        self.calls.setdefault(id(call.module), []).append(self._open)

    def weights(self, block: Block) -> None:
        part = self._open
        part["map"][:, :, block.rows, block.keys] = block.weights.double()
        part["entropy"][:, :, block.rows] = block.entropy.double()
        part["received"][:, :, block.keys] += block.received().double()
        causal = (
            block.positions + 1
            if block.site.causal
            else torch.full_like(block.rows, block.call.keys)
        )
        padded = block.call.key_valid is not None or block.site.kind == "cross"
        part["narrow"] |= not padded and bool((block.counts < causal).any())


class _Reader(Method):
    """Reads head outputs and the residual stream and changes nothing; leaves the fused kernel in place."""

    reads_only = True

    def heads(self, call: AttentionCall, output: Tensor) -> None:
        return None

    def residual(self, state: State) -> None:
        return None

    def neurons(self, state: State) -> None:
        return None


def verify(
    model: nn.Module,
    inputs: Mapping[str, Mapping[str, Any]],
    *,
    generate: Mapping[str, Any] | None = None,
    new_tokens: int = 4,
    tolerance: float = 1e-4,
) -> Verification:
    """Compares `model` with itself under attachment on several named inputs; see the module's text.

    Args:
        model: a transformers model in eval mode (dropout would make two runs differ).
        inputs: keyword arguments of `model(...)` by name, for example `{"left padding": {"input_ids": ..., ...}}`.
        generate: keyword arguments for a greedy `model.generate(...)` of `new_tokens`; None leaves it out.
        tolerance: on all differences, relative to the largest output where that exceeds 1.

    Cost: six forward passes for each input and two generations.

    Raises:
        InputError: no inputs, or a model in training mode.
        AttachError: the model's attention cannot be hooked; the message says why.
    """
    if not inputs:
        raise InputError(
            "verify needs at least one input, got none; pass {'text': tokenizer(..., return_tensors='pt')}"
        )
    if model.training:
        raise InputError(
            "verify compares two runs, so dropout must be off; call model.eval() first"
        )
    result = Verification(type(model).__name__, _implementation(model), tolerance)
    with torch.no_grad():
        for name, given in inputs.items():
            _compare_outputs(model, name, dict(given), result)
        if generate is not None:
            _compare_generation(model, dict(generate), new_tokens, result)
    return result


def _compare_outputs(
    model: nn.Module, name: str, given: dict[str, Any], result: Verification
) -> None:
    plain = first_tensor(model(**given))
    before = _settings(model)
    maps, reader = _Maps(), _Reader()
    with Session(model, maps) as session:
        blockwise = first_tensor(model(**given))
        result.sites = tuple(session.sites.values())
        result.unhooked = tuple(session.unhooked)
        modules = session.modules
    with Session(model, reader) as session:
        fused = first_tensor(model(**given))
        result.additive |= session.additive
    if _settings(model) != before or not torch.equal(plain, first_tensor(model(**given))):
        result.restored = False
        result.problems.append(f"the model is not as it was before ({name})")
    for label, attached in (("", blockwise), (", fused", fused)):
        difference = _difference(valid_part(plain, given), valid_part(attached, given))
        result.outputs[name + label] = difference
        _judge(result, f"outputs ({name}{label})", difference)
    for module in modules.values():
        calls = maps.calls.get(id(module), [])
        result.sinks |= any(call["sinks"] for call in calls)
        result.softcap |= any(call["softcap"] for call in calls)
        result.windowed |= any(call["narrow"] for call in calls)
    _compare_maps(model, name, given, maps, modules, result)


def _compare_maps(
    model: nn.Module,
    name: str,
    given: dict[str, Any],
    maps: _Maps,
    modules: dict[str, nn.Module],
    result: Verification,
) -> None:
    reference = _eager_maps(model, given, modules)
    mapped = 0
    for path, module in modules.items():
        theirs, ours = reference.get(path, []), maps.calls.get(id(module), [])
        if not theirs or len(ours) % len(theirs):
            continue
        mapped += 1
        ours = ours[
            :: len(ours) // len(theirs)
        ]  # DiffLlama attends twice and returns the first map
        for dense, call in zip(theirs, ours, strict=True):
            keys = min(dense.shape[-1], call["map"].shape[-1])
            if dense.shape[:3] != call["map"].shape[:3]:
                result.problems.append(
                    f"{path}: eager map {tuple(dense.shape)}, seen {tuple(call['map'].shape)} ({name})"
                )
                continue
            seen = call["map"]
            rows = (
                call["valid"][:, None, :, None]
                if call["valid"] is not None
                else torch.ones_like(seen[:1, :1, :, :1]).bool()
            )
            weights = dense.double()
            if call["sinks"] and float(weights.sum(-1).min()) > 1 - 1e-5:
                seen = seen / seen.sum(-1, keepdim=True).clamp_min(1e-30)
            difference = float(((weights[..., :keys] - seen[..., :keys]) * rows).abs().max())
            if dense.shape[-1] > keys:
                difference = _worse(difference, float((weights[..., keys:] * rows).abs().max()))
            result.maps = _worse(result.maps, difference)
            full = torch.where(rows, call["map"], 0)
            rest = torch.special.entr((1 - full.sum(-1)).clamp(0, 1)) if call["sinks"] else 0
            entropy = torch.special.entr(full).sum(-1) + rest
            entropy_off = float(((entropy - call["entropy"]) * rows[..., 0]).abs().max())
            received_off = float((full.sum(-2) - call["received"]).abs().max())
            result.entropy = _worse(result.entropy, entropy_off)
            result.received = _worse(result.received, received_off)
    result.mapped = max(result.mapped, mapped)
    for what, difference in (
        ("maps", result.maps),
        ("entropy", result.entropy),
        ("received", result.received),
    ):
        if difference is not None:
            _judge(result, f"{what} ({name})", difference, 10.0 if what != "maps" else 1.0)


def _eager_maps(
    model: nn.Module, given: dict[str, Any], modules: dict[str, nn.Module]
) -> dict[str, list[Tensor]]:
    """The weights that each attention module returns under transformers' eager implementation, by module path."""
    found: dict[str, list[Tensor]] = {}
    handles = []
    for path, module in modules.items():

        def keep(_module: nn.Module, _args: tuple, output: Any, path: str = path) -> None:
            parts = output if isinstance(output, tuple | list) else ()
            maps = [part for part in parts if isinstance(part, Tensor) and part.dim() == 4]
            if maps:
                found.setdefault(path, []).append(maps[-1].detach())  # T5: after its bias

        handles.append(module.register_forward_hook(keep))
    try:
        with _implemented(model, "eager"):
            try:
                model(**given, output_attentions=True)
            except (TypeError, ValueError):
                found.clear()
                model(**given)
    except (NotImplementedError, KeyError, AttributeError):
        found.clear()
    finally:
        for handle in handles:
            handle.remove()
    return found


def _compare_generation(
    model: nn.Module, given: dict[str, Any], new_tokens: int, result: Verification
) -> None:
    settings: dict[str, Any] = {
        "max_new_tokens": new_tokens,
        "min_new_tokens": new_tokens,
        "do_sample": False,
        "num_beams": 1,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    plain = model.generate(**given, **settings)  # type: ignore[operator]
    with Session(model, _Maps()):
        attached = model.generate(**given, **settings)  # type: ignore[operator]
    worst = 0.0
    for left, right in zip(plain.logits, attached.logits, strict=True):
        worst = _worse(worst, _difference(left, right))
    result.generate = worst
    _judge(result, "logits of generate()", worst)
    if not torch.equal(plain.sequences, attached.sequences):
        result.problems.append("generate() wrote other tokens")


def _judge(result: Verification, what: str, difference: float, factor: float = 1.0) -> None:
    if not difference <= result.tolerance * factor:
        result.problems.append(f"{what} differ by {difference:.1e} > {result.tolerance * factor:g}")


def _worse(held: float | None, new: float) -> float:
    """The larger one; a NaN stays."""
    return new if held is None or math.isnan(new) or new > held else held


def _difference(plain: Tensor, attached: Tensor) -> float:
    both = plain.isfinite()
    if (
        plain.shape != attached.shape
        or not bool(both.any())
        or not torch.equal(both, attached.isfinite())
    ):
        return math.inf
    plain, attached = plain[both].double(), attached[both].double()
    return float((plain - attached).abs().max() / plain.abs().max().clamp_min(1.0))


def _implementation(model: nn.Module) -> str:
    names = {str(compat.read_implementation(config)) for config in compat.configs_of(model)}
    return "/".join(sorted(names)) or "none"


def _settings(model: nn.Module) -> tuple[Any, ...]:
    """Everything that attaching touches: implementation names and hook counts of all modules."""
    names = [
        (id(config), compat.read_implementation(config)) for config in compat.configs_of(model)
    ]
    hooks = [
        (len(module._forward_hooks), len(module._forward_pre_hooks), len(module._backward_hooks))
        for module in model.modules()
    ]
    return tuple(sorted(names)), tuple(hooks)


@contextmanager
def _implemented(model: nn.Module, name: str) -> Iterator[None]:
    held = [(config, compat.read_implementation(config)) for config in compat.configs_of(model)]
    try:
        for config, _ in held:
            compat.write_implementation(config, name)
        yield
    finally:
        for config, original in held:
            compat.write_implementation(config, original)


__all__ = ["AttachError", "Verification", "verify"]
