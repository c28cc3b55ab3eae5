from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import regard
from regard._errors import InputError
from regard.instruments.domains import Dormancy, compare, cut, domain_sensitivity
from regard.instruments.permutation import permutation_test


def llama(**changes: object) -> LlamaForCausalLM:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=64, hidden_size=48, intermediate_size=48, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=2, head_dim=8, initializer_range=0.2, eos_token_id=None, **changes,
    )  # fmt: skip
    return LlamaForCausalLM(config).double().eval()


def dense(model: LlamaForCausalLM, ids: Tensor, mask: Tensor | None = None) -> list[Tensor]:
    """Mean attention on the first token over queries at least 8 after it, from full maps of each row without its padding."""
    mask = torch.ones_like(ids) if mask is None else mask
    model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = [
            model(row[m.bool()][None], output_attentions=True).attentions
            for row, m in zip(ids, mask, strict=True)
        ]
    model.set_attn_implementation("sdpa")
    return [
        torch.cat([w[:, :, 8:, 0].mean(-1) for w in layer]) for layer in zip(*maps, strict=True)
    ]


@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_dormancy_of_each_row_against_full_maps(padding):
    model, ids = llama(), torch.randint(2, 64, (3, 25))
    mask = torch.ones_like(ids)
    if padding != "none":
        mask[1, slice(0, 7) if padding == "left" else slice(18, None)] = 0
    instrument = Dormancy()
    with torch.no_grad(), regard.attach(model, instrument):
        model(ids, attention_mask=mask)
        model(ids[:2, :20], attention_mask=mask[:2, :20])
    second = dense(model, ids[:2, :20], mask[:2, :20])
    for layer, expected in enumerate(dense(model, ids, mask)):
        found = instrument.compute()["", layer].double()
        torch.testing.assert_close(found, torch.cat([expected, second[layer]]), atol=1e-6, rtol=0)


def test_generation_extends_the_open_sequence():
    model, ids = llama(), torch.randint(2, 64, (1, 12))
    instrument = Dormancy()
    with regard.attach(model, instrument):
        full = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=9, do_sample=False
        )
    found = instrument.compute()["", 1]
    assert found.shape == (1, 6)
    torch.testing.assert_close(found.double(), dense(model, full[:, :-1])[1], atol=1e-6, rtol=0)


def test_short_windows_have_no_score():
    instrument = Dormancy()
    model = llama()
    with torch.no_grad(), regard.attach(model, instrument):
        model(torch.randint(2, 64, (2, 5)))
    assert torch.isnan(instrument.compute()["", 0]).all()


def test_p_is_the_share_of_all_relabellings():
    a, b = torch.randn(4, 3), torch.randn(4, 3) + 0.8
    every = torch.cat([a, b]).double()
    gaps = []
    for picked in itertools.combinations(range(8), 4):
        rest = [i for i in range(8) if i not in picked]
        gaps.append((every[list(picked)].mean(0) - every[rest].mean(0)).abs())
    gaps = torch.stack(gaps)
    own = a.double().mean(0) - b.double().mean(0)
    exact = (gaps >= own.abs() - 1e-12).double().mean(0)
    exact_max = (gaps.amax(1)[:, None] >= own.abs() - 1e-12).double().mean(0)
    difference, p, corrected = permutation_test(a, b, permutations=20_000)
    torch.testing.assert_close(difference.double(), own, atol=1e-6, rtol=0)
    torch.testing.assert_close(p.double(), exact, atol=0.015, rtol=0)
    torch.testing.assert_close(corrected.double(), exact_max, atol=0.015, rtol=0)
    assert (corrected >= p).all()


def test_family_wise_error_is_held_under_the_null():
    generator = torch.Generator().manual_seed(0)
    false = 0
    for trial in range(80):
        x = torch.randn(16, 50, generator=generator)
        corrected = permutation_test(x[:8], x[8:], permutations=300, seed=trial)[2]
        false += bool((corrected < 0.1).any())
    assert 1 <= false <= 18  # expected 8


def test_a_planted_head_is_found_alone():
    torch.manual_seed(3)
    a = {("", layer): 0.5 + 0.05 * torch.randn(16, 4) for layer in range(3)}
    b = {("", layer): 0.5 + 0.05 * torch.randn(16, 4) for layer in range(3)}
    b["", 1][:, 2] -= 0.4
    result = compare({"code": a, "prose": b}, window=128)
    assert [str(head) for head, _ in result.sensitive()] == ["L1H2"]
    assert result.difference["L1H2"] == pytest.approx(0.4, abs=0.06)
    assert "L1H2, 0." in result.sentence() and "more on code than on prose" in result.sentence()
    frame = result.to_frame()
    assert frame.shape == (12, 8) and frame.columns[3:5] == ["code", "prose"]
    assert result.plot() is not None
    assert "No head" in compare({"a": a, "b": a}, window=128).sentence()


def test_on_a_model_with_token_ids():
    model = llama()
    a, b = torch.randint(2, 30, (6, 40)), torch.randint(30, 64, (6, 40))
    result = domain_sensitivity(model, a, b, window=20, windows=10, permutations=200)
    assert result.scores["a"]["", 0].shape == (10, 6)
    expected = dense(model, cut(model, a, 20)[:10])[1].mean(0) - dense(
        model, cut(model, b, 20)[:10]
    )[1].mean(0)
    torch.testing.assert_close(
        result.difference.values["", 1].double(), expected, atol=1e-6, rtol=0
    )


def test_bad_input():
    model = llama()
    with pytest.raises(InputError, match="both domains"):
        domain_sensitivity(model, torch.ones(4, 40, dtype=torch.long))
    with pytest.raises(InputError, match="fill 1 windows"):
        domain_sensitivity(
            model, torch.ones(200, dtype=torch.long), torch.ones(300, dtype=torch.long)
        )
