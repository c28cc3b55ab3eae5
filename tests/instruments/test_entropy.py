"""Entropy against eager maps, closed forms and the bounds of a distribution."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from instruments.reference import (
    WINDOWS,
    eager_maps,
    entropy_rows,
    fixed_map,
    observe_call,
    tiny,
    token_batch,
    uniform,
    visible,
)
from regard.attach import attach
from regard.instruments import Entropy

pytestmark = pytest.mark.usefixtures("blocks")


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt_oss", "gpt2"])
def test_entropy_is_that_of_eager_maps(family: str) -> None:
    model, ids = tiny(family), token_batch()
    maps = eager_maps(model, input_ids=ids)
    entropy = Entropy()
    with torch.no_grad(), attach(model, entropy):
        model(input_ids=ids)
    found = entropy.compute()
    assert set(found["entropy"].values) == set(maps)
    counts = visible(24, WINDOWS.get(family)).sum(-1).double()
    for key, full in maps.items():
        rows = entropy_rows(full)
        seen = counts + (1 if family == "gpt_oss" else 0)
        if family in ("gemma2", "gpt_oss"):  # one sliding layer, one full
            seen = (full[0, 0] > 0).sum(-1).double() + (1 if family == "gpt_oss" else 0)
        some = seen > 1
        expected = {
            "entropy": rows.mean((0, 2)),
            "effective keys": rows.exp().mean((0, 2)),
            "normalised entropy": (rows / seen.clamp_min(2).log())[..., some].mean((0, 2)),
        }
        for name, value in expected.items():
            torch.testing.assert_close(
                found[name].values[key].double(), value, rtol=0, atol=2e-4, msg=f"{name} {key}"
            )
        assert float(found["normalised entropy"].values[key].max()) <= 1 + 1e-6


def test_entropy_of_a_bidirectional_model() -> None:
    model, ids = tiny("bert", "BertModel"), token_batch()
    entropy = Entropy()
    with torch.no_grad(), attach(model, entropy):
        model(input_ids=ids)
    for key, full in eager_maps(model, input_ids=ids).items():
        rows = entropy_rows(full)
        found = entropy.compute()
        torch.testing.assert_close(
            found["entropy"].values[key].double(), rows.mean((0, 2)), rtol=0, atol=1e-5
        )
        torch.testing.assert_close(
            found["normalised entropy"].values[key].double(),
            (rows / math.log(24)).mean((0, 2)),
            rtol=0,
            atol=1e-5,
        )


def test_closed_forms() -> None:
    tokens = 12
    flat = observe_call(Entropy(), uniform(2, tokens)).compute()
    expected = sum(math.log(t + 1) for t in range(tokens)) / tokens
    assert flat["entropy"]["L0H1"] == pytest.approx(expected, rel=1e-6)
    assert flat["effective keys"]["L0H0"] == pytest.approx((tokens + 1) / 2, rel=1e-6)
    assert flat["normalised entropy"]["L0H0"] == pytest.approx(1, rel=1e-6)
    one = observe_call(Entropy(), fixed_map(torch.eye(tokens)[None])).compute()
    assert one["entropy"]["L0H0"] == pytest.approx(0, abs=1e-6)
    assert one["effective keys"]["L0H0"] == pytest.approx(1, abs=1e-6)


def test_a_row_with_one_key_has_no_normalised_entropy() -> None:
    found = observe_call(Entropy(), uniform(1, 1)).compute()
    assert found["entropy"]["L0H0"] == 0
    assert math.isnan(found["normalised entropy"]["L0H0"])


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 20), st.integers(0, 1000), st.floats(0.1, 20))
def test_entropy_lies_between_one_key_and_all_keys(tokens: int, seed: int, sharpness: float):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(2, tokens, tokens, generator=generator, dtype=torch.float64) * sharpness
    maps = torch.softmax(scores.masked_fill(~visible(tokens), -torch.inf), -1)
    found = observe_call(Entropy(), fixed_map(maps)).compute()
    assert found["entropy"].values["", 0].min() >= 0
    assert found["normalised entropy"].values["", 0].max() <= 1 + 1e-6
    assert found["effective keys"].values["", 0].min() >= 1 - 1e-6
    torch.testing.assert_close(
        found["entropy"].values["", 0].double(), entropy_rows(maps).mean(-1), rtol=0, atol=1e-6
    )
