from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from regard.metrics import kl_divergence, negative_log_likelihood, top1_agreement


def test_kl_equals_torch_distributions():
    p, q = torch.randn(3, 5, 11, dtype=torch.float64), torch.randn(3, 5, 11, dtype=torch.float64)
    expected = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=p), torch.distributions.Categorical(logits=q)
    )
    torch.testing.assert_close(kl_divergence(p, q), expected, atol=1e-12, rtol=0)


def test_kl_closed_form_of_two_outcomes():
    p = torch.tensor([0.9, 0.1], dtype=torch.float64).log()
    q = torch.tensor([0.5, 0.5], dtype=torch.float64).log()
    expected = 0.9 * torch.log(torch.tensor(1.8)) + 0.1 * torch.log(torch.tensor(0.2))
    assert kl_divergence(p, q).item() == pytest.approx(expected.item(), abs=1e-7)


def test_kl_leaves_out_what_the_reference_rules_out():
    p = torch.tensor([0.0, 0.0, -torch.inf])
    assert kl_divergence(p, torch.zeros(3)).item() == pytest.approx(
        torch.log(torch.tensor(1.5)).item(), abs=1e-6
    )
    assert kl_divergence(p, p).item() == 0.0


@given(st.integers(0, 10_000))
def test_kl_is_never_negative_and_ignores_a_shift(seed: int):
    generator = torch.Generator().manual_seed(seed)
    p, q = torch.randn(2, 4, 7, generator=generator, dtype=torch.float64)
    divergence = kl_divergence(p, q)
    assert (divergence >= 0).all()
    torch.testing.assert_close(kl_divergence(p + 3, q - 2), divergence, atol=1e-12, rtol=0)


def test_nll_equals_cross_entropy():
    logits, targets = torch.randn(6, 9, dtype=torch.float64), torch.randint(0, 9, (6,))
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(negative_log_likelihood(logits, targets), expected)


def test_half_precision_is_computed_in_float32():
    logits = torch.randn(4, 1000).bfloat16()
    targets = torch.randint(0, 1000, (4,))
    found = negative_log_likelihood(logits, targets)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, negative_log_likelihood(logits.float(), targets))


def test_top1_agreement():
    p = torch.tensor([[1.0, 2.0], [3.0, 0.0], [0.0, 0.0]])
    q = torch.tensor([[0.0, 9.0], [0.0, 1.0], [0.0, 0.0]])
    assert top1_agreement(p, q).tolist() == [True, False, True]
