"""Writers: the parts sum to what a block adds, recomputed from the model's own weights in float64."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    BertConfig,
    BertModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import regard
from regard import texts
from regard._errors import AttachError, InputError
from regard.coordinates import Head, Neuron
from regard.instruments.writers import Writers, matrix, writers

SIZE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
GROUPED = {**SIZE, "num_key_value_heads": 2, "max_position_embeddings": 64}
OPT = {
    **SIZE,
    "ffn_dim": 48,
    "max_position_embeddings": 64,
    "word_embed_proj_dim": 32,
    "dropout": 0.0,
}


def build(name):
    torch.manual_seed(3)
    model = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**GROUPED, attention_bias=True, mlp_bias=True)),
        "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=3, n_head=4, n_positions=64)),
        "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**GROUPED, head_dim=8, sliding_window=4, pad_token_id=0)),
        "olmo2": lambda: Olmo2ForCausalLM(Olmo2Config(**GROUPED, pad_token_id=0)),
        "opt": lambda: OPTForCausalLM(OPTConfig(**OPT)),
    }[name]()  # fmt: skip
    for (
        parameter
    ) in model.parameters():  # biases and gains start at 0 and 1, where they could hide an error
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.double().eval()


FAMILIES = ["llama", "gpt2", "gemma2", "olmo2", "opt"]


def follow(model, ids, mask=None, instrument=None, token=0):
    found = instrument or Writers(token)
    with torch.no_grad(), regard.attach(model, found):
        model(input_ids=ids, attention_mask=mask)
    return found


@pytest.mark.parametrize("token", [0, 4])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_parts_sum_to_what_each_block_adds(name, token):
    model, ids = build(name), torch.randint(1, 64, (2, 7))
    with torch.no_grad():
        hidden = model(input_ids=ids, output_hidden_states=True).hidden_states
    for dimension in (0, 17):
        found = follow(model, ids, token=token).compute(dimension)[""]
        stream = torch.stack([h[:, token, dimension].mean() for h in hidden])
        assert abs(found.embedding - float(stream[0])) < 1e-5
        torch.testing.assert_close(found.stream[:-1].double(), stream[1:-1], rtol=0, atol=1e-5)
        steps = found.stream - torch.cat([torch.tensor([found.embedding]), found.stream[:-1]])
        torch.testing.assert_close(found.attention + found.mlp, steps, rtol=0, atol=1e-5)
        total = found.embedding + float(found.attention.sum() + found.mlp.sum())
        assert abs(total - float(found.stream[-1])) < 1e-5


def direct(model, ids, token, layer, dimension):
    """Head and neuron contributions with plain forward hooks on the projections; mean over the batch."""
    modules = dict(model.named_modules())
    prefix = {"llama": "model.layers"}["llama"]
    out, down = (
        modules[f"{prefix}.{layer}.self_attn.o_proj"],
        modules[f"{prefix}.{layer}.mlp.down_proj"],
    )
    seen = {}
    hooks = [
        m.register_forward_pre_hook(lambda _, a, n=n: seen.update({n: a[0]}))
        for n, m in (("o", out), ("d", down))
    ]
    with torch.no_grad():
        model(input_ids=ids)
    for hook in hooks:
        hook.remove()
    heads = (seen["o"][:, token] * out.weight[dimension]).view(len(ids), 4, 8).sum(-1).mean(0)
    neurons = (seen["d"][:, token] * down.weight[dimension]).mean(0)
    return heads.detach(), neurons.detach(), out.bias[dimension].item(), down.bias[dimension].item()


def test_heads_and_neurons_are_slices_of_the_projections():
    model, ids = build("llama"), torch.randint(64, (3, 7))
    found = follow(model, ids, token=2).compute(9)[""]
    for layer in range(3):
        heads, neurons, head_bias, mlp_bias = direct(model, ids, 2, layer, 9)
        torch.testing.assert_close(found.heads[layer].double(), heads, rtol=0, atol=1e-6)
        torch.testing.assert_close(found.neurons[layer].double(), neurons, rtol=0, atol=1e-6)
        assert (
            abs(float(found.heads[layer].sum()) + head_bias - float(found.attention[layer])) < 1e-5
        )
        assert abs(float(found.neurons[layer].sum()) + mlp_bias - float(found.mlp[layer])) < 1e-5


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_biased_and_transposed_projections_sum_too(name):
    model, ids = build(name), torch.randint(1, 64, (2, 7))
    writer = follow(model, ids, token=3)
    found = writer.compute(5)[""]
    for layer in range(3):
        block = writer._blocks["", layer]
        biases = [float(matrix(m)[1][5]) for m in (block.output_projection, block.down_projection)]
        assert (
            abs(float(found.heads[layer].sum()) + biases[0] - float(found.attention[layer])) < 1e-5
        )
        assert abs(float(found.neurons[layer].sum()) + biases[1] - float(found.mlp[layer])) < 1e-5


@pytest.mark.parametrize("name", ["gemma2", "olmo2"])
def test_a_norm_behind_the_projection_keeps_the_sum(name):
    model, ids = build(name), torch.randint(1, 64, (2, 7))
    found = follow(model, ids, token=5).compute(21)[""]
    torch.testing.assert_close(found.heads.sum(-1), found.attention, rtol=0, atol=1e-5)
    for layer in range(3):
        assert abs(float(found.neurons[layer].sum()) - float(found.mlp[layer])) < 1e-5


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_gives_what_its_rows_give_alone(side):
    model = build("llama")
    rows = [torch.randint(64, (n,)) for n in (9, 5, 2)]
    ids, mask = torch.zeros(3, 9, dtype=torch.long), torch.zeros(3, 9, dtype=torch.long)
    for i, row in enumerate(rows):
        where = slice(9 - len(row), 9) if side == "left" else slice(0, len(row))
        ids[i, where], mask[i, where] = row, 1
    alone = Writers(3)
    for row in rows:  # the last row has no token 3 and counts nowhere
        follow(model, row[None], instrument=alone)
    a, b = alone.compute(4)[""], follow(model, ids, mask, token=3).compute(4)[""]
    for name in ("stream", "attention", "mlp", "heads"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=0, atol=1e-5)
    assert float(alone.state["embed.count"]["", 0]) == 2


def test_batches_add_up_and_instruments_merge():
    model, ids = build("llama"), torch.randint(64, (4, 6))
    whole, part = follow(model, ids), follow(model, ids[:3])
    part.merge(follow(model, ids[3:]))
    torch.testing.assert_close(whole.compute(1)[""].heads, part.compute(1)[""].heads)


def test_a_planted_neuron_is_found_by_name():
    model, ids = build("llama"), torch.randint(64, (1, 8))
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[11, 40] = 1e5
        model.model.layers[2].self_attn.o_proj.weight[11, 16:24] = 3e3
    found = writers(model, ids)
    assert found.dimension == 11
    first = max(found.parts(), key=lambda w: abs(w.amount) if w.layer == 1 else 0)
    assert first.site == Neuron(1, 40)
    second = max(
        (w for w in found.parts() if isinstance(w.site, Head)), key=lambda w: abs(w.amount)
    )
    assert second.site == Head(2, 2)
    assert all(w.share > 0 for w in found.writers()) and all(w.share < 0 for w in found.erasers())
    assert {str(w.site) for w in found.sublayers()} >= {"embedding", "L1.mlp", "L2.attention"}
    frame = found.to_frame()
    assert set(frame["kind"]) == {"sub-layer", "head", "neuron"}
    assert abs(
        sum(w.share for w in found.sublayers()) * found.peak - float(found.stream[-1])
    ) < 1e-3 * abs(found.peak)
    assert found.plot().get_xlabel() == "layer"


def test_decode_steps_are_left_out():
    model, ids = build("llama"), torch.randint(64, (1, 8))
    writer = Writers()
    with torch.no_grad(), regard.attach(model, writer):
        model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    torch.testing.assert_close(
        writer.compute(3)[""].stream, follow(model, ids).compute(3)[""].stream
    )


@pytest.mark.parametrize("spread", [0.02, 0.5])
def test_where_blocks_do_not_add_it_is_refused(spread):
    torch.manual_seed(0)
    model = BertModel(
        BertConfig(**SIZE, initializer_range=spread)
    ).eval()  # a norm after every addition
    with pytest.raises(AttachError, match="is not its input plus its attention and MLP writes"):
        follow(model, torch.randint(64, (1, 6))).compute()


def test_cross_attention_is_a_sublayer_of_its_own():
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=64,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
    )
    model, writer = T5ForConditionalGeneration(config).double().eval(), Writers(2)
    ids = torch.randint(1, 64, (2, 7))
    with torch.no_grad(), regard.attach(model, writer):
        model(input_ids=ids, decoder_input_ids=ids[:, :5])
    found = writer.compute(6)
    assert set(found) == {"encoder", ""}
    for stack, writing in found.items():
        steps = writing.stream - torch.cat([torch.tensor([writing.embedding]), writing.stream[:-1]])
        total = writing.attention + writing.cross + writing.mlp
        torch.testing.assert_close(total, steps, rtol=0, atol=1e-5)
        torch.testing.assert_close(writing.heads.sum(-1), writing.attention, rtol=0, atol=1e-5)
        assert bool(writing.cross.any()) == (stack == "")
        assert sum("cross" in str(w.site) for w in writing.sublayers()) == (2 if stack == "" else 0)


def test_heads_that_do_not_sum_are_not_reported():
    """A model whose attention changes its head outputs behind the engine's back gives NaN, not wrong numbers."""
    model = build("llama")
    projection = model.model.layers[1].self_attn.o_proj
    handle = projection.register_forward_pre_hook(lambda _, args: (args[0] * 1.5,))
    found = follow(model, torch.randint(64, (1, 6))).compute(2)[""]
    handle.remove()
    assert found.heads[1].isnan().all() and torch.isfinite(found.heads[[0, 2]]).all()


def test_errors_say_what_to_do():
    with pytest.raises(InputError, match="no sequence with a token 0"):
        Writers().compute()
    with pytest.raises(InputError, match="token must be a position"):
        Writers(-1)
    with pytest.raises(InputError, match="dimension must be from 0 to 31, got 99"):
        follow(build("llama"), torch.randint(64, (1, 4))).compute(99)


@pytest.mark.model
def test_smollm2_has_one_writer_and_one_eraser():
    model = regard.load("smollm2")
    ids = model.tokenizer(texts.prose(600), return_tensors="pt").input_ids[:, :96]
    found = writers(model, ids)
    assert (found.token, found.dimension) == (0, 507) and found.peak > 10_000
    first, second = found.writers(2)
    assert {first.site, second.site} == {Neuron(11, 1229), Neuron(11, 1487)}
    assert first.share + second.share > 0.95
    assert found.erasers(1)[0].site == Neuron(28, 678) and found.erasers(1)[0].share < -0.3
    assert found.writers(1, sublayers=True)[0].site == "L11.mlp"
