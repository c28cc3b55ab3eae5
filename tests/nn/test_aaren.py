"""What is particular to Aaren among the mixers; the contract is in test_mixers.py."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from regard._errors import InputError
from regard.nn import Aaren, LanguageModel, LanguageModelConfig
from regard.nn.projections import merge_heads, split_heads


@pytest.mark.parametrize("block", [1, 4, 64])
def test_is_causal_attention_with_one_query(block: int) -> None:
    mixer, hidden = Aaren(12, 3, block=block).double(), 3 * torch.randn(2, 9, 12).double()
    query = (mixer.q_proj.weight @ mixer.query).expand(2, 9, 12)
    mixed = scaled_dot_product_attention(
        split_heads(query, 3),
        split_heads(hidden @ mixer.k_proj.weight.T, 3),
        split_heads(hidden @ mixer.v_proj.weight.T, 3),
        is_causal=True,
    )
    expected = merge_heads(mixed) @ mixer.o_proj.weight.T
    torch.testing.assert_close(mixer(hidden), expected)


def test_state_is_two_numbers_and_a_value_for_each_head() -> None:
    mixer, state = Aaren(16, 2), {}
    sizes = set()
    for tokens in (1, 7, 100):
        mixer(torch.randn(1, tokens, 16), state=state)
        sizes.add(sum(part.numel() for part in state.values()))
    assert sizes == {2 * (8 + 2)}


def test_the_order_of_the_past_does_not_matter() -> None:
    mixer, hidden = Aaren(16, 2).double(), torch.randn(1, 9, 16).double()
    order = torch.tensor([*torch.randperm(8).tolist(), 8])
    torch.testing.assert_close(mixer(hidden[:, order])[:, -1], mixer(hidden)[:, -1])


def test_one_vector_more_than_softmax_attention() -> None:
    count = lambda name: sum(  # noqa: E731
        p.numel() for p in LanguageModel(LanguageModelConfig(mixers=[name])).layers.parameters()
    )
    assert count("aaren") - count("softmax") == 4 * 128


def test_mistakes_are_named() -> None:
    with pytest.raises(InputError, match="block"):
        Aaren(16, 2, block=0)
