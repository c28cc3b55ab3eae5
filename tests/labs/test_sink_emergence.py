"""Models side by side against one Llama at a time, operations against loops, and predictions on made-up courses."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from regard._errors import InputError
from regard.labs import sink_emergence as lab
from regard.labs.sink_emergence import Arm, Models, Recipe, SinkEmergence, Size

SMALL = Size(layers=2, heads=2, width=16, hidden=24)
DEFAULT, FAST = Arm("default"), Arm("fast", "optimiser", rate=2.0)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def some_rows(*shape: int, seed: int = 0) -> torch.Tensor:
    scores = 3 * torch.randn(*shape, generator=generator(seed), dtype=torch.float64)
    return scores.masked_fill(~lab.causal_mask(shape[-1]), -torch.inf).softmax(-1)


def causal(runs: int, length: int) -> torch.Tensor:
    return lab.causal_mask(length).expand(runs, -1, -1)


# the metric


@given(seed=st.integers(0, 10**6), length=st.integers(1, 9))
@settings(max_examples=30, deadline=None)
def test_importance_is_the_column_mean_over_the_rows_that_see_the_key(seed, length):
    rows = some_rows(2, length, length, seed=seed)
    found = lab.token_importance(rows)
    for k in range(length):
        expected = sum(rows[:, i, k] for i in range(k, length)) / (length - k)
        torch.testing.assert_close(found[:, k], expected)
    divided = rows.sum(-2) / torch.arange(length, 0, -1)
    torch.testing.assert_close(found, divided)


def test_importance_in_a_window_counts_only_rows_that_still_see_the_key():
    visible = lab.window_mask(6, 3)
    rows = torch.rand(6, 6, generator=generator()) * visible
    found = lab.token_importance(rows, visible)
    for k in range(6):
        seen = [float(rows[i, k]) for i in range(k, min(k + 3, 6))]
        assert float(found[k]) == pytest.approx(sum(seen) / len(seen))
    oldest = [float(rows[i, i - 2]) for i in range(3, 6)]
    assert float(lab.relative_importance(rows, 3)) == pytest.approx(sum(oldest) / len(oldest))


def test_even_attention_has_the_importance_of_the_formula():
    even = lab.causal_mask(64) / torch.arange(1, 65)[:, None]
    np.testing.assert_allclose(lab.even_importance(64), lab.token_importance(even), rtol=1e-5)
    assert lab.even_importance(64)[0] == pytest.approx(sum(1 / i for i in range(1, 65)) / 64)


def test_the_sink_rate_is_strict_and_counts_heads_not_means():
    importance = torch.tensor([[0.3, 0.31], [0.9, 0.0]])
    assert float(lab.sink_rate(importance)) == 50
    assert float(lab.sink_rate(importance.mean(0), eps=0.3)) == 50
    assert float(lab.sink_rate(importance.mean(1), eps=0.3)) == 100


def test_masks_show_what_they_say():
    for length, p, w in ((6, 3, 2), (5, 5, 5), (4, 1, 1)):
        prefix, window = lab.prefix_mask(length, p), lab.window_mask(length, w)
        for i in range(length):
            for j in range(length):
                assert bool(prefix[i, j]) == (j <= i or (i < p and j < p))
                assert bool(window[i, j]) == (i - w < j <= i)


# operations


def reference(name: str, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Weights of one head by the table, entry by entry."""
    length, size = q.shape
    elu = lambda x: x if x > 0 else math.exp(x) - 1  # noqa: E731
    found = torch.zeros(length, length, dtype=torch.float64)
    for i in range(length):
        for j in range(i + 1):
            z = sum(float(a * b) for a, b in zip(q[i], k[j], strict=True)) / math.sqrt(size)
            if name.startswith("kernel-elu"):
                pairs = zip(q[i].tolist(), k[j].tolist(), strict=True)
                s = sum((elu(a) + 1) * (elu(b) + 1) for a, b in pairs) / math.sqrt(size)
            elif name.startswith("kernel-identity"):
                s = z
            elif name.startswith("sigmoid"):
                s = 1 / (1 + math.exp(-z))
            elif name.startswith("elu1"):
                s = elu(z) + 1
            else:
                s = math.exp(z)
            found[i, j] = s
        total = float(found[i].sum())
        if name == "softmax":
            found[i] /= total
        elif name == "kernel-identity-normalised":
            found[i] /= max(abs(total), 1)
        elif name.endswith("normalised"):
            found[i] /= total + 1e-8
    return found


