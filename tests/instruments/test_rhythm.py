"""The preplan-and-anchor series against loops over dense maps, and the couplings on planted peaks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fixtures_models import tiny_llama
from regard._errors import InputError
from regard.instruments.rhythm import (
    Rhythm,
    coupling_report,
    peaks,
    read_rhythm,
    receiver_heads,
    split_heads,
)

START, TOKENS = 9, 60


@pytest.fixture(scope="module")
def maps() -> tuple[Any, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A tiny model, tokens, its float64 maps `[layers, heads, tokens, tokens]` and its logits."""
    model = tiny_llama()
    ids = torch.randint(0, 320, (TOKENS,), generator=torch.Generator().manual_seed(0))
    model.set_attn_implementation("eager")
    with torch.no_grad():
        out = model(input_ids=ids[None], output_attentions=True)
    model.set_attn_implementation("sdpa")
    return model, ids, torch.stack(out.attentions)[:, 0].double(), out.logits[0].double()


def test_series_equal_loops_over_the_maps(maps: Any) -> None:
    model, ids, weights, logits = maps
    found = read_rhythm(model, ids, START, window=10, lo=10)
    layers, heads = weights.shape[:2]
    span = torch.zeros(layers, heads, dtype=torch.float64)
    for t in range(START, TOKENS):
        for s in range(t + 1):
            span += weights[..., t, s] * (t - s) / (TOKENS - START)
    local, wide = split_heads(span)
    assert torch.equal(local, found.local) and torch.equal(wide, found.wide)
    near, far = weights[local].mean(0), weights[wide].mean(0)
    for i, t in enumerate(range(START, TOKENS)):
        waad = sum(float(near[t, s]) * min(t - s, 10) for s in range(t + 1))
        assert float(found.waad[i]) == pytest.approx(waad, abs=1e-4)
        rows = [float(far[q, t]) for q in range(max(START, t + 10), TOKENS)]
        assert float(found.fai[i]) == pytest.approx(sum(rows) / max(len(rows), 1), abs=1e-6)
        p = logits[t - 1].softmax(-1)
        assert float(found.entropy[i]) == pytest.approx(float(-(p * p.log()).sum()), abs=1e-4)


def test_receivers_have_the_most_peaked_columns() -> None:
    columns = torch.rand(2, 5, 40, generator=torch.Generator().manual_seed(0))
    columns[1, 3, 7] = 30.0
    chosen = receiver_heads(columns)
    assert chosen.sum() == 1 and bool(chosen[1, 3])


def planted(shift: int, seed: int = 0) -> Rhythm:
    """WAAD peaks every 9 tokens with FAI peaks `shift` later; entropy is high exactly at the WAAD peaks."""
    noise = torch.rand(4, 110, generator=torch.Generator().manual_seed(seed)) * 0.1
    noise[:3] = 0.0  # no peaks but the planted ones
    at = torch.arange(5, 95, 9)
    for row, place in ((0, at), (1, at + shift), (2, at + shift), (3, at)):
        noise[row, place] += 1.0
    none = torch.zeros(1, 1, dtype=torch.bool)
    return Rhythm(noise[0], noise[1], noise[2], noise[3], none, none)


def test_planted_couplings_are_found_and_absent_ones_are_not() -> None:
    found = coupling_report([planted(1, s) for s in range(4)], shuffles=200)
    assert all(c.lift > 0.3 and c.p < 0.02 for c in found.values())
    apart = coupling_report([planted(4, s) for s in range(4)], shuffles=200)
    assert apart["anchor after preplan"].p > 0.05
    flat = [planted(1, s) for s in range(4)]
    for rhythm in flat:
        rhythm.entropy = torch.ones_like(rhythm.entropy)
    level = coupling_report(flat, shuffles=50)["entropy at WAAD peaks"]
    assert level.lift == pytest.approx(0.0, abs=1e-9) and level.p == 1.0


def test_peaks_and_refusals(maps: Any) -> None:
    assert peaks(torch.tensor([1.0, 5.0, 5.0, 1.0, 0.0])).tolist() == [2]
    assert peaks(torch.tensor([1.0, 2.0])).tolist() == []
    with pytest.raises(InputError, match="at least 12 tokens"):
        read_rhythm(maps[0], maps[1][:12], 5)
    with pytest.raises(InputError, match="share"):
        split_heads(torch.rand(2, 2), 0.7)
    with pytest.raises(InputError, match="no responses"):
        coupling_report([])


def test_a_global_group_may_not_see_before_the_response(maps: Any) -> None:
    model, ids, _, _ = maps
    one = read_rhythm(model, ids, START)
    other = read_rhythm(model, ids, START + 1)
    assert len(one.fai) == len(other.fai) + 1
    assert (one.fai[-10:] == 0).all()
