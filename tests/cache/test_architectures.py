"""Every causal language model that can be built small, under a full cache and under one that evicts.

Full: the logits of prompt, one token and three more are those under transformers' `DynamicCache`, without and with padding.
Evicting: the same positions are dropped in all layers, so they are those of `DynamicCache` with the dropped tokens masked out.
"""

from __future__ import annotations

import inspect
import warnings
from dataclasses import dataclass
from typing import Any

import architectures
import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn
from transformers import DynamicCache

from regard._errors import RegardError
from regard.attach.cache_names import cache_argument
from regard.cache import Cache, Full, Layer, Scorer
from regard.cache.budgets import Uniform

NO_CACHE = "no KV cache|no attention layers"
NO_INTERFACE = "without transformers' attention interface"
REFUSED = {
    **dict.fromkeys(("mamba", "mamba2", "falcon_mamba", "rwkv", "xlstm"), NO_CACHE),
    **dict.fromkeys(("openai-gpt", "reformer", "xlnet", "xlm"), f"{NO_CACHE}|{NO_INTERFACE}"),
    **dict.fromkeys(
        ("big_bird", "bloom", "cpmant", "falcon", "gpt_neo", "mpt", "mvp"), NO_INTERFACE
    ),
    **dict.fromkeys(("gpt_neox_japanese", "megatron-bert", "prophetnet"), NO_INTERFACE),
    **dict.fromkeys(("rembert", "roformer", "trocr", "xglm"), NO_INTERFACE),
}
if Version(transformers.__version__) < Version("5.24"):
    REFUSED |= dict.fromkeys(("codegen", "gptj"), NO_INTERFACE)
"""Families that no cache of regard's works with, and what the error says."""

LATENT = "did not reach the attention function"
BY_NUMBER = "chooses keys by their number"
FULL_ONLY = {
    **dict.fromkeys(("axk1", "bailing_hybrid", "deepseek_v2", "deepseek_v3", "git"), LATENT),
    **dict.fromkeys(("glm4_moe_lite", "jetmoe", "kimi_linear", "longcat_flash"), LATENT),
    **dict.fromkeys(("minicpm3", "youtu", "diffllama", "doge"), LATENT),
    **dict.fromkeys(("axk2", "deepseek_v32", "deepseek_v4", "dots3_note_text"), BY_NUMBER),
    **dict.fromkeys(("glm_moe_dsa", "hy_v4", "minimax_m3_vl_text", "qwen4_exp_text"), BY_NUMBER),
}
"""Families whose cached tensors are not the keys that attention sees, or that choose keys by number: nothing may be dropped."""

UNPADDED_ONLY = {"doge"}
"""Computes a mask from the cached values, so their padding may not be dropped either."""

OWN_CACHE = {"minimax"}
"""Accepts no cache but its own."""

FAMILIES = [
    family
    for family in architectures.families()
    if "CausalLM" in family.head or family.name in ("gpt2", "ctrl", "bert")
]


@dataclass(frozen=True)
class Comb(Scorer):
    """The same irregular choice in every layer and head; the last six tokens stay, so that windows of six lose nothing.

    The first token stays as a sink: masked out in the reference, it would pass for left padding (Llama 4 moves its chunks then).
    """

    window: int = 6

    def score(self, layer: Layer) -> Tensor:
        return ((layer.positions.long() * 7) % 5).float()


def dynamic(model: Any) -> DynamicCache:
    return DynamicCache(config=model.config.get_text_config(decoder=True))


def talk(model: Any, given: dict[str, Any], cache: Any, dropped: list[int]) -> Tensor:
    """Logits of a prompt, one token and three more; `dropped` positions are masked after the prompt."""
    given = {name: value for name, value in given.items() if name != "token_type_ids"}
    ids, mask = given.pop("input_ids"), given.pop("attention_mask", None)
    shown = torch.ones_like(ids) if mask is None else mask
    positions = (shown.cumsum(-1) - 1).clamp(min=0)
    last = positions.amax(-1, keepdim=True)
    takes = inspect.signature(model.forward).parameters
    logits: list[Tensor] = []
    new = torch.tensor([[11, 12, 13, 14], [21, 22, 23, 24]])
    calls = [(ids, shown, positions)]
    after = shown.index_fill(1, torch.tensor(dropped, dtype=torch.long), 0)
    for a, b in ((0, 1), (1, 4)):
        after = torch.cat([after, torch.ones(len(ids), b - a, dtype=after.dtype)], 1)
        calls.append((new[:, a:b], after, last + 1 + torch.arange(a, b)))
    for turn, (tokens, seen, where) in enumerate(calls):
        arguments: dict[str, Any] = {cache_argument(model): cache, "use_cache": True}
        if "position_ids" in takes:
            arguments["position_ids"] = where
        if mask is not None or dropped:
            arguments["attention_mask"] = seen
        if turn == 0:
            arguments |= given
        elif isinstance(cache, Cache):
            cache._paused = True  # later turns are compared with the same kept set
        found = model(input_ids=tokens, **arguments).logits[:, -tokens.shape[1] :].float()
        logits.append(torch.where(seen[:, -tokens.shape[1] :, None].bool(), found, 0))
    return torch.cat(logits, 1)


def equal(found: Tensor, expected: Tensor) -> None:
    scale = max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(found, expected, atol=1e-4 * scale, rtol=0)


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_family(family: architectures.Family) -> None:
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            model: nn.Module = architectures.make(family)
            inputs = architectures.inputs(family, model)
            model(**inputs["unpadded"])
        except Exception as error:
            pytest.skip(f"no small model: {error}"[:150])
        if family.name in REFUSED:
            with pytest.raises(RegardError, match=REFUSED[family.name]):
                Full(model)
            return
        if family.name in OWN_CACHE:
            pytest.skip("takes no cache but its own class")
        for kind, given in inputs.items():
            expected = talk(model, given, dynamic(model), [])
            if kind != "unpadded" and family.name in UNPADDED_ONLY:
                with Full(model) as cache, pytest.raises(RegardError, match="unpadded input only"):
                    talk(model, given, cache, [])
                continue
            with Full(model) as cache:
                equal(talk(model, given, cache, []), expected)
        evicting(family, model, inputs["unpadded"])


def evicting(family: architectures.Family, model: Any, given: dict[str, Any]) -> None:
    if family.name in FULL_ONLY:
        with pytest.raises(RegardError, match=FULL_ONLY[family.name]):
            talk(model, given, Cache(model, Comb(), Uniform(9), sinks=1), [])
        return
    with Cache(model, Comb(), Uniform(9), sinks=1) as cache:
        kept: list[int] = []
        settle = cache.leaving

        def leaving(failed: bool) -> None:
            settle(failed)
            if not kept and cache._depth == 0:
                used = [layer for layer in cache.held if layer.rows is not None]
                wide = [layer for layer in used if not layer.is_sliding] or used
                kept.extend(cache.kept(wide[0].index, 0).tolist() if wide else range(10**3))

        cache.leaving = leaving  # type: ignore[method-assign]
        found = talk(model, given, cache, [])
    tokens = given["input_ids"].shape[1]
    equal(found, talk(model, given, dynamic(model), sorted(set(range(tokens)) - set(kept))))
