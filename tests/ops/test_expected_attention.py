"""Expected attention against its definition, and moments against those of all queries at once."""

from __future__ import annotations

import torch

from regard.ops import expected_attention
from regard.ops.expected_attention import merge_moments, query_moments


def test_second_order_term_is_the_mean_of_exponentials():
    """E[exp(q . k)] = exp(m . k + k C k / 2) for normal q: a million draws agree."""
    torch.manual_seed(0)
    dim, keys = 3, 5
    key = torch.randn(1, 1, keys, dim, dtype=torch.float64)
    mean = torch.randn(1, 1, dim, dtype=torch.float64)
    root = 0.4 * torch.randn(dim, dim, dtype=torch.float64)
    draws = mean[0, 0] + torch.randn(1_000_000, dim, dtype=torch.float64) @ root.T
    total = torch.exp(draws @ key[0, 0].T).mean(0)
    held = torch.ones(1, 1, keys, dtype=torch.bool)
    found = expected_attention(key, mean, (root @ root.T)[None, None], held, scaling=1.0)
    torch.testing.assert_close(found[0, 0], total / total.sum(), atol=0, rtol=0.02)


def test_by_the_definition_with_groups_and_empty_slots():
    torch.manual_seed(1)
    batch, heads, kv_heads, keys, dim = 2, 4, 2, 7, 3
    key = torch.randn(batch, kv_heads, keys, dim, dtype=torch.float64)
    mean = torch.randn(batch, heads, dim, dtype=torch.float64)
    spread = torch.randn(batch, heads, dim, dim, dtype=torch.float64)
    spread = spread @ spread.transpose(-1, -2)
    held = torch.rand(batch, kv_heads, keys) > 0.3
    held[:, :, -1] = True
    found = expected_attention(key, mean, spread, held, scaling=0.5)
    for b in range(batch):
        for g in range(kv_heads):
            expected = torch.zeros(keys, dtype=torch.float64)
            for h in (2 * g, 2 * g + 1):
                exponents = [0.5 * mean[b, h] @ k + 0.125 * k @ spread[b, h] @ k for k in key[b, g]]
                terms = torch.stack(exponents).exp() * held[b, g]
                expected += terms / terms.sum() / 2
            torch.testing.assert_close(found[b, g], expected)


def test_moments_of_chunks_are_those_of_all_queries():
    torch.manual_seed(2)
    query = 3 + torch.randn(2, 3, 40, 5)
    valid = torch.ones(2, 40, dtype=torch.bool)
    valid[0, :15] = False
    count, mean, apart = query_moments(query[:, :, :12], valid[:, :12])
    for start in (12, 13, 30):
        stop = {12: 13, 13: 30, 30: 40}[start]
        count, mean, apart = merge_moments(
            (count, mean, apart), query_moments(query[:, :, start:stop], valid[:, start:stop])
        )
    for b in range(2):
        own = query[b][:, valid[b]].double()
        assert count[b] == own.shape[1]
        torch.testing.assert_close(mean[b].double(), own.mean(1), atol=1e-5, rtol=1e-5)
        for h in range(3):
            spread = torch.cov(own[h].T, correction=0)
            torch.testing.assert_close(
                (apart / count[:, None, None, None])[b, h].double(), spread, atol=1e-4, rtol=1e-4
            )
