"""Residual peaks against the hidden states that transformers itself returns."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import regard
from regard._errors import InputError
from regard.engine import State
from regard.instruments.stream import Massive, ResidualPeaks


def llama():
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    return LlamaForCausalLM(config).double().eval()


def gpt2():
    torch.manual_seed(2)
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=3, n_head=4, n_positions=64)
    return GPT2LMHeadModel(config).double().eval()


def observe(model, ids, mask=None, instrument=None):
    peaks = instrument or ResidualPeaks()
    with torch.no_grad(), regard.attach(model, peaks):
        model(input_ids=ids, attention_mask=mask)
    return peaks


@pytest.mark.parametrize("build", [llama, gpt2])
def test_every_number_is_that_of_the_hidden_states(build):
    model, ids = build(), torch.randint(64, (2, 11))
    skyline = observe(model, ids).compute()[""]
    with torch.no_grad():
        hidden = model(input_ids=ids, output_hidden_states=True).hidden_states
    assert len(skyline.peak) == 4
    for site, state in enumerate(hidden[:-1]):  # the last one comes after the final norm
        size = state.abs()
        _, token, dimension = torch.unravel_index(size.argmax(), size.shape)
        assert (int(skyline.peak_token[site]), int(skyline.peak_dimension[site])) == (
            int(token),
            int(dimension),
        )
        norms = state.norm(dim=-1)
        expected = {
            "peak": size.max(),
            "median": size.flatten(1).median(1).values.mean(),
            "first_norm": norms[:, 0].mean(),
            "median_norm": norms[:, 1:].median(1).values.mean(),
            "ratio": (norms[:, 0] / norms[:, 1:].median(1).values).mean(),
        }
        for name, value in expected.items():
            torch.testing.assert_close(
                getattr(skyline, name)[site].double(), value, rtol=1e-6, atol=0
            )


def planted(batch=1, tokens=12, dim=16, at=((0, 0, 3, -5000.0), (0, 7, 3, 4000.0))):
    hidden = torch.randn(batch, tokens, dim).clamp(-2, 2)
    for row, token, dimension, value in at:
        hidden[row, token, dimension] = value
    return hidden


def test_massive_activations_follow_the_rule_and_keep_their_place():
    peaks = ResidualPeaks()
    hidden = planted(at=((0, 0, 3, -5000.0), (0, 7, 3, 4000.0), (0, 0, 9, 60.0)))
    peaks.residual(State("embed", 0, "", hidden))
    skyline = peaks.compute()[""]
    assert skyline.massive == [Massive(0, 0, 0, 3, -5000.0), Massive(0, 0, 7, 3, 4000.0)]
    assert skyline.features() == {3} and skyline.features(0) == {3} and skyline.features(1) == set()
    assert skyline.tokens() == {0: {3}, 7: {3}}
    assert skyline.summit == (0, 0, 3)


def test_the_floor_and_the_ratio_both_bind():
    small = planted(at=((0, 0, 3, 99.0),)) * 1.0
    small[small.abs() < 50] *= 1e-3
    for scale, found in ((1.0, 0), (1.02, 1)):  # 99 is below the floor of 100, 101 is not
        peaks = ResidualPeaks()
        peaks.residual(State("embed", 0, "", small * scale))
        assert len(peaks.compute()[""].massive) == found
    peaks = ResidualPeaks(ratio=1e6)
    peaks.residual(State("embed", 0, "", small * 1.02))
    assert not peaks.compute()[""].massive


def test_sequences_of_later_batches_are_numbered_on():
    peaks = ResidualPeaks()
    peaks.residual(State("embed", 0, "", planted(2, at=((1, 0, 3, 5000.0),))))
    other = ResidualPeaks()
    other.residual(State("embed", 0, "", planted(1, at=((0, 4, 5, 6000.0),))))
    skyline = peaks.merge(other).compute()[""]
    assert [(m.sequence, m.token, m.dimension) for m in skyline.massive] == [(1, 0, 3), (2, 4, 5)]
    assert skyline.records.shape == (3, 1, 6)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_gives_what_its_rows_give_alone(side):
    model = llama()
    rows = [torch.randint(64, (n,)) for n in (9, 5)]
    ids, mask = torch.zeros(2, 9, dtype=torch.long), torch.zeros(2, 9, dtype=torch.long)
    for i, row in enumerate(rows):
        where = slice(9 - len(row), 9) if side == "left" else slice(0, len(row))
        ids[i, where], mask[i, where] = row, 1
    alone = ResidualPeaks()
    for row in rows:
        observe(model, row[None], instrument=alone)
    together = observe(model, ids, mask).compute()[""].records
    torch.testing.assert_close(together, alone.compute()[""].records, rtol=1e-5, atol=1e-6)


def test_medians_of_long_texts_come_from_evenly_spaced_tokens():
    hidden = torch.randn(1, 40, 16)
    peaks = ResidualPeaks(tokens=10)
    peaks.residual(State("embed", 0, "", hidden))
    assert float(peaks.compute()[""].median[0]) == float(hidden[0, ::4].abs().median())


def test_decode_steps_are_left_out():
    model, ids = llama(), torch.randint(64, (1, 8))
    peaks = ResidualPeaks()
    with torch.no_grad(), regard.attach(model, peaks):
        model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(peaks.compute()[""].records, observe(model, ids).compute()[""].records)


def test_one_token_is_a_sequence_and_padding_alone_is_none():
    model = llama()
    skyline = observe(model, torch.randint(64, (1, 1))).compute()[""]
    assert torch.isfinite(skyline.peak).all() and skyline.median_norm.isnan().all()
    peaks = ResidualPeaks()
    peaks.residual(
        State("embed", 0, "", torch.randn(2, 3, 4), torch.tensor([[False] * 3, [True] * 3]))
    )
    assert len(peaks.compute()[""].records) == 1


def test_tables_and_plots():
    peaks = observe(llama(), torch.randint(64, (1, 8)))
    frame = peaks.to_frame()
    assert frame.shape == (4, 9) and frame["site"].to_list() == [0, 1, 2, 3]
    assert len(peaks.plot().axes) == 1 and peaks.measures() == {}


def test_errors_say_what_to_do():
    with pytest.raises(InputError, match="nothing was observed"):
        ResidualPeaks().compute()
    with pytest.raises(InputError, match="ratio must be > 0"):
        ResidualPeaks(ratio=0)
    with pytest.raises(InputError, match="tokens must be a number of tokens >= 1"):
        ResidualPeaks(tokens=0)


@given(
    cuts=st.lists(st.integers(1, 7), max_size=3, unique=True),
    scale=st.floats(0.1, 1e4),
    seed=st.integers(0, 99),
)
def test_any_split_into_batches_gives_the_same_records(cuts, scale, seed):
    hidden = scale * torch.randn(8, 5, 6, generator=torch.Generator().manual_seed(seed))
    whole, parts = ResidualPeaks(), ResidualPeaks()
    whole.residual(State("embed", 0, "", hidden))
    for part in hidden.tensor_split(sorted(cuts)):
        parts.residual(State("embed", 0, "", part))
    a, b = whole.compute()[""], parts.compute()[""]
    assert torch.equal(a.records, b.records) and a.massive == b.massive
