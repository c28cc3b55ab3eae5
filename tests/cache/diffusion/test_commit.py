from __future__ import annotations

import math

import torch

from regard.cache.diffusion import confident


def logits_of(rows):
    return torch.tensor([[[math.log(p) for p in row] for row in rows]])


ROWS = [[0.95, 0.03, 0.02], [0.5, 0.3, 0.2], [0.04, 0.92, 0.04]]
"""Token 2 is the mask; without it the surest tokens have 0.969, 0.625 and 0.958."""


def test_every_mask_above_the_threshold_is_decided():
    tokens, now = confident(logits_of(ROWS), torch.ones(1, 3, dtype=torch.bool), 0.9, 2)
    assert tokens.tolist() == [[0, 0, 1]] and now.tolist() == [[True, False, True]]


def test_without_a_sure_mask_the_surest_alone_is_decided():
    _, now = confident(logits_of(ROWS), torch.ones(1, 3, dtype=torch.bool), 0.99, 2)
    assert now.tolist() == [[True, False, False]]


def test_filling_is_never_decided():
    real = torch.tensor([[False, True, False]])
    _, now = confident(logits_of(ROWS), real, 0.9, 2)
    assert now.tolist() == [[False, True, False]]


def test_the_mask_is_no_answer():
    tokens, _ = confident(logits_of([[0.1, 0.2, 0.7]]), torch.ones(1, 1, dtype=torch.bool), 0.9, 2)
    assert tokens.tolist() == [[1]]
