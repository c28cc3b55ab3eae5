"""Temperatures against rescaled queries, the fused layer against two layers, and the regularizer against dense maps."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import regard
from regard._errors import InputError
from regard.nn import (
    EntropyRegularizer,
    LanguageModel,
    LanguageModelConfig,
    RowEntropyRegularizer,
    ScaledFusedFFN,
    SoftmaxAttention,
    SoftmaxOnlyBlock,
    TemperatureAttention,
)
from regard.ops import attention_entropy, head_entropy_penalty, row_entropy_penalty

F64 = torch.float64


def same_weights(positions: int | None) -> tuple[SoftmaxAttention, TemperatureAttention]:
    torch.manual_seed(0)
    plain = SoftmaxAttention(16, 4).double()
    warm = TemperatureAttention(16, 4, positions=positions).double()
    warm.load_state_dict(plain.state_dict(), strict=False)
    return plain, warm


@pytest.mark.parametrize("positions", [None, 9])
def test_a_temperature_of_one_changes_nothing(positions):
    plain, warm = same_weights(positions)
    hidden = torch.randn(2, 9, 16, dtype=F64)
    torch.testing.assert_close(warm(hidden), plain(hidden))


def test_a_temperature_for_each_head_divides_its_queries():
    plain, warm = same_weights(None)
    temperature = torch.tensor([0.5, 1.0, 2.0, 7.0], dtype=F64)
    with torch.no_grad():
        warm.log_temperature.copy_(temperature[:, None].log())
        plain.q_proj.weight.div_(temperature.repeat_interleave(4)[:, None])
    torch.testing.assert_close(warm.temperature[:, 0], temperature)
    hidden = torch.randn(2, 9, 16, dtype=F64)
    torch.testing.assert_close(warm(hidden), plain(hidden))


def test_a_temperature_for_each_position_and_none_for_padding():
    _, warm = same_weights(5)
    with torch.no_grad():
        warm.log_temperature.normal_()
    hidden = torch.randn(2, 8, 16, dtype=F64)
    whole = warm(hidden)
    for row in range(8):  # a model whose only temperature is that of this position
        one = TemperatureAttention(16, 4).double()
        one.load_state_dict(
            {**warm.state_dict(), "log_temperature": warm.log_temperature[:, [min(row, 4)]]}
        )
        torch.testing.assert_close(one(hidden)[:, row], whole[:, row])
    padded = torch.cat([torch.randn(2, 3, 16, dtype=F64), hidden], 1)
    valid = (torch.arange(11) >= 3).expand(2, -1)
    state: dict[str, torch.Tensor] = {}
    torch.testing.assert_close(warm(padded, valid=valid)[:, 3:], whole)
    steps = [
        warm(h, valid=v, state=state)
        for h, v in zip(padded.split([4, 1, 6], 1), valid.split([4, 1, 6], 1), strict=True)
    ]
    torch.testing.assert_close(torch.cat(steps, 1)[:, 3:], whole)


def test_a_hot_head_is_uniform():
    _, warm = same_weights(None)
    with torch.no_grad():
        warm.log_temperature.fill_(20.0)
    hidden = torch.randn(1, 6, 16, dtype=F64)
    value = warm.v_proj(hidden)
    means = value.cumsum(1) / torch.arange(1, 7, dtype=F64)[:, None]
    torch.testing.assert_close(warm(hidden), warm.o_proj(means), atol=1e-6, rtol=1e-6)


def test_the_fused_layer_is_two_linear_layers():
    torch.manual_seed(0)
    up, down = nn.Linear(8, 32, bias=False), nn.Linear(32, 8, bias=False)
    hidden = torch.randn(3, 5, 8)
    fused = ScaledFusedFFN.of(up, down)
    torch.testing.assert_close(fused(hidden), hidden + down(up(hidden)), atol=1e-6, rtol=1e-6)
    with torch.no_grad():
        fused.alpha.fill_(2.0)
        fused.beta.fill_(3.0)
    expected = hidden / 2 + 3 * down(up(hidden))
    torch.testing.assert_close(fused(hidden), expected, atol=1e-6, rtol=1e-6)


def test_the_fused_layer_starts_like_a_product():
    torch.manual_seed(0)
    product = (0.02 * torch.randn(256, 1024)) @ (0.02 * torch.randn(1024, 256))
    assert float(ScaledFusedFFN(256).fused.weight.std()) == pytest.approx(
        float(product.std()), rel=0.05
    )


def test_a_block_without_norms_or_activations():
    torch.manual_seed(0)
    block = SoftmaxOnlyBlock(16, 4, positions=12).double()
    kinds = {type(m).__name__ for m in block.modules() if not list(m.children())}
    assert kinds == {"Linear"}
    hidden = torch.randn(2, 12, 16, dtype=F64)
    state: dict[str, torch.Tensor] = {}
    parts = [block(part, state=state) for part in hidden.split([5, 1, 6], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), block(hidden))
    block(hidden).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in block.parameters())


def llama(implementation: str = "sdpa") -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        attn_implementation=implementation,
    )
    return LlamaForCausalLM(config)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("kind", "penalty"),
    [(EntropyRegularizer, head_entropy_penalty), (RowEntropyRegularizer, row_entropy_penalty)],
)
def test_loss_and_gradients_are_those_of_dense_maps(kind, penalty, causal):
    ids, gradients, losses = torch.randint(40, (3, 14)), [], []
    for dense in (True, False):
        model = llama("eager" if dense else "sdpa").double()
        regularizer = kind(2, 4, strength=0.5, tolerance=0.05, causal=causal).double()
        if dense:
            maps = model(ids, output_attentions=True).attentions
            ceiling = torch.arange(1, 15).double().log() if causal else None
            terms = [
                penalty(attention_entropy(a.double()), t, tolerance=0.05, ceiling=ceiling)
                for a, t in zip(maps, regularizer.levels, strict=True)
            ]
            loss = 0.5 * sum(terms) / 2
        else:
            with regard.attach(model, regularizer):
                model(ids)
                model(ids)  # only the last pass counts
                loss = regularizer.loss()
        loss.backward()
        losses.append(float(loss))
        parameters = [
            *regularizer.parameters(),
            *(p for p in model.parameters() if p.grad is not None),
        ]
        gradients.append([p.grad for p in parameters])
    assert losses[0] > 0 and losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert len(gradients[0]) == len(gradients[1]) > 5
    for dense, blockwise in zip(*gradients, strict=True):
        torch.testing.assert_close(blockwise, dense, atol=1e-6, rtol=1e-4)


def test_training_under_it_moves_entropy_into_the_band():
    torch.manual_seed(0)
    model = LanguageModel(
        LanguageModelConfig(
            vocab_size=40, hidden_size=32, mixers=["temperature"], num_hidden_layers=2
        )
    )
    regularizer = EntropyRegularizer(2, 4, strength=1.0, tolerance=0.05, causal=True)
    regularizer.levels.requires_grad_(False)
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    ids, losses = torch.randint(40, (4, 24)), []
    with regard.attach(model, regularizer):
        for _ in range(60):
            model(ids)
            loss = regularizer.loss()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(float(loss.detach()))
    assert losses[0] > 0.1 and losses[-1] < losses[0] / 4


def test_it_keeps_nothing_without_gradients_and_says_what_is_missing():
    model, regularizer = llama(), EntropyRegularizer(2, 4)
    with regard.attach(model, regularizer):
        with torch.no_grad():
            model(torch.randint(40, (1, 8)))
        with pytest.raises(InputError, match="attach it"):
            regularizer.loss()
    wrong = EntropyRegularizer(3, 4)
    with regard.attach(model, wrong):
        model(torch.randint(40, (1, 8)))
        with pytest.raises(InputError, match=r"\(3, 4\)"):
            wrong.loss()


def test_long_rows_come_in_blocks():
    model, regularizer = llama(), EntropyRegularizer(2, 4, strength=1.0, tolerance=0.0)
    with regard.attach(model, regularizer), torch.enable_grad():
        model(torch.randint(40, (1, 600)))
        assert all(len(blocks) > 1 for blocks in regularizer._found.values())
        loss = regularizer.loss()
    assert 0 < float(loss) < math.log(600) ** 2


def test_errors():
    with pytest.raises(InputError, match="positions"):
        TemperatureAttention(16, 4, positions=0)
    with pytest.raises(InputError, match="strength"):
        EntropyRegularizer(1, 1, strength=-1.0)
    with pytest.raises(InputError, match="no bias"):
        ScaledFusedFFN.of(nn.Linear(4, 8), nn.Linear(8, 4))
    with pytest.raises(InputError, match="lead back"):
        ScaledFusedFFN.of(nn.Linear(4, 8, bias=False), nn.Linear(8, 5, bias=False))
