"""CAKE's statistics against closed forms and loops."""

from __future__ import annotations

import math

import pytest
import torch

from regard.ops import attention_dispersion, attention_shift, eviction_score, layer_preference


def maps() -> torch.Tensor:
    torch.manual_seed(3)
    return torch.softmax(2 * torch.randn(2, 4, 6, 11, dtype=torch.float64), -1)


def test_dispersion_of_uniform_attention_is_rows_times_log_keys():
    found = attention_dispersion(torch.full((2, 3, 8, 50), 1 / 50, dtype=torch.float64))
    torch.testing.assert_close(found, torch.full((2,), 24 * math.log(50), dtype=torch.float64))


def test_shift_is_zero_for_equal_rows_and_known_for_alternating_ones():
    still = maps()[:, :, :1].expand(-1, -1, 6, -1)
    torch.testing.assert_close(attention_shift(still), torch.zeros(2, dtype=torch.float64))
    # W rows that put weight 1 on key 0 and key 1 in turn: variance W/4/(W-1) at both
    turn = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).repeat(3, 1).view(1, 1, 6, 2)
    torch.testing.assert_close(attention_shift(turn), torch.tensor([2 * 6 / 4 / 5]))
    assert attention_shift(turn[:, :, :1]) == 0


def test_rows_of_a_batch_do_not_mix():
    weights = maps()
    for function in (attention_dispersion, attention_shift):
        alone = torch.cat([function(weights[b : b + 1]) for b in range(2)])
        torch.testing.assert_close(function(weights), alone)


@pytest.mark.parametrize(("gamma", "kernel"), [(200.0, 5), (0.0, 5), (200.0, 1)])
def test_score_by_the_definition(gamma, kernel):
    weights = maps()
    batch, heads, _, keys = weights.shape
    expected = torch.zeros(batch, 2, keys, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            values = [
                float(weights[b, h, :, j].mean() + gamma * weights[b, h, :, j].var())
                for j in range(keys)
            ]
            for j in range(keys):
                near = [
                    values[i] for i in range(j - kernel // 2, j + kernel // 2 + 1) if 0 <= i < keys
                ]
                expected[b, h // 2, j] += sum(near) / kernel / 2
    found = eviction_score(weights, 2, gamma=gamma, kernel=kernel)
    torch.testing.assert_close(found, expected)


def test_preference_takes_the_roots():
    found = layer_preference(torch.tensor([16.0]), torch.tensor([0.25]), (2.0, 0.5))
    torch.testing.assert_close(found, torch.tensor([4 * 0.0625], dtype=torch.float64))
