"""Mean distance and WAAD against eager maps and closed forms."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from instruments.reference import (
    distance_rows,
    eager_maps,
    fixed_map,
    full_maps,
    observe_call,
    random_call,
    tiny,
    token_batch,
    uniform,
    waad,
)
from regard._errors import InputError
from regard.attach import attach
from regard.engine import AttentionCall
from regard.instruments import WAAD, Distance

pytestmark = pytest.mark.usefixtures("blocks")


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt_oss", "gpt2"])
def test_distance_and_waad_are_those_of_eager_maps(family: str) -> None:
    model, ids = tiny(family), token_batch()
    maps = eager_maps(model, input_ids=ids)
    distance, near = Distance(), WAAD(window=4)
    with torch.no_grad(), attach(model, distance, near):
        model(input_ids=ids)
    found, series = distance.compute()["distance"], near.compute()
    assert set(found.values) == set(series.values) == set(maps)
    for key, full in maps.items():
        torch.testing.assert_close(
            found.values[key].double(), distance_rows(full).mean((0, 2)), rtol=0, atol=5e-5
        )
        torch.testing.assert_close(series.values[key][0].double(), waad(full, 4), rtol=0, atol=2e-5)
    if family == "gpt_oss":
        assert float(maps["", 0].sum(-1).max()) < 0.999  # learned sinks: the rows are not whole


def test_distance_is_absolute_where_attention_looks_both_ways() -> None:
    model, ids = tiny("bert", "BertModel"), token_batch()
    distance, near = Distance(), WAAD()
    with torch.no_grad(), attach(model, distance, near):
        model(input_ids=ids)
    for key, full in eager_maps(model, input_ids=ids).items():
        torch.testing.assert_close(
            distance.compute()["distance"].values[key].double(),
            distance_rows(full).mean((0, 2)),
            rtol=0,
            atol=1e-5,
        )
    assert near.compute().values == {}


@pytest.mark.parametrize("family", ["t5", "whisper"])
def test_cross_attention_has_no_distance(family: str) -> None:
    if family == "t5":
        model = tiny("t5", "T5ForConditionalGeneration")
        inputs = {"input_ids": token_batch(), "decoder_input_ids": token_batch(tokens=9, seed=1)}
    else:
        model = tiny("whisper", "WhisperForConditionalGeneration")
        frames = 2 * model.config.max_source_positions
        features = torch.randn(2, model.config.num_mel_bins, frames, dtype=torch.float64)
        inputs = {"input_features": features, "decoder_input_ids": token_batch(tokens=9, seed=1)}
    distance, near = Distance(), WAAD()
    with torch.no_grad(), attach(model, distance, near):
        model(**inputs)
    maps = eager_maps(model, **inputs)
    assert {stack for stack, _ in maps} == {"encoder", "", "cross"}
    found, series = distance.compute()["distance"], near.compute()
    assert set(found.values) == {key for key in maps if key[0] != "cross"}
    assert set(series.values) == {key for key in maps if key[0] == ""}
    for key in found.values:
        torch.testing.assert_close(
            found.values[key].double(), distance_rows(maps[key]).mean((0, 2)), rtol=0, atol=2e-3
        )
    for key, value in series.values.items():
        torch.testing.assert_close(value[0].double(), waad(maps[key]), rtol=0, atol=2e-5)


def test_closed_forms() -> None:
    tokens, window = 30, 10
    previous = torch.zeros(tokens, tokens)
    previous[0, 0] = 1
    previous[range(1, tokens), range(tokens - 1)] = 1
    near = observe_call(WAAD(window), fixed_map(previous[None])).compute().tensor()[0, 0]
    assert near[0] == 0
    torch.testing.assert_close(near[1:], torch.ones(tokens - 1), rtol=0, atol=1e-5)
    flat = observe_call(WAAD(window), uniform(1, tokens)).compute().tensor()[0, 0]
    expected = [sum(min(j, window) for j in range(t + 1)) / (t + 1) for t in range(tokens)]
    torch.testing.assert_close(flat, torch.tensor(expected), rtol=0, atol=1e-5)
    mean = observe_call(Distance(), uniform(1, tokens)).compute()["distance"]
    assert mean["L0H0"] == pytest.approx((tokens - 1) / 4)


def test_a_local_head_stays_exact_far_into_a_long_text() -> None:
    tokens = 4000
    call = AttentionCall.make(*(torch.zeros(1, 1, tokens, 2) for _ in range(3)))
    position = torch.arange(tokens, dtype=torch.float32)
    call.bias = (position / 4)[
        None, None, None
    ]  # A[t, t-j] = const x exp(-j/4), far from the start
    found = float(observe_call(Distance(), call).compute()["distance"].values["", 0])
    back = torch.arange(tokens, dtype=torch.float64)
    decay = (-back / 4).exp()
    expected = ((back * decay).cumsum(0) / decay.cumsum(0)).mean()
    assert found == pytest.approx(float(expected), rel=1e-4)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(1, 50), st.integers(0, 1000))
def test_waad_at_any_length_and_window(tokens: int, window: int, seed: int) -> None:
    call = random_call(2, 2, tokens, seed)
    near = observe_call(WAAD(window), call).compute().values["", 0][0]
    torch.testing.assert_close(near, waad(full_maps(call), window), rtol=0, atol=1e-9)
    wide = observe_call(WAAD(tokens), call).compute().values["", 0][0].mean((0, 2))
    mean = observe_call(Distance(), call).compute()["distance"].values["", 0]
    torch.testing.assert_close(wide.float(), mean, rtol=0, atol=1e-5)


def test_a_window_of_nothing_is_refused() -> None:
    with pytest.raises(InputError, match="window must be at least 1 token, got 0"):
        WAAD(0)
