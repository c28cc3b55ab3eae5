"""The entropy bound against its extremal scores, against random ones, and against a search for something lower."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regard._errors import InputError
from regard.ops import entropy_lower_bound, extremal_scores, score_norm

F64 = torch.float64


def entropy(scores: torch.Tensor) -> torch.Tensor:
    return torch.distributions.Categorical(logits=scores).entropy()


@pytest.mark.parametrize("keys", [2, 8, 64, 512])
def test_the_extremal_scores_meet_the_bound(keys):
    norms = torch.tensor([0.5, 2, 6, 12, 40], dtype=F64)
    scores = extremal_scores(norms, keys)
    torch.testing.assert_close(scores.norm(dim=-1), norms)
    torch.testing.assert_close(
        entropy(scores), entropy_lower_bound(norms, keys), atol=1e-12, rtol=1e-9
    )


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 200), st.floats(0, 30), st.integers(0, 10_000))
def test_no_scores_of_that_norm_fall_below(keys, norm, seed):
    scores = torch.randn(50, keys, dtype=F64, generator=torch.Generator().manual_seed(seed))
    scores[:25] = scores[:25].pow(5)  # peaked rows come nearest
    scores = norm * scores / scores.norm(dim=-1, keepdim=True)
    bound = entropy_lower_bound(torch.full((50,), norm, dtype=F64), keys)
    assert bool((entropy(scores) >= bound - 1e-12).all())


@pytest.mark.parametrize(("keys", "norm"), [(5, 2.0), (16, 4.0)])
def test_descent_on_the_sphere_ends_at_the_bound(keys, norm):
    torch.manual_seed(0)
    raw = torch.randn(8, keys, dtype=F64, requires_grad=True)
    optimiser = torch.optim.Adam([raw], lr=0.05)
    for _ in range(600):
        scores = norm * raw / raw.norm(dim=-1, keepdim=True)
        optimiser.zero_grad()
        entropy(scores).sum().backward()
        optimiser.step()
    lowest = entropy(norm * raw / raw.norm(dim=-1, keepdim=True)).min().detach()
    bound = entropy_lower_bound(torch.tensor(norm, dtype=F64), keys)
    assert bound - 1e-9 <= lowest <= bound + 1e-4


def test_published_and_limiting_values():
    bound = entropy_lower_bound(torch.tensor([6.0], dtype=F64), 64)
    torch.testing.assert_close(bound, torch.tensor([0.922715], dtype=F64), atol=1e-6, rtol=0)
    zero = entropy_lower_bound(torch.zeros(2), torch.tensor([1, 9]))
    torch.testing.assert_close(zero, torch.tensor([0.0, math.log(9)]))
    assert float(entropy_lower_bound(torch.tensor(5000.0), 1000)) == 0
    far = torch.tensor(60.0, dtype=F64)  # like keys * s * exp(-s sqrt(T / (T - 1)))
    ratio = entropy_lower_bound(far, 100) / (100 * far * torch.exp(-far * math.sqrt(100 / 99)))
    assert 0.98 < float(ratio) < 1.02


def test_gradient():
    norms = torch.tensor([0.3, 2.0, 7.0], dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: entropy_lower_bound(s, 20), norms)


@pytest.mark.parametrize("rotary", [False, True])
def test_score_norm_bounds_every_row_and_prefix(rotary):
    torch.manual_seed(1)
    dim, width, tokens = 4, 12, 20
    query, key = torch.randn(2, dim, width, dtype=F64).unbind()
    hidden = torch.randn(3, tokens, width, dtype=F64)
    left, right = hidden @ query.T, hidden @ key.T
    if rotary:
        from regard.nn.rotary import rotate

        places = torch.arange(tokens)
        left, right = rotate(left[:, None], places)[:, 0], rotate(right[:, None], places)[:, 0]
    scores = left @ right.transpose(-1, -2) / 2
    bound = score_norm(query, key, hidden, scaling=0.5, rotary=rotary)
    assert bound.shape == (3,)
    assert bool((scores.norm(dim=-1) <= bound[:, None]).all())
    lowest = entropy_lower_bound(bound[:, None].expand(3, tokens), torch.arange(1, tokens + 1))
    for row in range(tokens):  # causal rows see a prefix
        assert bool((entropy(scores[:, row, : row + 1]) >= lowest[:, row] - 1e-12).all())


def test_the_norm_without_rotation_is_tight_for_aligned_input():
    direction = torch.tensor([[0.6, 0.8]], dtype=F64)
    weight = 3 * direction
    hidden = direction.expand(5, 2)  # X X^T is all ones: norm 5, every score 9
    bound = score_norm(weight, weight, hidden, scaling=1.0)
    torch.testing.assert_close(bound, torch.tensor(45.0, dtype=F64))


def test_errors():
    with pytest.raises(InputError, match="keys"):
        entropy_lower_bound(torch.ones(2), torch.tensor([3, 0]))
    with pytest.raises(InputError, match="norm"):
        entropy_lower_bound(torch.tensor(-1.0), 4)
    with pytest.raises(InputError, match="2 or more"):
        extremal_scores(torch.tensor(1.0), 1)
