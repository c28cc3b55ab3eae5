from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import regard
from regard._errors import InputError
from regard.coordinates import Head
from regard.instruments.causal import causal_twin
from regard.instruments.controls import free_draws, layer_matched_draws

VOCAB = 96
GRID = {("", layer): 5 for layer in range(4)}


def llama() -> LlamaForCausalLM:
    torch.manual_seed(2)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=40, intermediate_size=48, num_hidden_layers=4, num_attention_heads=5,
        num_key_value_heads=5, head_dim=8, initializer_range=0.3, eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).double().eval()


def ids(rows: int = 2, tokens: int = 70) -> Tensor:
    return torch.randint(2, VOCAB, (rows, tokens), generator=torch.Generator().manual_seed(5))


def loss(model: nn.Module, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        logits = model(tokens).logits
    return nn.functional.cross_entropy(logits[:, :-1].mT, tokens[:, 1:], reduction="none")


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4)), min_size=1, max_size=10, unique=True),
    st.integers(0, 99),
)
def test_draws_match_the_layers_and_leave_the_named_heads_out(places, seed):
    named = [Head(*place) for place in places]
    wanted = Counter(head.layer for head in named)
    for drawn in layer_matched_draws(named, GRID, 3, seed):
        assert len(set(drawn)) == len(drawn) == len(named)
        assert not set(drawn) & set(named)
        have = Counter(head.layer for head in drawn)
        for layer, count in wanted.items():
            assert have[layer] >= min(count, 5 - count)
        if all(2 * count <= 5 for count in wanted.values()):
            assert have == wanted


def test_what_a_layer_lacks_comes_from_the_nearest_layer():
    named = [Head(1, head) for head in range(5)]
    for drawn in layer_matched_draws(named, GRID, 8):
        assert {head.layer for head in drawn} <= {0, 2}
    assert len(set(layer_matched_draws([Head(2, 0)], GRID, 30))) == 4


def test_more_heads_than_there_are_controls():
    named = [Head(layer, head) for layer in range(4) for head in range(3)]
    for draw in (layer_matched_draws, free_draws):
        with pytest.raises(InputError, match="12 heads are named"):
            draw(named, GRID, 1)


@pytest.mark.parametrize("matched", [True, False])
def test_effects_equal_separate_ablations(matched):
    model, tokens = llama(), ids()
    named = ["L1H2", "L3H0"]
    twin = causal_twin(model, named, tokens, draws=9, layer_matched=matched)
    plain = loss(model, tokens)
    assert twin.base == pytest.approx(float(plain.mean()), abs=1e-9)
    with regard.ablate(model, named):
        change = loss(model, tokens) - plain
    assert twin.effect == pytest.approx(float(change.mean()), abs=1e-9)
    others = []
    for drawn, effect in zip(twin.control_heads, twin.controls.tolist(), strict=True):
        with regard.ablate(model, drawn):
            others.append(loss(model, tokens) - plain)
        assert effect == pytest.approx(float(others[-1].mean()), abs=1e-9)
    assert twin.excess == pytest.approx(
        float((change - torch.stack(others).mean(0)).mean()), abs=1e-9
    )
    assert twin.interval[0] < twin.effect < twin.interval[1]
    assert twin.excess_interval[0] < twin.excess < twin.excess_interval[1]
    assert twin.samples == tokens.numel() - 2


def test_a_planted_head_stands_out():
    """Head L2H1 is made a hundred times louder than its neighbours: silencing it must beat every control."""
    model, tokens = llama(), ids()
    model.model.layers[2].self_attn.o_proj.weight.data[:, 8:16] *= 100
    twin = causal_twin(model, "L2H1", tokens, draws=19)
    assert abs(twin.effect) > 3 * float(twin.controls.abs().max())
    assert twin.p == pytest.approx(1 / 20)
    assert abs(twin.z) > 3
    null = causal_twin(model, "L2H3", tokens, draws=19)
    assert null.p > 0.05


def test_a_function_of_the_model():
    model, tokens = llama(), ids(4, 20)

    def first_logits(live: nn.Module) -> Tensor:
        with torch.no_grad():
            return live(tokens).logits[:, -1, 0]

    twin = causal_twin(model, "L1H2", first_logits, unit="logits")
    plain = first_logits(model)
    with regard.ablate(model, "L1H2"):
        change = first_logits(model) - plain
    assert twin.effect == pytest.approx(float(change.mean()), abs=1e-9)
    assert twin.samples == 4 and "logits" in twin.sentence()
    number = causal_twin(model, "L1H2", lambda live: float(first_logits(live).mean()))
    assert number.effect == pytest.approx(twin.effect) and number.interval[0] != number.interval[0]


def test_decode_phase_is_for_functions():
    model, tokens = llama(), ids(1, 20)

    def generated(live: nn.Module) -> Tensor:
        out = live.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=6, do_sample=False,
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        return torch.stack(out.logits)[:, 0].logsumexp(-1)

    assert causal_twin(model, "L1H2", generated, phase="decode").effect != 0
    with pytest.raises(InputError, match="needs a function"):
        causal_twin(model, "L1H2", tokens, phase="decode")


def test_sentence_table_and_plot():
    twin = causal_twin(llama(), "L1H2 L1H3", ids())
    assert (
        "2 random heads from the same layers" in twin.sentence()
        and "over 8 draws" in twin.sentence()
    )
    assert twin.to_frame()["heads"][0] == "L1H2 L1H3" and twin.to_frame().shape == (9, 3)
    assert twin.plot() is not None


@pytest.mark.parametrize(
    ("heads", "rest", "message"),
    [("L9H0", {}, "outside the model"), ((), {}, "no heads"), ("L0H0", {"draws": 4}, "at least 8")],
)
def test_bad_input(heads, rest, message):
    with pytest.raises(InputError, match=message):
        causal_twin(llama(), heads, ids(), **rest)
