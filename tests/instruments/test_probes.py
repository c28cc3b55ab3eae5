"""Probe scores against dense attention maps, hand-built attention and the definitions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from regard._errors import InputError
from regard.attach import attach
from regard.attach.cache_names import cache_argument, returned_cache
from regard.engine import AttentionCall, Pipeline, attend
from regard.instruments.probes import (
    DuplicateToken,
    Induction,
    PreviousToken,
    latest_occurrence,
    probe_heads,
)

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 60,
}


def llama(**rest):
    return LlamaForCausalLM(LlamaConfig(**SMALL, num_key_value_heads=2, **rest)).eval()


def mistral():
    config = MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=6)
    return MistralForCausalLM(config).eval()


def gpt2():
    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=60, n_positions=64)
    return GPT2LMHeadModel(config).eval()


def bert():
    return BertModel(BertConfig(**SMALL)).eval()


def slow_scores(maps, tokens, valid):
    """The definitions as loops over dense maps: `maps` is a tuple of `[batch, heads, N, N]`."""
    names = ("previous_token", "duplicate_token", "induction")
    result = {name: [] for name in names}
    for layer in maps:
        sums = {name: torch.zeros(layer.shape[1], dtype=torch.float64) for name in names}
        rows = dict.fromkeys(names, 0)
        for b in range(tokens.shape[0]):
            places = [i for i in range(tokens.shape[1]) if valid[b, i]]
            for i in places:
                row = layer[b, :, i].double()
                if i > places[0]:
                    sums["previous_token"] += row[:, i - 1]
                    rows["previous_token"] += 1
                earlier = [j for j in places if j < i and tokens[b, j] == tokens[b, i]]
                if earlier:
                    sums["duplicate_token"] += row[:, earlier[-1]]
                    sums["induction"] += row[:, earlier[-1] + 1]
                    rows["duplicate_token"] += 1
                    rows["induction"] += 1
        for name in names:
            result[name].append(sums[name] / rows[name])
    return {name: torch.stack(layers) for name, layers in result.items()}


def measured(model, **inputs):
    instruments = (PreviousToken(), DuplicateToken(), Induction())
    with torch.no_grad(), attach(model, *instruments):
        model(**inputs)
    return {name: m.matrix() for i in instruments for name, m in i.compute().items()}


@pytest.mark.parametrize("make", [llama, mistral, gpt2, bert])
@pytest.mark.parametrize("side", [None, "left", "right"])
def test_equals_the_definition_on_dense_maps(make, side):
    model = make()
    tokens = torch.randint(0, 9, (3, 23))  # few kinds, so that many tokens repeat
    valid = torch.ones_like(tokens, dtype=torch.bool)
    if side:
        for row, pad in enumerate((0, 4, 9)):
            valid[row, :pad] = False
        valid = valid if side == "left" else valid.flip(1)
    found = measured(model, input_ids=tokens, attention_mask=valid.long())
    model.set_attn_implementation("eager")
    with torch.no_grad():
        dense = model(
            input_ids=tokens, attention_mask=valid.long(), output_attentions=True
        ).attentions
    expected = slow_scores(dense, tokens, valid)
    for name, table in expected.items():
        torch.testing.assert_close(found[name].double(), table, atol=2e-6, rtol=1e-5)


def test_cached_steps_add_up_to_one_pass():
    model, tokens = llama(), torch.randint(0, 7, (2, 20))
    whole = measured(model, input_ids=tokens)
    instruments = (PreviousToken(), DuplicateToken(), Induction())
    with torch.no_grad(), attach(model, *instruments):
        cache = returned_cache(model(input_ids=tokens[:, :11], use_cache=True))
        for i in range(11, 20):
            model(input_ids=tokens[:, i : i + 1], **{cache_argument(model): cache})
    for name, measure in [p for i in instruments for p in i.compute().items()]:
        torch.testing.assert_close(measure.matrix(), whole[name], atol=1e-6, rtol=1e-5)


def test_generation_is_read_like_one_pass_over_what_it_wrote():
    model, prompt = llama(), torch.randint(0, 7, (1, 12))
    instruments = (PreviousToken(), DuplicateToken(), Induction())
    with torch.no_grad(), attach(model, *instruments):
        tokens = model.generate(prompt, max_new_tokens=9, min_new_tokens=9, do_sample=False)
    whole = measured(model, input_ids=tokens[:, :-1])  # the last token is written and not read
    for name, measure in [p for i in instruments for p in i.compute().items()]:
        torch.testing.assert_close(measure.matrix(), whole[name], atol=1e-6, rtol=1e-5)


def test_a_sliding_cache_keeps_the_right_places():
    model, tokens = mistral(), torch.randint(0, 5, (1, 20))
    whole = measured(model, input_ids=tokens)["induction"]
    with torch.no_grad(), attach(model, instrument := Induction()):
        cache = returned_cache(model(input_ids=tokens[:, :11], use_cache=True))
        for i in range(11, 20):
            model(input_ids=tokens[:, i : i + 1], **{cache_argument(model): cache})
    found = instrument.compute()["induction"].matrix()
    torch.testing.assert_close(found, whole, atol=1e-6, rtol=1e-5)


def test_generation_from_the_middle_finds_no_copies_of_unseen_tokens():
    model, tokens = llama(), torch.randint(0, 5, (1, 12))
    with torch.no_grad():
        cache = returned_cache(model(input_ids=tokens, use_cache=True))
        with attach(model, instrument := DuplicateToken()):
            model(input_ids=tokens[:, :1], **{cache_argument(model): cache})
    assert instrument.compute()["duplicate_token"].matrix().isnan().all()


def attention_on(targets: list[int]) -> AttentionCall:
    """One head, one-hot attention: row i looks at `targets[i]`."""
    size = len(targets)
    query = torch.zeros(1, 1, size, size)
    query[0, 0, torch.arange(size), torch.tensor(targets)] = 100.0
    eye = torch.eye(size)[None, None]
    return AttentionCall.make(query, eye, eye, scaling=1.0)


@pytest.mark.parametrize(
    ("back", "expected"),
    [(1, (1.0, 0.0, 0.0)), (5, (0.0, 1.0, 0.0)), (4, (0.0, 0.0, 1.0))],
)
def test_hand_built_heads_score_one_and_only_in_their_own_kind(back, expected):
    tokens = torch.arange(5).repeat(3)[None]
    call = attention_on([max(0, i - back) for i in range(15)])
    instruments = (PreviousToken(), DuplicateToken().follow(tokens), Induction().follow(tokens))
    attend(call, Pipeline(instruments))
    found = [m["L0H0"] for i in instruments for m in i.compute().values()]
    # A head that looks 4 or 5 back looks at key 0 in row 1, which is its previous token.
    slack = (0.0 if back == 1 else 1 / 14, 0.0, 0.0)
    assert found == pytest.approx([e + s for e, s in zip(expected, slack, strict=True)], abs=1e-6)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=30), st.data())
def test_latest_occurrence(tokens, data):
    valid = data.draw(st.lists(st.booleans(), min_size=len(tokens), max_size=len(tokens)))
    found = latest_occurrence(torch.tensor([tokens]), torch.tensor([valid]))[0].tolist()
    for i, token in enumerate(tokens):
        earlier = [j for j in range(i) if tokens[j] == token and valid[j] and valid[i]]
        assert found[i] == (earlier[-1] if earlier else -1)


def test_merging_is_observing_both():
    model, a, b = llama(), torch.randint(0, 7, (1, 16)), torch.randint(0, 7, (2, 9))
    first, second, both = Induction(), Induction(), Induction()
    with torch.no_grad():
        for instrument, batches in ((first, [a]), (second, [b]), (both, [a, b])):
            with attach(model, instrument):
                for batch in batches:
                    model(input_ids=batch)
    merged = first.merge(second).compute()["induction"]
    torch.testing.assert_close(merged.matrix(), both.compute()["induction"].matrix())


def test_probe_heads_of_models_without_tokenizer():
    found = probe_heads(llama(), length=12, batch=2)
    assert list(found) == ["previous_token", "duplicate_token", "induction"]
    assert all(m.matrix().shape == (2, 4) for m in found.values())
    t5 = T5ForConditionalGeneration(
        T5Config(d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4, vocab_size=60)
    )
    stacks = probe_heads(t5.eval(), length=12, batch=2)["induction"].stacks()
    assert stacks == ["encoder", ""]


def test_inputs_without_tokens_are_refused():
    model = llama()
    with (
        torch.no_grad(),
        attach(model, Induction()),
        pytest.raises(InputError, match="compares tokens"),
    ):
        model(inputs_embeds=torch.zeros(1, 4, 32))
    assert not model._forward_pre_hooks


@pytest.mark.model
def test_smollm2_has_induction_heads():
    import regard

    found = probe_heads(regard.load("smollm2"), length=32, batch=2)
    assert found["induction"].top(1)[0][1] > 0.6
    assert found["previous_token"].top(1)[0][1] > 0.6
