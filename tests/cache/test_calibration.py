"""Profiles of a model's heads: shares, files, and the model they belong to."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from regard._errors import InputError
from regard.cache import Calibrated, Calibration, calibrate
from regard.cache.calibration import fingerprint, head_shares

MADE = Calibration(
    "tiny", "ab" * 32, 1, 100, (0.1, 0.5), (((0.2, 0.0), (0.1, 0.1)), ((0.9, 0.4), (0.5, 0.2)))
)


@given(st.floats(0.001, 1.0))
def test_the_mean_share_is_the_fraction(fraction):
    shares = MADE.shares_at(fraction)
    assert float(shares.mean()) == pytest.approx(fraction, abs=1e-9)
    assert bool(((shares >= 0) & (shares <= 1)).all())


def test_shares_meet_the_grid_and_the_ends():
    assert MADE.shares_at(0.5).tolist() == [[0.9, 0.4], [0.5, 0.2]]
    assert MADE.shares_at(1.0).tolist() == [[1.0, 1.0], [1.0, 1.0]]
    torch.testing.assert_close(
        MADE.shares_at(0.05), torch.tensor([[0.1, 0.0], [0.05, 0.05]], dtype=torch.float64)
    )
    for fraction in (0.0, 1.2):
        with pytest.raises(InputError, match="fraction"):
            MADE.shares_at(fraction)


def test_head_shares_count_the_best_keys_of_all_heads():
    peaks = torch.tensor([[[9.0, 8.0, 1.0, 0.0], [7.0, 2.0, 3.0, 4.0]]])
    assert head_shares(peaks, 0.5).tolist() == [[0.5, 0.5]]
    assert head_shares(peaks, 0.25).tolist() == [[0.5, 0.0]]


def test_comes_back_from_its_file(tmp_path):
    path = MADE.save(tmp_path / "made" / "heads.json")
    assert Calibration.load(path) == MADE
    assert not list(path.parent.glob("*.tmp"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda held: "{", "not JSON"),
        (lambda held: json.dumps([1, 2]), "not a calibration"),
        (lambda held: json.dumps(held | {"format": "other"}), "not a calibration"),
        (lambda held: json.dumps({k: v for k, v in held.items() if k != "model"}), "damaged"),
        (lambda held: json.dumps(held | {"shares": [[[0.9, 0.9], [0.9, 0.9]]] * 2}), "damaged"),
        (lambda held: json.dumps(held | {"fractions": [0.5, 0.1]}), "damaged"),
    ],
)
def test_a_bad_file_is_refused(change, message, tmp_path):
    path = MADE.save(tmp_path / "heads.json")
    path.write_text(change(json.loads(path.read_text())))
    with pytest.raises(InputError, match=message):
        Calibration.load(path)
    with pytest.raises(InputError, match="no calibration at"):
        Calibration.load(tmp_path / "none.json")


def test_belongs_to_one_model(model):
    with pytest.raises(InputError, match="made for tiny"):
        Calibrated(model, 0.2, MADE)
    before = fingerprint(model)
    weight = model.model.layers[1].mlp.up_proj.weight
    with torch.no_grad():
        weight.view(-1)[0] += 1
        assert fingerprint(model) != before
        weight.view(-1)[0] -= 1
    assert fingerprint(model) == before


def test_made_from_a_live_model(tiny_tokenizer):
    from fixtures_models import tiny_llama
    from regard.texts import prose

    model = tiny_llama()
    made = calibrate(model, [prose(600), prose(600, seed=1)], tokenizer=tiny_tokenizer, tokens=120)
    assert (made.layers, made.kv_heads, made.texts, made.tokens) == (2, 2, 2, 240)
    made.check(model)
    ids = torch.randint(3, 320, (1, 50))
    with Calibrated(model, 0.3, made, least=2) as cache:
        cache.prefill(ids)
        assert sum(int(layer.lengths.sum()) for layer in cache.held) == 15 * 4


def test_refuses_texts_that_are_none(tiny_tokenizer):
    from fixtures_models import tiny_llama

    with pytest.raises(InputError, match="at least 64 tokens"):
        calibrate(tiny_llama(), "short", tokenizer=tiny_tokenizer)
    with pytest.raises(InputError, match="at least one text"):
        calibrate(tiny_llama(), [], tokenizer=tiny_tokenizer)
