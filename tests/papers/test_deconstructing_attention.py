"""The indicators of attention maps on maps whose numbers are known, and the pieces of the experiment."""

from __future__ import annotations

import math

import pytest
import torch

from regard.nn.deconstructed_model import without_layers
from regard.papers._deconstructing_attention_runs import (
    Setting,
    attention_indicators,
    build,
    deviation,
    indicators_of,
    nats,
    score_ranges,
    short_context,
)

SMALL = Setting(length=24, layers=2, width=16, heads=2)


def test_uniform_maps() -> None:
    tokens = 16
    maps = (torch.ones(tokens, tokens).tril() / torch.arange(1, tokens + 1)[:, None]).double()
    found = attention_indicators(maps.expand(2, 3, -1, -1))
    rows = range(1, tokens + 1)
    assert found["entropy"] == pytest.approx(sum(map(math.log, rows)) / tokens)
    assert found["sink"] == pytest.approx(sum(1 / i for i in rows) / tokens)
    assert found["concentration"] == pytest.approx(math.sqrt(sum(1 / i for i in rows)))
    assert found["diversity"] == 0
    assert found["local focus 2"] == pytest.approx(
        sum(1 / i for i in range(3, tokens + 1)) / (tokens - 2)
    )


def test_identity_and_previous_token() -> None:
    eye = torch.eye(8, dtype=torch.float64)
    previous = torch.cat([eye[:1], eye[:-1]])
    found = attention_indicators(torch.stack([eye, previous])[None])
    assert found["local focus 0"] == pytest.approx((1 + 1 / 8) / 2)
    assert found["local focus 1"] == pytest.approx(1 / 2)
    assert found["entropy"] == 0
    assert found["diversity"] == pytest.approx(14 * 0.5 / 36)  # 14 of 36 pairs differ, 0 and 1


def test_the_variants_equal_their_other_forms() -> None:
    assert deviation() < 1e-9


def test_maps_are_read_of_the_input_and_not_of_the_stream() -> None:
    torch.manual_seed(0)
    model = build("static_qk", "uniform", SMALL).eval()
    ids = torch.randint(256, (3, 24))
    layers = indicators_of(model, ids)
    assert len(layers) == 2 and all(0 < one["sink"] < 1 for one in layers)
    fixed = build("random_qk", "uniform", SMALL).eval()
    assert indicators_of(fixed, ids) == indicators_of(fixed, ids.flip(0, 1))


def test_context_and_scores() -> None:
    torch.manual_seed(0)
    ids = torch.randint(256, (3, 24))
    deaf = build("no_mixing", "uniform", SMALL).eval()
    found = short_context(deaf, ids, last=4)
    assert found["whole"] == pytest.approx(found["short"], abs=1e-6)
    gated = build("self_gated", "even", SMALL).eval()
    assert len(score_ranges(gated, ids)) == 1
    assert nats(without_layers(gated, [0]), ids).shape == (3, 23)
