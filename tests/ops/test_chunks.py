"""Chunk vectors and scores against plain loops."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regard._errors import InputError
from regard.ops.chunks import (
    chunk_index,
    chunk_mean,
    chunk_representation,
    equal_cuts,
    upsample_chunk_scores,
)

lengths = st.lists(st.integers(1, 9), min_size=1, max_size=12)


@given(lengths, st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_equal_plain_loops(sizes, seed):
    generator = torch.Generator().manual_seed(seed)
    cuts = torch.tensor([0, *sizes]).cumsum(0)
    vectors = torch.randn(sum(sizes), 3, generator=generator, dtype=torch.float64)
    parts = vectors.split(sizes)
    mean = torch.stack([part.sum(0) / len(part) for part in parts])
    root = torch.stack([part.sum(0) / math.sqrt(len(part)) for part in parts])
    torch.testing.assert_close(chunk_mean(vectors, cuts), mean)
    torch.testing.assert_close(chunk_representation(vectors, cuts), root)
    scores = torch.randn(2, len(sizes), generator=generator)
    every = torch.cat([scores[:, [c]].expand(-1, n) for c, n in enumerate(sizes)], 1)
    assert torch.equal(upsample_chunk_scores(scores, cuts), every)
    assert chunk_index(cuts).bincount().tolist() == sizes


def test_one_token_chunks_are_the_tokens():
    vectors = torch.randn(7, 3)
    assert torch.equal(chunk_representation(vectors, torch.arange(8)), vectors)


def test_the_root_keeps_the_size_of_sums_of_noise():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(64 * 256, 8, generator=generator)
    cuts = torch.cat([torch.arange(0, 8192, 4), torch.arange(8192, 64 * 256 + 1, 64)])
    norm = chunk_representation(noise, cuts).norm(dim=-1)
    plain = chunk_mean(noise, cuts).norm(dim=-1)
    short = cuts.diff() == 4
    assert norm[short].mean() / norm[~short].mean() == pytest.approx(1, abs=0.05)
    assert plain[short].mean() / plain[~short].mean() == pytest.approx(4, abs=0.2)


def test_gradients_reach_the_vectors():
    vectors = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)
    cuts = torch.tensor([0, 1, 4, 6])
    assert torch.autograd.gradcheck(lambda v: chunk_representation(v, cuts), (vectors,))


def test_half_precision_is_summed_in_single():
    assert (
        chunk_mean(torch.full((4096, 1), 0.1).half(), equal_cuts(4096, 4096)).dtype == torch.float32
    )


@pytest.mark.parametrize("cuts", [[0, 3], [1, 4], [0, 2, 2, 4], [0], [4, 0]])
def test_refuses_cuts_that_do_not_fit(cuts):
    with pytest.raises(InputError, match="cuts must be strictly rising from 0 to 4"):
        chunk_mean(torch.zeros(4, 2), torch.tensor(cuts))
