"""What is particular to linear attention among the mixers; the contract is in test_mixers.py."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import elu

from regard._errors import InputError
from regard.nn import LinearAttention
from regard.nn.projections import merge_heads, split_heads


def test_is_linear_attention_between_its_projections() -> None:
    mixer, hidden = LinearAttention(12, 3).double(), torch.randn(2, 9, 12).double()
    query, key, value = (
        split_heads(hidden @ proj.weight.T, 3)
        for proj in (mixer.q_proj, mixer.k_proj, mixer.v_proj)
    )
    weights = ((elu(query) + 1) @ (elu(key) + 1).mT).tril()
    mixed = weights / (weights.sum(-1, keepdim=True) + 1e-6) @ value
    expected = merge_heads(mixed) @ mixer.o_proj.weight.T
    torch.testing.assert_close(mixer(hidden), expected)


def test_state_does_not_grow() -> None:
    mixer, state = LinearAttention(16, 2), {}
    sizes = set()
    for tokens in (1, 7, 100):
        mixer(torch.randn(1, tokens, 16), state=state)
        sizes.add(sum(part.numel() for part in state.values()))
    assert sizes == {2 * 8 * (8 + 1)}


def test_mistakes_are_named() -> None:
    with pytest.raises(InputError, match="chunk"):
        LinearAttention(16, 2, chunk=0)
