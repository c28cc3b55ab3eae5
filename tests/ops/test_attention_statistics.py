"""Rows, sums and peaks of attention against full float64 maps, one head and one row at a time."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from regard.ops import attention_rows, received_attention, sampled_rows, strongest_attention
from regard.ops import attention_statistics as statistics

BATCH, HEADS, KV_HEADS, QUERIES, KEYS, DIM = 2, 6, 2, 30, 50, 8


def dense(
    query: Tensor,
    key: Tensor,
    rows: Tensor,
    keys: Tensor,
    softcap: float | None = None,
    window: int | None = None,
) -> Tensor:
    """`[batch, heads, queries, keys]` by the definition, in loops."""
    out = torch.zeros(*query.shape[:3], key.shape[2], dtype=torch.float64)
    group = query.shape[1] // key.shape[1]
    for b in range(len(query)):
        for h in range(query.shape[1]):
            for i in range(query.shape[2]):
                places = keys[b, h // group]
                seen = (places >= 0) & (places <= rows[b, i])
                if window is not None:
                    seen &= rows[b, i] - places < window
                if rows[b, i] < 0 or not seen.any():
                    continue
                scores = 0.4 * key[b, h // group].double() @ query[b, h, i].double()
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                out[b, h, i] = torch.softmax(scores.masked_fill(~seen, -math.inf), 0)
    return out


@pytest.fixture(params=["prompt", "padded", "chunk", "evicted"])
def case(request: pytest.FixtureRequest) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Query, key, query positions, key positions."""
    torch.manual_seed(1)
    queries = KEYS if request.param in ("prompt", "padded") else QUERIES
    query = torch.randn(BATCH, HEADS, queries, DIM)
    key = torch.randn(BATCH, KV_HEADS, KEYS, DIM)
    places = torch.arange(KEYS).expand(BATCH, KV_HEADS, KEYS).clone()
    rows = torch.arange(KEYS - queries, KEYS).expand(BATCH, queries).clone()
    if request.param == "padded":  # on the left in one row, on the right in the other
        places[0, :, :7] = rows[0, :7] = -1
        places[1, :, -5:] = rows[1, -5:] = -1
    if request.param == "evicted":  # every head holds other keys, one fewer than the others
        for b in range(BATCH):
            for h in range(KV_HEADS):
                gone = 3 + b + 2 * h
                past = torch.randperm(KEYS - queries + 30)[: KEYS - queries - gone].sort().values
                new = torch.arange(KEYS - queries + 30, KEYS + 30)
                places[b, h] = torch.cat([torch.full((gone,), -1), past, new])
        rows = rows + 30
    return query, key, rows, places


@pytest.mark.parametrize("numbers", [1_200_000, 10_000])
@pytest.mark.parametrize("options", [{}, {"window": 9}, {"softcap": 1.5}])
def test_equal_the_dense_maps(case, numbers, options, monkeypatch):
    monkeypatch.setattr(statistics, "BLOCK_NUMBERS", numbers)
    query, key, rows, places = case
    maps = dense(*case, **options)
    grouped = maps.unflatten(1, (KV_HEADS, -1))
    found = attention_rows(query, key, rows, places, scaling=0.4, **options)
    torch.testing.assert_close(found.double(), maps, atol=1e-6, rtol=1e-5)
    received = received_attention(query, key, rows, places, scaling=0.4, **options)
    torch.testing.assert_close(received.double(), grouped.sum((2, 3)), atol=2e-5, rtol=1e-5)
    peaks = strongest_attention(query, key, rows, places, scaling=0.4, **options)
    torch.testing.assert_close(peaks.double(), grouped.amax((2, 3)), atol=1e-6, rtol=1e-5)


def test_row_weights_are_how_often_a_row_counts(case):
    query, key, rows, places = case
    weights = torch.rand(query.shape[2])
    found = received_attention(query, key, rows, places, scaling=0.4, row_weights=weights)
    maps = dense(*case).unflatten(1, (KV_HEADS, -1))
    expected = (maps * weights.double()[:, None]).sum((2, 3))
    torch.testing.assert_close(found.double(), expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("rows", "every", "last"), [(1, 8, 64), (64, 8, 64), (300, 8, 64), (300, 7, 0)]
)
def test_sampled_rows_stand_for_all_rows(rows, every, last):
    index, weights = sampled_rows(rows, every, last)
    assert weights.sum() == rows
    assert bool((index.diff() > 0).all())
    assert index[-1] < rows
    assert set(range(max(0, rows - last), rows)) <= set(index.tolist())


def test_sampling_every_row_is_exact():
    index, weights = sampled_rows(50, 1)
    assert index.tolist() == list(range(50))
    assert bool((weights == 1).all())


def test_half_precision_is_computed_in_single():
    query, key = torch.randn(1, 2, 5, 4).bfloat16(), torch.randn(1, 1, 5, 4).bfloat16()
    rows, places = torch.arange(5)[None], torch.arange(5).view(1, 1, 5)
    found = received_attention(query, key, rows, places, scaling=0.4)
    expected = dense(query, key, rows, places).sum((1, 2))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found[:, 0].double(), expected, atol=1e-5, rtol=1e-5)
