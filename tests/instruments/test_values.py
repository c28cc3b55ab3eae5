"""Value drains against norms read off the model's own projections, in float64."""

from __future__ import annotations

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import regard
from regard.engine import AttentionCall, Method
from regard.instruments.values import ValueDrain, first_and_rest


def llama(**rest):
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, **rest,
    )  # fmt: skip
    return LlamaForCausalLM(config).double().eval()


def gpt2():
    torch.manual_seed(2)
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    return GPT2LMHeadModel(config).double().eval()


class Seen(Method):
    """The keys and values of every call, as the model hands them over."""

    def __init__(self):
        self.calls = []

    def after(self, call: AttentionCall) -> None:
        self.calls.append((call.key.clone(), call.value.clone()))


def observe(model, ids, mask=None, instrument=None):
    drain = instrument or ValueDrain()
    with torch.no_grad(), regard.attach(model, drain):
        model(input_ids=ids, attention_mask=mask)
    return drain


@pytest.mark.parametrize("build", [llama, gpt2])
def test_drain_is_the_ratio_of_norms_of_the_heads_own_values(build):
    model, ids = build(), torch.randint(64, (3, 9))
    seen = Seen()
    with torch.no_grad(), regard.attach(model, seen):
        model(input_ids=ids)
    result = observe(model, ids).compute()
    for layer, (key, value) in enumerate(seen.calls):
        group = 4 // value.shape[1]
        for name, vectors in (("value drain", value), ("key norm ratio", key)):
            norms = vectors.norm(dim=-1).repeat_interleave(group, 1)
            expected = (norms[..., 0] / norms[..., 1:].mean(-1)).mean(0)
            torch.testing.assert_close(
                result[name].values["", layer].double(), expected, rtol=1e-6, atol=0
            )
        norms = value.norm(dim=-1).repeat_interleave(group, 1)
        torch.testing.assert_close(
            result["other value norm"].values["", layer].double(),
            norms[..., 1:].mean((0, 2)),
            rtol=1e-6,
            atol=0,
        )


def test_values_are_those_of_the_projection():
    """Not of the engine's bookkeeping: recomputed from the hidden states of layer 0."""
    model, ids = llama(), torch.randint(64, (1, 7))
    block = model.model.layers[0]
    value = block.self_attn.v_proj(block.input_layernorm(model.model.embed_tokens(ids)))
    norms = value.view(7, 2, 8).norm(dim=-1)
    expected = (norms[0] / norms[1:].mean(0)).repeat_interleave(2)
    found = observe(model, ids).compute()["value drain"].values["", 0]
    torch.testing.assert_close(found.double(), expected.detach(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_gives_what_its_rows_give_alone(side):
    model = llama()
    rows = [torch.randint(64, (n,)) for n in (9, 5)]
    ids, mask = torch.zeros(2, 9, dtype=torch.long), torch.zeros(2, 9, dtype=torch.long)
    for i, row in enumerate(rows):
        where = slice(9 - len(row), 9) if side == "left" else slice(0, len(row))
        ids[i, where], mask[i, where] = row, 1
    alone = ValueDrain()
    for row in rows:
        observe(model, row[None], instrument=alone)
    together = observe(model, ids, mask)
    for name, measure in alone.compute().items():
        torch.testing.assert_close(
            together.compute()[name].matrix(), measure.matrix(), rtol=1e-5, atol=1e-6
        )


def test_batches_add_up_and_instruments_merge():
    model, ids = llama(), torch.randint(64, (4, 8))
    whole, parts = observe(model, ids), observe(model, ids[:1])
    parts.merge(observe(model, ids[1:]))
    torch.testing.assert_close(
        whole.compute()["value drain"].matrix(), parts.compute()["value drain"].matrix()
    )


def test_decode_steps_and_single_tokens_are_left_out():
    model, ids = llama(), torch.randint(64, (1, 8))
    plain = observe(model, ids).compute()["value drain"].matrix()
    drain = ValueDrain()
    with torch.no_grad(), regard.attach(model, drain):
        model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(drain.compute()["value drain"].matrix(), plain)
    assert observe(model, ids[:, :1]).compute()["value drain"].matrix().isnan().all()


def test_first_and_rest_without_another_token():
    first, rest, both = first_and_rest(torch.ones(1, 2, 3), torch.tensor([[False, False, True]]))
    assert (
        first.tolist() == [[1.0, 1.0]]
        and rest.tolist() == [[0.0, 0.0]]
        and both.tolist() == [False]
    )
