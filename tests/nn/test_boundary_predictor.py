"""The boundary predictor against the same network written with `nn.MultiheadAttention`, window by window."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from regard._errors import InputError
from regard.nn import boundary_predictor as module
from regard.nn.boundary_predictor import (
    BoundaryPredictor,
    boundary_targets,
    focal_loss,
    inner_gaps,
)


def plain(predictor: BoundaryPredictor, keys: torch.Tensor) -> torch.Tensor:
    """One window at a time; `keys` `[length, channels]`."""
    channels, w = predictor.channels, predictor.window
    attention = nn.MultiheadAttention(channels, predictor.heads, batch_first=True).to(keys.dtype)
    attention.in_proj_weight = predictor.project.weight
    attention.in_proj_bias = predictor.project.bias
    attention.out_proj = predictor.mix  # pyright: ignore[reportAttributeAccessIssue]
    logits = []
    for i in range(len(keys)):
        slots = range(i - w + 1, i + w + 1)
        rows = [keys[j] if 0 <= j < len(keys) else torch.zeros_like(keys[0]) for j in slots]
        window = torch.stack(rows)[None]
        encoded = predictor.norm(attention(window, window, window)[0])[0]
        left, right = encoded[:w].mean(0), encoded[w:].mean(0)
        cosine = torch.cosine_similarity(left, right, dim=0)[None]
        features = torch.cat([left, right, (left - right).abs(), left * right, cosine])
        logits.append(predictor.mlp(features)[0])
    return torch.stack(logits)


@pytest.mark.parametrize(("window", "heads"), [(4, 4), (2, 1)])
def test_equals_attention_over_each_window(window, heads, monkeypatch):
    monkeypatch.setattr(module, "GAPS", 5)  # several pieces, the last one shorter
    predictor = BoundaryPredictor(8, window, heads, hidden=6).double()
    keys = torch.randn(2, 13, 8, dtype=torch.float64)
    with torch.no_grad():
        expected = torch.stack([plain(predictor, one) for one in keys])
        torch.testing.assert_close(predictor(keys), expected)


def test_a_gap_depends_on_its_window_alone():
    predictor = BoundaryPredictor(8)
    keys = torch.randn(1, 20, 8, requires_grad=True)
    predictor(keys)[0, 10].backward()
    assert keys.grad is not None
    touched = keys.grad[0].abs().sum(-1) > 0
    assert touched.nonzero()[:, 0].tolist() == list(range(7, 15))


def test_loss_equals_its_formula_and_leaves_out_the_ends():
    logits = torch.tensor([0.3, -1.2, 2.0, 5.0], dtype=torch.float64)
    targets = torch.tensor([True, False, False, True])
    counted = torch.tensor([True, True, True, False])
    share = torch.sigmoid(logits)
    terms = torch.stack(
        [
            -1.3 * (1 - share[0]) ** 2 * share[0].log(),
            -(share[1] ** 2) * (1 - share[1]).log(),
            -(share[2] ** 2) * (1 - share[2]).log(),
        ]
    )
    torch.testing.assert_close(focal_loss(logits, targets, counted), terms.mean())


def test_targets_are_the_soft_label_cut_at_one_half():
    ratio = torch.tensor([0.0, 1.0, 1.99, 2.01, 300.0])
    soft = torch.sigmoid(2.0 * (ratio.clamp_min(1).log() - torch.tensor(2.0).log()))
    assert torch.equal(boundary_targets(ratio), soft >= 0.5)


def test_inner_gaps_are_where_the_teacher_says_something():
    assert inner_gaps(20, 2).nonzero()[:, 0].tolist() == list(range(3, 16))
    assert not bool(inner_gaps(15, 4).any()) and bool(inner_gaps(16, 4).any())


def test_learns_a_break_it_can_see():
    """Two kinds of tokens in runs: the network must find the changes."""
    generator = torch.Generator().manual_seed(0)
    kinds = torch.randn(2, 8, generator=generator)
    change = (torch.rand(400, generator=generator) < 0.1).long()
    keys = (kinds[change.cumsum(0) % 2] + 0.1 * torch.randn(400, 8, generator=generator))[None]
    targets = torch.cat([change[1:], change[:1]]).bool()[None]
    predictor = BoundaryPredictor(8, hidden=32)
    optimizer = torch.optim.Adam(predictor.parameters(), lr=5e-3)
    counted = inner_gaps(400)[None]
    for _ in range(60):
        optimizer.zero_grad()
        focal_loss(predictor(keys), targets, counted).backward()
        optimizer.step()
    right = ((predictor(keys) > 0) == targets)[counted].float().mean()
    assert right > 0.95


def test_refuses_keys_of_another_model():
    with pytest.raises(InputError, match="KV heads x head dim"):
        BoundaryPredictor(8)(torch.zeros(1, 5, 12))
    with pytest.raises(InputError, match="channels must be a multiple of 4 heads, got 10"):
        BoundaryPredictor(10)
