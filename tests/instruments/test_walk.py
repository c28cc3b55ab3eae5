"""Walks against hidden states that transformers gives and loops over tokens; context vectors against the model's own logits."""

from __future__ import annotations

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import regard
from regard._errors import InputError, ModelError
from regard.instruments.context_walk import context_vectors, context_walk, order_effect
from regard.instruments.walk import (
    Walk,
    WalkRecorder,
    arrival,
    embedding_walk,
    final_norm,
    measure_walk,
    nearest_tokens,
    principal_axes,
    record_walk,
)


class Letters:
    """A tokenizer of letters."""

    def __call__(self, text, return_tensors="pt", add_special_tokens=False):
        return {"input_ids": torch.tensor([[ord(c) - 96 for c in text]], dtype=torch.long)}

    def decode(self, ids):
        return "".join(chr(i + 96) for i in ids)


def build(name: str):
    torch.manual_seed(1)
    if name == "gpt2":
        config = GPT2Config(vocab_size=40, n_embd=32, n_layer=3, n_head=4, n_positions=32)
        model = GPT2LMHeadModel(config)
    else:
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=40,
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=3,
                num_attention_heads=4,
                num_key_value_heads=2,
            )
        )
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.tokenizer = Letters()
    return model.eval()


IDS = torch.randint(1, 27, (2, 7), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_states_are_those_of_the_model_and_the_parts_add_up(name):
    model = build(name)
    walk = record_walk(model, IDS)
    with torch.no_grad():
        hidden = model(IDS, output_hidden_states=True).hidden_states
    torch.testing.assert_close(walk.states[:-1], torch.stack(hidden[:-1]), rtol=0, atol=1e-5)
    # transformers gives the last one behind the final norm
    torch.testing.assert_close(final_norm(model)(walk.states[-1]), hidden[-1], rtol=0, atol=1e-5)
    assert walk.gap() < 1e-5
    assert Walk(walk.states, 1.1 * walk.attention, walk.mlp).gap() > 1e-3


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_last_nearest_token_is_the_model_s_forecast(name):
    model = build(name)
    walk = record_walk(model, IDS)
    nearest = nearest_tokens(walk, final_norm(model), model.get_output_embeddings())
    with torch.no_grad():
        assert torch.equal(nearest[-1], model(IDS).logits.argmax(-1))
    sites = arrival(nearest)
    for b in range(2):
        for t in range(7):
            row = nearest[:, b, t].tolist()
            assert int(sites[b, t]) == row.index(row[-1])


def test_measures_are_those_of_a_loop_over_tokens():
    walk = record_walk(build("llama"), IDS)
    found = measure_walk(walk)
    for b in range(2):
        for t in range(7):
            h = walk.states[:, b, t].double().numpy()
            lengths = [float(((h[i + 1] - h[i]) ** 2).sum() ** 0.5) for i in range(3)]
            whole = float(((h[3] - h[0]) ** 2).sum() ** 0.5)
            assert float(found.path[b, t]) == pytest.approx(sum(lengths), rel=1e-5)
            assert float(found.tortuosity[b, t]) == pytest.approx(sum(lengths) / whole, rel=1e-5)
            turn = ((h[2] - h[1]) @ (h[1] - h[0])) / (lengths[0] * lengths[1])
            assert float(found.turning[0, b, t]) == pytest.approx(turn, abs=1e-5)
            step = walk.mlp[1, b, t].double().numpy()
            heading = step @ (h[3] - h[0]) / (whole * (step @ step) ** 0.5)
            assert float(found.mlp_heading[1, b, t]) == pytest.approx(heading, abs=1e-5)
    lengths = walk.attention[0, :, 1:].norm(dim=-1), walk.mlp[0, :, 1:].norm(dim=-1)
    share = (lengths[0] / (lengths[0] + lengths[1])).mean()
    torch.testing.assert_close(found.attention_share(1)[0], share)
    assert bool((found.tortuosity >= 1 - 1e-6).all())


def test_a_straight_walk_has_a_tortuosity_of_one():
    along = torch.arange(4.0)[:, None, None, None] * torch.ones(1, 1, 1, 8)
    half = torch.full((3, 1, 1, 8), 0.5)
    found = measure_walk(Walk(along, half, half))
    assert float(found.tortuosity) == pytest.approx(1)
    torch.testing.assert_close(found.turning, torch.ones(2, 1, 1))


def test_what_is_no_walk_is_refused():
    with pytest.raises(InputError, match="one forward pass"):
        WalkRecorder().walk()
    recorder, model = WalkRecorder(), build("llama")
    with torch.no_grad(), regard.attach(model, recorder):
        model(IDS)
        model(IDS)
    with pytest.raises(InputError, match="one forward pass"):
        recorder.walk()
    with pytest.raises(ModelError, match="final norm"):
        final_norm(torch.nn.Linear(2, 2))


def test_principal_axes_keep_distances_of_points_in_a_plane():
    points = torch.randn(9, 2, dtype=torch.float64) @ torch.randn(2, 12, dtype=torch.float64)
    flat = principal_axes(points)
    torch.testing.assert_close(torch.cdist(flat, flat), torch.cdist(points, points))
    assert float(flat[:, 0].var()) >= float(flat[:, 1].var())


def test_a_text_s_walk_reads_shows_and_refuses():
    model = build("llama")
    found = embedding_walk(model, "walker")
    assert found.tokens == list("walker") and len(found.nearest) == 4
    with torch.no_grad():
        last = model(model.tokenizer("walker")["input_ids"]).logits[0, -1].argmax()
    assert found.nearest[-1][-1] == Letters().decode([int(last)])
    assert "times as long" in found.sentence()
    frame = found.to_frame()
    assert frame.height == 24 and frame["norm"].min() > 0
    with pytest.raises(InputError, match="two tokens"):
        embedding_walk(model, "w").sentence()
    with pytest.raises(InputError, match="at least one token"):
        embedding_walk(model, "")
    pytest.importorskip("matplotlib")
    assert len(found.plot([1, 5]).get_legend().get_texts()) == 2
    with pytest.raises(InputError, match="places from 0 to 5"):
        found.plot([6])


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_path_s_likelihood_is_minus_the_loss(name):
    model = build(name)
    found = context_walk(model, IDS)
    with torch.no_grad():
        loss = model(IDS, labels=IDS).loss
        context = context_vectors(model, IDS)
        torch.testing.assert_close(model.get_output_embeddings()(context), model(IDS).logits)
    torch.testing.assert_close(-found.log_probability.mean(), loss, rtol=0, atol=1e-5)
    weight = model.get_output_embeddings().weight.detach()
    for b, t in ((0, 0), (1, 4)):
        c, u = context[b, t], weight[IDS[b, t + 1]]
        assert float(found.cosine[b, t]) == pytest.approx(
            float(c @ u / c.norm() / u.norm()), abs=1e-5
        )
        jump = float((context[b, t + 1] - c).norm())
        assert float(found.jump[b, t]) == pytest.approx(jump, rel=1e-5)


def test_order_matters_to_a_context_vector_but_not_the_order_as_it_is():
    model = build("llama")
    assert float(order_effect(model, IDS, torch.arange(7)).max()) == 0
    assert float(order_effect(model, IDS, torch.tensor([3, 1, 2, 0, 5, 4, 6])).min()) > 1e-3
    for order in ([1, 2, 3, 4, 5, 6, 0], [0, 0, 2, 3, 4, 5, 6]):
        with pytest.raises(InputError, match="keeps the last token last"):
            order_effect(model, IDS, torch.tensor(order))