@pytest.mark.parametrize("name", lab.OPERATIONS)
def test_an_operation_is_what_the_table_says(name):
    q, k = 1.5 * torch.randn(2, 7, 4, dtype=torch.float64, generator=generator(3))
    found = lab.attention_weights(q, k, lab.causal_mask(7), lab.OPERATIONS[name])
    torch.testing.assert_close(found, reference(name, q, k))
    assert not found.triu(1).any()


def test_the_identity_kernel_without_normalisation_is_masked_linear_attention():
    q, k, v = torch.randn(3, 5, 4, dtype=torch.float64, generator=generator(4))
    found = lab.attention_weights(q, k, lab.causal_mask(5), lab.OPERATIONS["kernel-identity"]) @ v
    state, expected = torch.zeros(4, 4, dtype=torch.float64), []
    for i in range(5):
        state = state + torch.outer(k[i], v[i])
        expected.append(q[i] @ state / 2)
    torch.testing.assert_close(found, torch.stack(expected))


def test_proxies_sum_to_one_and_do_not_depend_on_normalisation():
    q, k = torch.randn(2, 9, 4, dtype=torch.float64, generator=generator(5))
    for raw in ("sigmoid", "elu1", "kernel-elu", "kernel-identity"):
        one, two = (
            lab.proxy_weights(lab.attention_weights(q, k, lab.causal_mask(9), lab.OPERATIONS[name]))
            for name in (raw, f"{raw}-normalised")
        )
        torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(
            one.sum(-1), torch.ones(9, dtype=torch.float64), atol=1e-4, rtol=0
        )
        assert bool((one >= 0).all())
    soft = lab.attention_weights(q, k, lab.causal_mask(9), lab.OPERATIONS["softmax"])
    torch.testing.assert_close(lab.proxy_weights(soft), soft, atol=1e-7, rtol=1e-7)


# models


def llama(models: Models, run: int) -> LlamaForCausalLM:
    """The same model in transformers."""
    size = models.size
    config = LlamaConfig(
        vocab_size=models.embedding.shape[1],
        hidden_size=size.width,
        intermediate_size=size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        attn_implementation="eager",
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(models.embedding[run])
        model.lm_head.weight.copy_(models.output[run].T)
        model.model.norm.weight.copy_(models.last[run])
        for index, layer in enumerate(model.model.layers):
            parts = models.project[run, index].T.chunk(3)
            for name, part in zip(("q_proj", "k_proj", "v_proj"), parts, strict=True):
                getattr(layer.self_attn, name).weight.copy_(part)
            layer.self_attn.o_proj.weight.copy_(models.merge[run, index].T)
            gate, up = models.up[run, index].T.chunk(2)
            layer.mlp.gate_proj.weight.copy_(gate)
            layer.mlp.up_proj.weight.copy_(up)
            layer.mlp.down_proj.weight.copy_(models.down[run, index].T)
            layer.input_layernorm.weight.copy_(models.before[run, index])
            layer.post_attention_layernorm.weight.copy_(models.middle[run, index])
    return model


def lively(models: Models) -> Models:
    """The same with larger weights, so that attention is not even."""
    with torch.no_grad():
        for name, parameter in models.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator(len(name)))
            parameter.add_(0.3 * noise)
    return models


