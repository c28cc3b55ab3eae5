"""Every scorer x budget rule x store x batch computes attention over exactly what it kept.

The model runs prompt, answer tokens and a question of several tokens with the cache; each attention output is compared with dense
float64 attention over the positions that the cache named beforehand, from keys and values recorded on the way in.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from cache.held import Comb, Received, Recorder, Slanted, padded, positions_of, small_llama
from regard.cache import Cache, Ragged, budgets, scorers
from regard.cache.quantised import Quantised

HEADS = tuple(tuple(float(layer == head) for head in range(4)) for layer in range(3))
NEEDED: dict[str, dict[str, Any]] = {"RetrievalHeads": {"scores": HEADS}}
"""Arguments without a default."""

SCORERS: dict[str, Any] = {"comb": Comb(), "received": Received()}
SCORERS |= {name: getattr(scorers, name)(**NEEDED.get(name, {})) for name in scorers.__all__}
RULES: dict[str, Any] = {"slanted": Slanted(8)}
RULES |= {name: getattr(budgets, name)(0.4) for name in ("Uniform", "Pyramid", "Ada", "Global")}

CASES = [(scorer, rule) for rule in ("slanted", "Global") for scorer in SCORERS]
CASES += [(scorer, rule) for rule in ("Uniform", "Pyramid", "Ada") for scorer in ("comb", "H2O")]
RULES["CakePreference"] = budgets.CakePreference(0.4)
CASES += [("CAKE", "CakePreference")]


@pytest.mark.parametrize("side", ["alone", "left", "right"])
@pytest.mark.parametrize(("scorer", "rule"), CASES)
def test_equals_attention_over_what_is_kept(scorer: str, rule: str, side: str) -> None:
    run(SCORERS[scorer], RULES[rule], Ragged(), side, every=None)


@pytest.mark.parametrize("side", ["alone", "left"])
@pytest.mark.parametrize("scorer", list(SCORERS))
def test_also_while_it_evicts_at_every_step(scorer: str, side: str) -> None:
    run(SCORERS[scorer], RULES["slanted"], Ragged(), side, every=1)


@pytest.mark.parametrize("side", ["alone", "left"])
@pytest.mark.parametrize("rule", ["slanted", "Uniform", "Global"])
@pytest.mark.parametrize("scorer", ["comb", "H2O"])
def test_quantised_attends_to_what_it_dequantises(scorer: str, rule: str, side: str) -> None:
    run(SCORERS[scorer], RULES[rule], Quantised("fp8", residual=4), side, every=None)


def run(scorer: Any, rule: Any, store: Any, side: str, every: int | None) -> None:
    model = small_llama()
    ids, mask = padded([21] if side == "alone" else [21, 13], "left" if side == "left" else "right")
    given = None if side == "alone" else mask
    cache = Cache(model, scorer, rule, store, every=every)
    recorder = Recorder(3)
    worst, evicted = [0.0], [False]
    decode, dispatch = _spies(cache, recorder, worst, lambda: grown)
    with pytest.MonkeyPatch.context() as patch:
        decode(patch)
        dispatch(patch)
        generator = torch.Generator().manual_seed(5)
        grown = mask if given is not None else None
        _call(model, cache, ids, grown, mask.cumsum(-1) - 1)
        evicted[0] = any(not layer.contiguous for layer in cache.held)
        last = mask.sum(-1, keepdim=True) - 1
        for tokens in (1, 1, 5, 1):
            new = torch.randint(3, 64, (len(ids), tokens), generator=generator)
            if grown is not None:
                grown = torch.cat([grown, torch.ones_like(new)], 1)
            _call(model, cache, new, grown, last + 1 + torch.arange(tokens))
            last = last + tokens
    assert evicted[0], "nothing was evicted: the comparison would show nothing"
    assert recorder.keys[2] is not None and recorder.keys[2].shape[2] == 29
    assert worst[0] < 2e-5, f"largest difference {worst[0]:.1e}"


def _call(model: Any, cache: Cache, ids: Tensor, mask: Tensor | None, positions: Tensor) -> None:
    model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions.clamp(min=0),
        past_key_values=cache,
        use_cache=True,
    )


def _spies(cache: Cache, recorder: Recorder, worst: list[float], mask: Any) -> tuple[Any, Any]:
    """Records what goes into the cache, and compares what the attention function makes of it."""
    from regard.cache.seam import Tag

    state: dict[int, tuple[list[list[list[int]]], int]] = {}
    update = Cache.update

    def spy_update(
        self: Cache, key: Tensor, value: Tensor, layer: int, *args: Any, **rest: Any
    ) -> Any:
        held = self.held[layer]
        state[layer] = (positions_of(self, layer), held.seen)
        if isinstance(self.store, Quantised) and held.rows is not None:
            recorder.replace(layer, state[layer][0], held.keys, held.values)
        recorder.add(layer, key.clone(), value.clone())
        return update(self, key, value, layer, *args, **rest)

    def compare(tag: Tag, query: Tensor, scaling: float, output: Tensor) -> None:
        layer = tag.layer.index
        kept, first = state[layer]
        if not kept:
            kept = [[[] for _ in range(2)] for _ in range(len(query))]
        real = mask()
        expected = recorder.expected(layer, query, scaling, kept, first, real)
        if real is not None:  # what padding computes is nobody's concern
            now = real[:, first : first + query.shape[2]]
            expected = expected * now[:, None, :, None]
            output = output * now[:, None, :, None]
        worst[0] = max(worst[0], float((output.double() - expected).abs().max()))

    def install_decode(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(Cache, "update", spy_update)
        decode = Tag.decode

        def spied(self: Tag, module: Any, query: Tensor, given: Any, scaling: float) -> Any:
            output = decode(self, module, query, given, scaling)
            if output is not None:
                compare(self, query, scaling, output)
            return output

        patch.setattr(Tag, "decode", spied)

    def install_dispatch(patch: pytest.MonkeyPatch) -> None:
        done = Tag.done

        def spied(self: Tag, call: Any, given: Any) -> None:
            compare(self, call.query, call.scaling, call.output)
            done(self, call, given)

        patch.setattr(Tag, "done", spied)

    return install_decode, install_dispatch
