"""Sink mass, token importance and sink rates against eager maps and the definition."""

from __future__ import annotations

import math

import pytest
import torch

from instruments.reference import (
    eager_maps,
    fixed_map,
    importance,
    observe_call,
    tiny,
    token_batch,
    uniform,
    visible,
)
from regard._errors import InputError
from regard.attach import attach
from regard.instruments import SinkMass, Sinks

pytestmark = pytest.mark.usefixtures("blocks")


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt_oss", "gpt2", "bert"])
def test_importance_is_the_column_mean_of_eager_maps(family: str) -> None:
    model = tiny(family, "BertModel" if family == "bert" else None)
    ids = token_batch()
    sinks = Sinks(eps=0.2)
    with torch.no_grad(), attach(model, sinks):
        model(input_ids=ids)
    result = sinks.compute()
    maps = eager_maps(model, input_ids=ids)
    assert set(result.importance.values) == set(maps)
    hits = []
    for key, full in maps.items():
        expected = importance(full, full[0, 0] > 0)
        torch.testing.assert_close(
            result.importance.values[key][0].double(), expected, rtol=0, atol=2e-5
        )
        torch.testing.assert_close(
            sinks.mass().values[key][0].double(), full.sum(-2), rtol=0, atol=2e-4
        )
        torch.testing.assert_close(
            result.heads(1).values[key].double(), expected[..., 1].mean(0), rtol=0, atol=2e-5
        )
        hits.append(expected[..., 0] > 0.2)
    assert result.rate() == pytest.approx(100 * float(torch.stack(hits).double().mean()))


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt_oss"])
def test_sink_mass_is_the_first_visible_column(family: str) -> None:
    model, ids = tiny(family), token_batch()
    mass = SinkMass(from_query=3)
    with torch.no_grad(), attach(model, mass):
        model(input_ids=ids)
    for key, full in eager_maps(model, input_ids=ids).items():
        rows = [
            full[:, :, t, int((full[0, 0, t] > 0).to(torch.uint8).argmax())]
            for t in range(24)
            if t - int((full[0, 0, t] > 0).to(torch.uint8).argmax()) >= 3
        ]
        torch.testing.assert_close(
            mass.compute()["sink mass"].values[key].double(),
            torch.stack(rows).mean((0, 1)),
            rtol=0,
            atol=2e-5,
        )


def test_the_first_column_survives_the_next_block() -> None:
    """A view of the weights would show the last block's numbers."""
    tokens = 13
    found = observe_call(SinkMass(from_query=0), uniform(2, tokens)).compute()["sink mass"]
    expected = sum(1 / (t + 1) for t in range(tokens)) / tokens
    assert found["L0H1"] == pytest.approx(expected, rel=1e-6)


def test_cross_attention_counts_every_query() -> None:
    model = tiny("t5", "T5ForConditionalGeneration")
    inputs = {"input_ids": token_batch(), "decoder_input_ids": token_batch(tokens=9, seed=1)}
    mass, sinks = SinkMass(), Sinks()
    with torch.no_grad(), attach(model, mass, sinks):
        model(**inputs)
    maps = eager_maps(model, **inputs)
    found, series = mass.compute()["sink mass"], sinks.compute()
    for key in (("cross", 0), ("cross", 1)):
        torch.testing.assert_close(
            found.values[key].double(), maps[key][..., 0].mean((0, 2)), rtol=0, atol=1e-5
        )
        torch.testing.assert_close(
            series.importance.values[key][0].double(), maps[key].mean(-2), rtol=0, atol=1e-5
        )
    assert series.rate(stack="encoder", eps=0.01) > 0
    assert series.rate(2, stack="cross", eps=1e-6) == 100


def test_each_stack_starts_where_its_own_text_starts() -> None:
    """The encoder is left-padded, the decoder is not."""
    model = tiny("t5", "T5ForConditionalGeneration")
    mask = torch.ones(2, 24, dtype=torch.long)
    mask[0, :5] = 0
    sinks = Sinks()
    with torch.no_grad(), attach(model, sinks):
        model(input_ids=token_batch(), attention_mask=mask, decoder_input_ids=token_batch(2, 9))
    result = sinks.compute()
    assert result.starts["encoder", 0][0].tolist() == [5, 0]
    assert result.starts["", 0][0].tolist() == [0, 0]


def test_rates_and_secondary_sinks_of_a_hand_built_map() -> None:
    tokens = 40
    maps = torch.zeros(4, tokens, tokens)
    maps[:, 0, 0] = 1
    for t in range(1, tokens):
        maps[0, t, 0] = 1.0  # two heads sink on the first token,
        maps[1, t, 0] = 0.8
        maps[1, t, t] = 0.2
        maps[2, t, min(t, 12)] = 1.0  # one on token 12,
        maps[3, t, t] = 1.0  # one on none
    result = observe_call(Sinks(), fixed_map(maps)).compute()
    assert result.rate(0) == 50 and result.rate(12) == 25 and result.rate(5) == 0
    found = result.sinks()
    assert [sink.position for sink in found[:2]] == [0, 12]
    assert found[0].rate == 0.5 and found[1].rate == 0.25
    assert found[1].importance == pytest.approx((1 + 1 / 28 * 0 + 1 / 28 + 0.2 / 28) / 4, abs=0.01)
    assert all(sink.position < tokens - 8 for sink in found)


def test_the_indicator_is_averaged_over_sequences_not_the_map() -> None:
    sinks = Sinks(eps=0.3)
    tokens = 20
    strong, none = torch.zeros(1, tokens, tokens), torch.eye(tokens)[None]
    strong[:, :, 0] = 1
    for maps in (strong, none, none, none):
        observe_call(sinks, fixed_map(maps))
    result = sinks.compute()
    assert result.rate() == 25  # mean importance is 0.29: below eps, which would give 0
    assert result.heads()["L0H0"] == pytest.approx((1 + 3 / tokens) / 4, abs=1e-6)


def test_one_token_sees_itself() -> None:
    sinks, mass = Sinks(), SinkMass()
    observe_call(sinks, uniform(2, 1))
    observe_call(mass, uniform(2, 1))
    assert sinks.compute().rate() == 100
    assert math.isnan(mass.compute()["sink mass"]["L0H0"])  # no query is far from the start
    assert [sink.position for sink in sinks.compute().sinks()] == [0]


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(InputError, match=r"eps must be a share between 0 and 1, got 1\.0"):
        Sinks(1.0)
    result = observe_call(Sinks(), uniform(1, 6)).compute()
    with pytest.raises(InputError, match="k must be a position below 6, got 6"):
        result.rate(6)
    with pytest.raises(InputError, match="nothing was observed in stack 'vision'"):
        result.rate(stack="vision")
    assert visible(3).sum() == 6