def test_each_run_is_a_llama():
    models = lively(Models([3, 4], SMALL, 11))
    ids = torch.randint(11, (2, 3, 9), generator=generator(1))
    kept: list[torch.Tensor] = []
    with torch.no_grad():
        logits = models(ids, causal(2, 9), kept)
        for run in range(2):
            output = llama(models, run)(input_ids=ids[run], output_attentions=True)
            torch.testing.assert_close(logits[run], output.logits, atol=1e-4, rtol=1e-4)
            for mine, theirs in zip(kept, output.attentions, strict=True):
                torch.testing.assert_close(mine[run], theirs, atol=1e-5, rtol=1e-4)


def test_a_sink_token_is_a_llama_with_an_input_in_front():
    models = lively(Models([3], SMALL, 11, bias="token"))
    ids = torch.randint(11, (1, 2, 7), generator=generator(2))
    kept: list[torch.Tensor] = []
    with torch.no_grad():
        logits = models(ids, causal(1, 7), kept)
        inputs = torch.cat([models.token[0].expand(2, 1, -1), models.embedding[0][ids[0]]], 1)
        output = llama(models, 0)(inputs_embeds=inputs, output_attentions=True)
    torch.testing.assert_close(logits[0], output.logits[:, 1:], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(kept[1][0], output.attentions[1][:, :, 1:], atol=1e-5, rtol=1e-4)


def test_a_learnt_key_of_zero_is_softmax_with_one_more_in_the_denominator():
    plain, learnt = Models([5], SMALL, 11), Models([5], SMALL, 11, bias="k")
    with torch.no_grad():
        learnt.key.zero_()
        ids = torch.randint(11, (1, 2, 6), generator=generator(3))
        ours: list[torch.Tensor] = []
        theirs: list[torch.Tensor] = []
        learnt(ids, causal(1, 6), ours)
        plain(ids, causal(1, 6), theirs)
    assert ours[0].shape[-1] == 7
    torch.testing.assert_close(ours[0].sum(-1), torch.ones(1, 2, 2, 6))
    # the first layer sees the same input: scores differ by nothing, rows by the share of the learnt key
    rest = ours[0][..., 1:] / (1 - ours[0][..., :1])
    torch.testing.assert_close(rest, theirs[0])
    first = theirs[0][..., 0, 0]
    torch.testing.assert_close(first, torch.ones_like(first))


def test_learnt_keys_with_values_of_zero_are_k_biases_and_values_add_up():
    ids = torch.randint(11, (1, 2, 6), generator=generator(3))
    kv, k = lively(Models([5], SMALL, 11, bias="kv")), Models([5], SMALL, 11, bias="k")
    plain, v = Models([5], SMALL, 11), Models([5], SMALL, 11, bias="v")
    with torch.no_grad():
        kv.value.zero_()
        for other in (k, plain, v):
            shared = {n: p for n, p in kv.state_dict().items() if n in other.state_dict()}
            other.load_state_dict(shared, strict=False)
        torch.testing.assert_close(k(ids, causal(1, 6)), kv(ids, causal(1, 6)))
        torch.testing.assert_close(v(ids, causal(1, 6)), plain(ids, causal(1, 6)))
        v.value.normal_(generator=generator(1))
        # a vector added to each head's output of the last layer moves the stream by its projection
        v.value[:, 0] = 0
        v.down[:, 1] = 0
        plain.down[:, 1] = 0
        v.output.copy_(torch.eye(16, 11))
        plain.output.copy_(torch.eye(16, 11))
        v.last.fill_(1)
        moved = v.value[0, 1].flatten() @ v.merge[0, 1]
        kept = [captured(model, ids) for model in (v, plain)]
    torch.testing.assert_close(kept[0] - kept[1], moved.expand_as(kept[0]), atol=1e-4, rtol=1e-4)


def captured(models: Models, ids: torch.Tensor, runs: int = 1) -> torch.Tensor:
    """The residual stream before the last norm."""
    from regard.labs.sink_emergence import models as module

    seen: list[torch.Tensor] = []
    norm = module.norm

    def spy(x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
        seen.append(x)
        return norm(x, gain)

    module.norm = spy
    try:
        models(ids, causal(runs, ids.shape[-1]))
    finally:
        module.norm = norm
    return seen[-1]


@pytest.mark.parametrize("bias", ["none", "token", "kv", "k", "v"])
def test_training_without_the_weights_is_the_same_model(bias):
    models = lively(Models([3, 4], SMALL, 11, bias=bias, carried=[0, 2], turned=[True, False]))
    ids = torch.randint(11, (2, 3, 9), generator=generator(2))
    same = causal(2, 9)
    different = torch.stack([lab.window_mask(9, 3), lab.prefix_mask(9, 4)])
    for visible in (same, different):
        grads = []
        for kept in (None, []):
            models.zero_grad()
            models(ids, visible, kept).square().sum().backward()
            grads.append([p.grad.clone() for p in models.parameters()])
        for fused, plain in zip(*grads, strict=True):
            torch.testing.assert_close(fused, plain, atol=1e-3, rtol=1e-3)


def test_runs_without_positions_do_not_know_the_order():
    models = lively(Models([3, 3], SMALL, 11, turned=[True, False]))
    ids = torch.tensor([[1, 2, 3, 4], [3, 1, 2, 4]]).expand(2, -1, -1)
    everything = torch.ones(2, 4, 4, dtype=torch.bool)
    with torch.no_grad():
        last = models(ids, everything)[:, :, -1]
    torch.testing.assert_close(last[1, 0], last[1, 1], atol=1e-5, rtol=1e-4)
    assert (last[0, 0] - last[0, 1]).abs().max() > 1e-3


def test_the_value_of_a_learnt_key_is_what_was_fixed():
    """All scores zero: every head gives 1 / (i + 1) of the fixed value, and the key gets no say in its size."""
    models = Models([3, 3], SMALL, 11, bias="k", carried=[0, 6])
    with torch.no_grad():
        models.project.zero_()
        models.merge.copy_(torch.eye(16))
        models.down.zero_()
        streams = captured(models, torch.tensor([[[1, 2, 3]], [[1, 2, 3]]]), runs=2)
    moved = (streams[1] - streams[0])[0]
    expected = torch.zeros(3, 2, 8)
    expected[:, :, 0] = (2 * 6 / torch.tensor([2.0, 3.0, 4.0]))[:, None]  # two layers
    torch.testing.assert_close(moved, expected.flatten(1))


def test_equal_seeds_begin_equal_in_every_architecture():
    plain = Models([7, 8], SMALL, 11)
    for bias in ("token", "kv", "k", "v"):
        other = Models([7, 8], SMALL, 11, "softmax", bias)
        for name, parameter in plain.named_parameters():
            assert torch.equal(parameter, other.get_parameter(name)), (bias, name)
    assert not torch.equal(plain.project[0], plain.project[1])


def test_impossible_models_are_refused():
    with pytest.raises(InputError, match="width must be a multiple of 8"):
        Size(heads=4, width=20)
    with pytest.raises(InputError, match="attention must be one of softmax"):
        Models([0], SMALL, 11, "softplus")
    with pytest.raises(InputError, match="bias must be one of none"):
        Models([0], SMALL, 11, bias="q")


# data


def test_windows_are_what_their_arm_asks_for():
    text = lab.corpus(256)
    assert text.ids.max() < 256 and 0.8 < text.edge / len(text.ids) < 0.95
    places = torch.rand(50, generator=generator(), dtype=torch.float64)
    draw = lambda arm, **rest: lab.windows(text, arm, places, 20, generator(1), **rest)  # noqa: E731
    plain = draw(DEFAULT)
    joined = text.ids.tolist()
    assert all(is_in(row, joined[: text.edge]) for row in plain.tolist())
    assert all(is_in(row, joined[text.edge :]) for row in draw(DEFAULT, held_out=True).tolist())
    little = draw(Arm("", share=0.01))
    assert all(is_in(row, joined[: text.edge // 100]) for row in little.tolist())
    fixed = draw(Arm("", fixed=3))
    assert (fixed[:, 2] == 256).all() and torch.equal(fixed[:, 3:], plain[:, 3:])
    noisy = draw(Arm("", random=2))
    assert torch.equal(noisy[:, 2:], plain[:, 2:]) and noisy[:, 0].unique().numel() > 20


def is_in(row: list[int], text: list[int]) -> bool:
    return bytes(row) in bytes(text)


def test_byte_pairs_shorten_the_same_text():
    fine, coarse = lab.corpus(256), lab.corpus(400)
    assert len(coarse.ids) < 0.8 * len(fine.ids) and int(coarse.ids.max()) == 399
    assert coarse.edge / len(coarse.ids) == pytest.approx(fine.edge / len(fine.ids), abs=0.02)


def test_runs_of_one_seed_see_the_same_places():
    text = lab.corpus(256)
    arms, seeds = [DEFAULT, FAST, Arm("", fixed=1), DEFAULT], [0, 0, 0, 1]
    ids = lab.batch(text, arms, seeds, 5, 4, 12)
    assert torch.equal(ids[0], ids[1]) and torch.equal(ids[0, :, 1:], ids[2, :, 1:])
    assert not torch.equal(ids[0], ids[3])
    assert not torch.equal(ids, lab.batch(text, arms, seeds, 6, 4, 12))


# training


def test_the_optimiser_is_adamw_with_clipping_for_each_run():
    start = torch.randn(2, 3, 4, generator=generator())
    goal = 5 * torch.randn(2, 3, 4, generator=generator(1))
    rates, decays = torch.tensor([0.1, 0.02]), torch.tensor([0.5, 0.0])
    together = start.clone().requires_grad_()
    ours = lab.AdamW([together], rates, decays)
    for _ in range(7):
        (together - goal).pow(4).sum().backward()
        ours.step(0.5)
    for run in range(2):
        alone = start[run].clone().requires_grad_()
        theirs = torch.optim.AdamW(
            [alone], 0.5 * float(rates[run]), betas=(0.9, 0.95), weight_decay=float(decays[run])
        )
        for _ in range(7):
            theirs.zero_grad()
            (alone - goal[run]).pow(4).sum().backward()
            torch.nn.utils.clip_grad_norm_([alone], 1.0)
            theirs.step()
        torch.testing.assert_close(together[run], alone)


def test_the_loss_of_a_run_is_the_mean_over_what_is_asked():
    logits = torch.randn(2, 3, 5, 7, generator=generator())
    ids = torch.randint(7, (2, 3, 6), generator=generator(1))
    found = lab.losses(logits, ids, [DEFAULT, Arm("", prefix=3)])
    nats = -logits.log_softmax(-1).gather(-1, ids[:, :, 1:, None])[..., 0]
    torch.testing.assert_close(found[0], nats[0].mean())
    # tokens 1, 2, 3 see each other; the first thing asked is what follows the third
    torch.testing.assert_close(found[1], nats[1, :, 2:].mean())


RECIPE = Recipe(SMALL, context=16, batch=2, steps=6, warmup=2, logged=(0, 3, 6), sequences=6)


def test_runs_trained_together_are_runs_trained_alone():
    text = lab.corpus(256)
    together = lab.train([DEFAULT, FAST, Arm("fixed", fixed=2)], [0, 1], RECIPE, text)
    alone = lab.train([FAST], [1], RECIPE, text)
    np.testing.assert_allclose(together.loss[1, 1], alone.loss[0, 0], rtol=1e-5)
    np.testing.assert_allclose(together.maps[1, 1], alone.maps[0, 0], atol=1e-5)
    assert together.steps.tolist() == [0, 3, 6]
    assert together.loss[0, 0, 0] == together.loss[1, 0, 0] != together.loss[1, 0, -1]
    assert (together.loss[:, :, -1] < together.loss[:, :, 0]).all()


def test_arms_of_two_architectures_do_not_train_at_once():
    with pytest.raises(InputError, match="one architecture"):
        lab.train([DEFAULT, Arm("", attention="sigmoid")], [0], RECIPE, lab.corpus(256))


def test_what_is_seen_is_what_the_maps_say():
    """One sequence in a model whose learnt key takes all attention of every query."""
    from regard.labs.sink_emergence.training import look

    for bias in ("none", "k"):
        models = Models([0], SMALL, 257, bias=bias)
        with torch.no_grad():
            models.project.zero_()  # all scores are 0: attention is even
        arm = Arm("", bias=bias)
        ids = torch.randint(257, (1, 5, 17), generator=generator())
        seen = look(models, ids, causal(1, 16), [arm], 0.15)
        extra = bias == "k"
        even = [np.mean([1 / (i + extra) for i in range(k, 17)]) for k in range(1, 17)]
        np.testing.assert_allclose(seen["importance"][0], even, rtol=1e-5)
        np.testing.assert_array_equal(seen["rates"][0], [100 * (a > 0.15) for a in even])
        star = np.mean([1 / (i + 1) for i in range(1, 17)])
        assert seen["learnt"][0] == (100 * (star > 0.15) if extra else 0)
        assert seen["maps"].shape == (1, 8, 17)
        assert seen["maps"][0, 3, 0] == pytest.approx(1 / 9 if extra else 0)
        assert seen["maps"][0, 3, 1] == pytest.approx(1 / (8 + extra))
        assert seen["loss"][0] == pytest.approx(math.log(257), rel=0.1)


def test_a_repeated_token_is_no_sink_where_attention_is_even():
    models = Models([0, 1], SMALL, 11)
    with torch.no_grad():
        models.project.zero_()
    assert lab.repeated_rate(models, 5, 16, 0.3).tolist() == [0, 0]
    assert lab.repeated_rate(models, 5, 16, 0.2).tolist() == [100, 100]


# courses and predictions


def made_up(finals: dict[str, dict[int, float]], spread: float = 0.2) -> lab.Course:
    """A course of all arms with these rates at the end (position 0 is the learnt key), two seeds a little apart."""
    count = len(lab.ARMS)
    rates, learnt = np.zeros((count, 2, 2, 16)), np.zeros((count, 2, 2))
    for row, arm in enumerate(lab.ARMS):
        for position, value in finals.get(arm.name, {}).items():
            for seed in range(2):
                here = value + spread * 0.01 * seed if value else 0.0
                if position:
                    rates[row, seed, 1, position - 1] = here
                else:
                    learnt[row, seed, 1] = here
    even = np.broadcast_to(lab.even_importance(64)[:16], (count, 2, 2, 16))
    relative = np.zeros((count, 2, 2))
    flat = np.full((count, 2, 2), 2.0)
    maps = np.zeros((count, 1, 2, 8, 17))
    names = [arm.name for arm in lab.ARMS]
    return lab.Course(
        names,
        [0, 1],
        np.array([0, 9]),
        flat,
        rates,
        even.copy(),
        learnt,
        relative,
        relative.copy(),
        maps,
    )


AS_IN_THE_PAPER = {
    "default": {1: 18.2},
    "rate x 2": {1: 32.2},
    "rate / 4": {1: 2.9},
    "decay 0": {1: 15.2},
    "decay 0.5": {1: 41.1},
    "first token random": {1: 27.0},
    "first two random": {1: 2.0, 2: 14.1},
    "fixed token 1st": {1: 74.1},
    "fixed token 2nd": {2: 69.0},
    "fixed token 3rd": {3: 69.6},
    "prefix of 5": {1: 5.0, 2: 5.0, 3: 5.0},
    "window of 16": {1: 9.0},
    "no positions": {1: 20.4},
    "sigmoid": {1: 0.44},
    "sigmoid, normalised": {1: 30.2},
    "ELU + 1": {1: 0.8},
    "sink token": {0: 74.1},
    "KV biases": {0: 72.8},
    "K biases": {0: 73.3},
    "K biases, value of norm 20": {0: 1.5, 1: 25.9},
    "V biases": {1: 17.0},
}


def test_the_papers_own_numbers_meet_every_prediction():
    checks = lab.compare(made_up(AS_IN_THE_PAPER), 64)
    assert [check.name for check in checks if check.holds is not True] == []
    assert len({check.name for check in checks}) == len(checks) == len(lab.PREDICTIONS) + 1


def test_other_numbers_do_not():
    flat = {arm.name: {1: 10.0} for arm in lab.ARMS}
    failed = {check.name for check in lab.compare(made_up(flat, 0.0), 64) if check.holds is False}
    assert failed == {
        "slow", "fast", "decay", "heavy decay", "little text", "two random", "fixed 1", "fixed 2", "fixed 3", "prefix",
        "narrow", "sigmoid", "elu", "normalised", "k takes", "kv takes", "token takes", "k leaves", "k carries",
    }  # fmt: skip
    course = made_up(AS_IN_THE_PAPER)
    course.loss[course.row("sigmoid")] += 0.2
    worse = {check.name: check.holds for check in lab.compare(course, 64)}
    assert worse["sigmoid loss"] is False and worse["k loss"] is True


def test_without_a_sink_there_is_nothing_to_compare_with():
    none = {arm.name: {1: 0.0} for arm in lab.ARMS}
    checks = {check.name: check for check in lab.compare(made_up(none, 0.0), 64)}
    assert checks["emerges"].holds is False and checks["k takes"].holds is False
    compares = [one.name for one in lab.PREDICTIONS if one.compares]
    assert len(compares) > 10 and all(checks[name].holds is None for name in compares)
    assert all("no clear sink" in checks[name].why for name in compares)


def test_a_course_survives_being_written_down():
    course = lab.train([DEFAULT, FAST], [0, 1], RECIPE, lab.corpus(256))
    again = lab.Course.of(course.plain())
    np.testing.assert_array_equal(again.rates, course.rates)
    np.testing.assert_allclose(again.maps, course.maps[:, :1], atol=6e-4)
    joined = lab.join([again, replace(again, arms=["a", "b"])])
    assert joined.arms == ["default", "fast", "a", "b"] and len(joined.loss) == 4
    with pytest.raises(InputError, match="same seeds and steps"):
        lab.join([again, replace(again, seeds=[0, 2])])
    with pytest.raises(InputError, match="arm must be one of default, fast"):
        course.row("slow")


# the laboratory


def test_a_small_laboratory_measures_draws_and_films(tmp_path):
    small = SinkEmergence(
        factors=("loss", "bias"), layers=2, heads=2, width=16, hidden=16, context=16, batch=1, steps=4, frames=2,
        sequences=3, eps=0.35,
    )  # fmt: skip
    assert [len(group) for group in small.groups()] == [3, 1, 1, 2, 1]
    result = small.run()
    assert result.course.arms[0] == "default" and len(result.course.arms) == 8
    assert {"start", "emerges", "prefix", "k takes"} <= set(result.checks)
    assert "slow" not in result.checks and result.checks["emerges"].holds is False
    assert all(math.isfinite(row["measured"]) for row in result.rows())
    written = result.write(tmp_path)
    assert {path.name for path in written} >= {"film.png", "film.gif", "figure.svg", "series.csv"}
    assert all(path.stat().st_size > 0 for path in written)
    from PIL import Image

    assert Image.open(tmp_path / "film.gif").n_frames == len(result.course.steps)


def test_settings_that_cannot_work_are_refused():
    with pytest.raises(InputError, match="eps must be above"):
        SinkEmergence(eps=0.05)
    with pytest.raises(InputError, match="multiple of"):
        SinkEmergence(width=60, heads=4)
    with pytest.raises(InputError, match="factors"):
        SinkEmergence(factors=("colour",))
