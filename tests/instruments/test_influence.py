"""FAI against eager maps, naive loops and closed forms."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from instruments.reference import (
    eager_maps,
    fai,
    fixed_map,
    full_maps,
    observe_call,
    random_call,
    tiny,
    token_batch,
    uniform,
    visible,
)
from regard._errors import InputError
from regard.attach import attach
from regard.instruments import FutureInfluence

pytestmark = pytest.mark.usefixtures("blocks")


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt_oss"])
@pytest.mark.parametrize(("lo", "hi", "start"), [(3, None, 0), (2, 9, 0), (3, None, 7), (0, 4, 7)])
def test_fai_is_that_of_eager_maps(family: str, lo: int, hi: int | None, start: int) -> None:
    model, ids = tiny(family), token_batch()
    influence = FutureInfluence(lo, hi, start)
    with torch.no_grad(), attach(model, influence):
        model(input_ids=ids)
    found = influence.compute()
    maps = eager_maps(model, input_ids=ids)
    assert set(found.values) == set(maps)
    for key, full in maps.items():
        seen = full[0, 0] > 0
        torch.testing.assert_close(
            found.values[key][0].double(), fai(full, lo, hi, start, seen), rtol=0, atol=2e-5
        )


def test_closed_forms() -> None:
    tokens = 30
    previous = torch.zeros(tokens, tokens)
    previous[0, 0] = 1
    previous[range(1, tokens), range(tokens - 1)] = 1
    for lo in (2, 10):
        series = observe_call(FutureInfluence(lo), fixed_map(previous[None])).compute()
        assert float(series.tensor().abs().max()) < 1e-12
    nearest = observe_call(FutureInfluence(1, 1), fixed_map(previous[None])).compute().tensor()
    torch.testing.assert_close(nearest[0, 0, :-1], torch.ones(tokens - 1))
    for lo, hi in ((10, None), (10, 15), (0, 0)):
        flat = observe_call(FutureInfluence(lo, hi), uniform(1, tokens)).compute().tensor()[0, 0]
        for s in range(tokens):
            last = tokens - 1 if hi is None else min(s + hi, tokens - 1)
            shares = [1 / (t + 1) for t in range(s + lo, last + 1)]
            expected = sum(shares) / len(shares) if shares else 0.0
            assert float(flat[s]) == pytest.approx(expected, abs=1e-6)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(0, 12),
    st.none() | st.integers(0, 20),
    st.integers(0, 45),
    st.integers(0, 1000),
)
def test_fai_at_any_length_and_reach(
    tokens: int, lo: int, more: int | None, start: int, seed: int
) -> None:
    hi = None if more is None else lo + more
    call = random_call(2, 2, tokens, seed)
    found = observe_call(FutureInfluence(lo, hi, start), call).compute().values["", 0][0]
    torch.testing.assert_close(found, fai(full_maps(call), lo, hi, start), rtol=0, atol=1e-9)


def test_queries_beyond_a_sliding_window_do_not_count() -> None:
    tokens, window = 20, 6
    seen = visible(tokens, window)
    call = random_call(1, 2, tokens, mask=seen[None, None])
    maps = torch.einsum("bhqd,bhkd->bhqk", call.query, call.key) * call.scaling
    maps = torch.softmax(maps.masked_fill(~seen, -torch.inf), -1)
    found = observe_call(FutureInfluence(3), call).compute().values["", 0][0]
    torch.testing.assert_close(found, fai(maps, 3, seen=seen), rtol=0, atol=1e-12)
    assert float((found - fai(maps, 3)).abs().max()) > 0.01  # the whole text would dilute it


def test_cross_attention_and_encoders_have_no_influence_series() -> None:
    model = tiny("t5", "T5ForConditionalGeneration")
    influence = FutureInfluence(2)
    ids = token_batch()
    with torch.no_grad(), attach(model, influence):
        model(input_ids=ids, decoder_input_ids=ids)
    assert {stack for stack, _ in influence.compute().values} == {""}


@pytest.mark.parametrize("given", [{"lo": -1}, {"lo": 5, "hi": 4}, {"from_query": -1}])
def test_a_reach_that_makes_no_sense_is_refused(given: dict[str, int]) -> None:
    with pytest.raises(InputError, match="FAI needs 0 <= lo <= hi"):
        FutureInfluence(**given)
