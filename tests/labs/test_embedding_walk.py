"""Aggregations against loops, attention without association against sums of values, theory against simulation and quadrature."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.stats import norm as normal
from torch.nn.functional import log_softmax, softmax
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import regard
from regard._errors import InputError
from regard.engine import AttentionCall, Pipeline, attend
from regard.labs import embedding_walk as lab
from regard.labs.embedding_walk import EmbeddingWalk
from regard.nn import LanguageModel, LanguageModelConfig

SMALL = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def tiny(name: str = "llama"):
    torch.manual_seed(0)
    if name == "gpt2":
        config = GPT2Config(vocab_size=40, n_embd=32, n_layer=2, n_head=4, n_positions=32)
        model = GPT2LMHeadModel(config)
    else:
        model = LlamaForCausalLM(LlamaConfig(**SMALL, intermediate_size=48))
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def random_call(heads: int = 2, tokens: int = 6, width: int = 4, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, 1, heads, tokens, width, generator=generator).unbind()


# attention without association


def test_uniform_weights_give_the_running_mean_of_values():
    query, key, value = random_call()
    found = attend(AttentionCall.make(query, key, value), Pipeline([lab.UniformWeights()]))
    means = value.cumsum(2) / torch.arange(1, 7)[:, None]
    torch.testing.assert_close(found.view_as(means), means)


def test_self_weights_give_the_values_and_a_mixture_is_between():
    query, key, value = random_call()
    run = lambda *methods: attend(AttentionCall.make(query, key, value), Pipeline(list(methods)))  # noqa: E731
    torch.testing.assert_close(run(lab.SelfWeights()).view_as(value), value)
    mixed = run(lab.UniformWeights(mix=0.3))
    torch.testing.assert_close(mixed, 0.7 * run() + 0.3 * run(lab.UniformWeights()))


def test_only_the_chosen_layers_change():
    model = LanguageModel(LanguageModelConfig(hidden_size=16, num_hidden_layers=2)).eval()
    ids = torch.arange(8)[None]
    clean = regard.instruments.record_walk(model, ids)
    recorder = regard.instruments.WalkRecorder()
    with torch.no_grad(), regard.attach(model, lab.UniformWeights(layers=[1]), recorder):
        model(ids)
    walk = recorder.walk()
    # weights that are read are computed by another kernel, equal up to rounding
    torch.testing.assert_close(walk.attention[0], clean.attention[0], rtol=0, atol=1e-6)
    assert float((walk.attention[1] - clean.attention[1]).abs().max()) > 1e-2


def test_the_mean_by_distance_is_that_of_a_loop():
    model = tiny()
    model.set_attn_implementation("eager")
    ids = torch.randint(1, 40, (3, 5), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        maps = model(ids, output_attentions=True).attentions
    tables = lab.mean_by_distance(model, ids)
    for layer, weights in enumerate(maps):
        for head in range(4):
            for far in range(5):
                seen = [
                    float(weights[b, head, t, t - far]) for b in range(3) for t in range(far, 5)
                ]
                assert float(tables[layer][head, far]) == pytest.approx(np.mean(seen), abs=1e-6)


def test_distance_weights_look_up_the_table_and_sum_to_one():
    query, key, value = random_call(heads=1, tokens=3)
    call = AttentionCall.make(query, key, value)
    table = torch.tensor([[0.5, 0.3, 0.1]])
    found = attend(call, Pipeline([lab.DistanceWeights({call.site.layer: table})]))
    rows = [[1, 0, 0], [0.3 / 0.8, 0.5 / 0.8, 0], [0.1 / 0.9, 0.3 / 0.9, 0.5 / 0.9]]
    torch.testing.assert_close(found.view_as(value)[0, 0], torch.tensor(rows) @ value[0, 0])
    short = lab.DistanceWeights({call.site.layer: table[:, :2]})
    with pytest.raises(InputError, match="at most 2"):
        attend(call, Pipeline([short]))


# vectors as sums of concepts


@given(seed=st.integers(0, 10**6), drop=st.booleans(), norm=st.sampled_from(["none", "L2", "z", "variance"]))  # fmt: skip
@settings(max_examples=25, deadline=None)
def test_aggregates_are_those_of_a_loop(seed, drop, norm):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 6, (3,), generator=generator).tolist()
    states = torch.randn(3, 5, 4, dtype=torch.float64, generator=generator)
    valid = torch.arange(5) < torch.tensor(lengths)[:, None]
    norms = {
        "none": lambda v: v,
        "L2": lambda v: v / np.sqrt((v**2).sum()),
        "z": lambda v: (v - v.mean()) / np.sqrt(v.var() + 1e-5),
        "variance": lambda v: v / v.std(ddof=1),
    }
    for words in ("mean", "w1mean", "last"):
        found = lab.aggregate(states, valid, words, norm=norm, drop_first=drop)
        for b, n in enumerate(lengths):
            h = states[b, :n].numpy()
            weights = np.arange(1.0, n + 1) if words == "w1mean" else np.ones(n)
            if drop and n > 1:
                weights[0] = 0
            wanted = norms[norm]((weights[:, None] * h).sum(0) / weights.sum())
            wanted = h[-1] if words == "last" else wanted
            np.testing.assert_allclose(found[b, 0].numpy(), wanted, atol=1e-12)


@pytest.mark.parametrize("kind", ["identity", "act", "-act", "h + act", "h - act"])
def test_activations_follow_their_definitions(kind):
    h = torch.linspace(-3, 3, 13, dtype=torch.float64)
    act = lambda x: x * torch.sigmoid(x)  # noqa: E731
    wanted = {
        "identity": h,
        "act": act(h),
        "-act": -act(-h),
        "h + act": h + act(h),
        "h - act": h - act(-h),
    }
    torch.testing.assert_close(lab.activated(h, kind), wanted[kind])


def test_choices_take_the_largest_product_and_padding_never_counts():
    context = torch.tensor([[[-1.0, 0.0], [0.0, -2.0], [0.0, 0.0]]])
    choices = torch.tensor([[[1.0, 0.5], [3.0, 3.0]]])
    valid = torch.tensor([[True, True, False]])
    assert lab.choose(context, choices, valid).tolist() == [[-1.0, -3.0]]
    assert lab.choose(context, choices).tolist() == [[0.0, 0.0]]
    found = lab.soft_cluster(choices, context, valid)
    for c in range(2):
        q, m = choices[0, c].double().numpy(), context[0, :2].double().numpy()
        weights = np.exp(m @ q) / np.exp(m @ q).sum()
        np.testing.assert_allclose(found[0, c].numpy(), weights @ m, atol=1e-6)


def test_which_tokens_count():
    valid = torch.tensor([[True, True, False], [True, False, False]])
    assert torch.equal(lab.counted(valid, False), valid)
    assert lab.counted(valid, True).tolist() == [[False, True, False], [True, False, False]]


def test_the_decoder_without_parameters_is_that_of_a_loop():
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(2, 5, 4, dtype=torch.float64, generator=generator)
    output = torch.randn(7, 4, dtype=torch.float64, generator=generator)
    found = lab.parameterless_logits(inputs, output)
    for b in range(2):
        for t in range(5):
            weights = softmax(inputs[b, : t + 1] @ inputs[b, t], -1)
            torch.testing.assert_close(found[b, t], output @ (weights @ inputs[b, : t + 1]))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_prefix_scores_are_those_of_whole_sequences_one_by_one(name):
    model = tiny(name)
    generator = torch.Generator().manual_seed(1)
    prefix = torch.randn(2, 3, 32, generator=generator)
    lengths = [3, 2]
    valid = torch.arange(3) < torch.tensor(lengths)[:, None]
    choices = [[[4, 5, 6], [7]], [[8, 9], [1, 2, 3]]]
    ids, seen = torch.zeros(2, 2, 3, dtype=torch.long), torch.zeros(2, 2, 3, dtype=torch.bool)
    for b in range(2):
        for c in range(2):
            ids[b, c, : len(choices[b][c])] = torch.tensor(choices[b][c])
            seen[b, c, : len(choices[b][c])] = True
    found = lab.prefix_scores(model, prefix, valid, ids, seen)
    embed = model.get_input_embeddings()
    for b in range(2):
        for c, tokens in enumerate(choices[b]):
            front, words = prefix[b, : lengths[b]], torch.tensor(tokens)
            with torch.no_grad():
                whole = torch.cat([front, embed(words)])[None]
                odds = log_softmax(model(inputs_embeds=whole).logits[0], -1)
            wanted = sum(float(odds[lengths[b] - 1 + i, w]) for i, w in enumerate(tokens))
            assert float(found[b, c]) == pytest.approx(wanted, abs=1e-4)


def test_layer_states_are_those_of_each_text_by_itself():
    model, texts = tiny(), [[3, 4, 5], [6], [7, 8]]
    states, valid = lab.layer_states(model, texts, [0, 1, -1], batch=2)
    assert valid.sum(1).tolist() == [3, 1, 2]
    for row, text in enumerate(texts):
        with torch.no_grad():
            hidden = model(torch.tensor([text]), output_hidden_states=True).hidden_states
        for place, layer in enumerate((0, 1, -1)):
            found = states[place, row, : len(text)]
            torch.testing.assert_close(found, hidden[layer][0], rtol=0, atol=1e-5)
    assert not states[:, ~valid].any()
    with pytest.raises(InputError, match="one or more lists"):
        lab.padded([[1], []])


# theory


@given(signal=st.floats(0, 5), choices=st.integers(2, 8))
@settings(max_examples=20, deadline=None)
def test_the_share_of_right_choices_is_the_integral(signal, choices):
    wanted, _ = quad(
        lambda z: normal.pdf(z) * normal.cdf(z + signal) ** (choices - 1), -12, 12, epsabs=1e-10
    )
    found = lab.choice_accuracy(np.array([signal]), choices)
    assert found == pytest.approx(wanted, abs=1e-6)


def test_no_signal_is_chance():
    assert lab.choice_accuracy(np.zeros(3), 5) == pytest.approx(0.2)


@pytest.mark.parametrize("sink", [0.0, 5.0])
def test_the_signal_is_the_gap_of_scores_over_their_deviation(sink):
    rng, d, k, n = np.random.default_rng(0), 256, 3, 6
    weights = lab.rising_weights(n) if sink == 0 else np.full(n, 1 / n)
    words = rng.standard_normal((4000, n, d)) / math.sqrt(d)
    front = np.zeros(d)
    front[0] = sink
    context = np.einsum("n,bnd->bd", weights, words) + weights.mean() * front
    wrong = (rng.standard_normal((4000, k, d)) / math.sqrt(d)).mean(1)
    others = (rng.standard_normal((4000, k - 1, d)) / math.sqrt(d)).sum(1)
    for place in (0, n - 1):
        right = (others + words[:, place]) / k
        gap = np.einsum("bd,bd->b", context, right).mean()
        spread = np.einsum("bd,bd->b", context, wrong).std()
        theory = lab.superposition_signal(weights, d, k, sink=sink)[place]
        assert gap / spread == pytest.approx(theory, abs=0.08)


def test_unrelated_steps_end_where_independent_draws_end():
    rng = np.random.default_rng(1)
    lengths = np.array([1.0, 3.0, 2.0, 0.5])
    steps = rng.standard_normal((4000, 4, 64))
    steps *= lengths[:, None] / np.linalg.norm(steps, axis=-1, keepdims=True)
    measured = np.sqrt((np.linalg.norm(steps.cumsum(1), axis=-1) ** 2).mean(0))
    np.testing.assert_allclose(lab.unrelated_displacement(lengths), measured, rtol=0.02)
    assert float(lab.unrelated_tortuosity(lengths)) == pytest.approx(6.5 / math.sqrt(14.25))


def test_the_best_forecast_from_counts_is_the_posterior_mean():
    rng = np.random.default_rng(2)
    counts, total = np.array([3, 0, 1]), 300_000
    odds = rng.dirichlet(np.ones(3), total)
    likelihood = (odds**counts).prod(1)
    posterior = (odds * likelihood[:, None]).sum(0) / likelihood.sum()
    nats = lab.bag_nats(np.tile(counts, (3, 1)), np.arange(3))
    np.testing.assert_allclose(np.exp(-nats), posterior, rtol=0.01)


# the experiment


def test_samples_of_lookups_ask_for_the_value_of_a_shown_pair():
    task = lab.lookups()
    samples = task.draw(50, 0)
    assert bool((samples.labels[:, :-1] == -100).all())
    for row in samples.ids.tolist():
        pairs = {token // 8: token % 8 for token in row[:5]}
        assert len(pairs) == 5 and pairs[row[5] - 64] == row[6] - 72


def test_settings_that_cannot_work_are_refused():
    with pytest.raises(InputError, match="even parts"):
        EmbeddingWalk(width=48, heads=16)
    with pytest.raises(InputError, match="trials must be"):
        EmbeddingWalk(trials=1)


def test_a_small_run_measures_everything_and_meets_what_needs_no_training():
    result = EmbeddingWalk(steps=2, samples=16, trials=1500, seeds=3).run()
    for name in ("sum", "unrelated", "mean", "w1mean", "sink"):
        assert result.checks[name].holds is True, str(result)
    # two steps teach nothing, so what depends on learning stays open
    assert result.checks["counts"].holds is False
    assert result.checks["bags"].holds is None and result.checks["lookups"].holds is None
    assert {"walk", "mean", "w1mean", "sink", "bags", "lookups"} == set(result.series)
