"""Product keys against the scores of every pair."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regard._errors import InputError
from regard.ops import product_key_search


def draw(keys, half, queries=9, seed=0):
    generator = torch.Generator().manual_seed(seed)
    kind = {"dtype": torch.float64, "generator": generator}
    return (
        torch.randn(2, queries, 2 * half, **kind),
        torch.randn(keys, half, **kind),
        torch.randn(keys, half, **kind),
    )


def every_pair(query, first, second):
    keys = len(first)
    whole = torch.cat(
        [first.repeat_interleave(keys, 0), second.repeat(keys, 1)], 1
    )  # key i n + j = [a_i, b_j]
    return query @ whole.T


@settings(deadline=None)
@given(st.integers(1, 20), st.integers(1, 5), st.data())
def test_the_best_pairs_are_the_best_of_all(keys, half, data):
    half_k = data.draw(st.integers(1, keys))
    picked = data.draw(st.integers(1, half_k))
    query, first, second = draw(keys, half, seed=data.draw(st.integers(0, 99)))
    found = product_key_search(query, first, second, half_k=half_k, picked=picked)
    expected = every_pair(query, first, second).topk(picked, -1)
    assert torch.equal(found.pairs, expected.indices)
    torch.testing.assert_close(found.scores, expected.values, atol=1e-12, rtol=0)


def test_the_paper_s_size():
    query, first, second = draw(64, 64)
    found = product_key_search(query, first, second, half_k=4, picked=4)
    assert torch.equal(found.pairs, every_pair(query, first, second).topk(4, -1).indices)


def test_all_candidates_hold_scores_of_their_pairs_and_not_the_best_sixteen():
    query, first, second = draw(64, 8)
    found = product_key_search(query, first, second, half_k=4)
    scores = every_pair(query, first, second)
    torch.testing.assert_close(found.scores, scores.gather(-1, found.pairs))
    assert found.pairs.shape == (2, 9, 16)
    assert bool((found.scores.diff(dim=-1) <= 0).all())
    assert not torch.equal(found.pairs, scores.topk(16, -1).indices)


def test_gradients():
    parts = [part.requires_grad_() for part in draw(5, 2, queries=2)]
    assert torch.autograd.gradcheck(lambda *args: product_key_search(*args, half_k=2).scores, parts)


def test_wrong_shapes_and_numbers_are_named():
    query, first, second = draw(5, 2)
    with pytest.raises(InputError, match=r"\(2, 9, 3\).*\(5, 2\)"):
        product_key_search(query[..., :3], first, second, half_k=2)
    with pytest.raises(InputError, match="half_k"):
        product_key_search(query, first, second, half_k=6)
    with pytest.raises(InputError, match="picked"):
        product_key_search(query, first, second, half_k=2, picked=5)
