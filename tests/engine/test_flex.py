"""FlexAttention's BlockMask, built from block lists, is the same pattern."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from regard.engine import flex, waves
from regard.engine.block_sparse import BlockSparseMask, from_lists
from regard.sparse import Pattern, Power, SlidingTokens, Strided


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(
    ("pattern", "queries", "keys"),
    [
        (Power(window=1, block=16), 128, 128),
        (SlidingTokens(window=20, sinks=3, block=16), 100, 100),
        (Strided(window=1, stride=3, block=16), 48, 112),
    ],
    ids=["power", "tokens", "continued"],
)
def test_the_same_numbers(
    pattern: Pattern, queries: int, keys: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the definition as written, without the compiler, which cannot trace the tests' shape checks
    module = "torch.nn.attention.flex_attention"
    monkeypatch.setattr(f"{module}._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    mask = pattern.mask(queries, keys)
    assert isinstance(mask, BlockSparseMask) and flex.can_attend(mask)
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, queries, 16, generator=generator)
    k, v = (torch.randn(2, 2, keys, 16, generator=generator) for _ in range(2))
    blocks = flex.block_mask(mask, queries, torch.device("cpu"))
    assert flex.block_mask(mask, queries, torch.device("cpu")) is blocks
    named = torch.zeros(len(mask.blocks), -(-keys // 16), dtype=torch.int32)
    for i, listed in enumerate(mask.blocks):
        named[i, listed] = 1
    assert torch.equal(blocks.to_dense()[0, 0], named)
    found = flex_attention(q, k, v, block_mask=blocks, scale=0.2, enable_gqa=True)
    ours = waves.attend(q, k, v, mask.plan(queries), 0.2)
    torch.testing.assert_close(ours, found, atol=2e-6, rtol=0)


def test_blocks_that_flex_attention_does_not_have() -> None:
    assert not flex.can_attend(from_lists([[0], [0, 1]], 8, 9, offset=3))
    assert not flex.can_attend(from_lists([[0, 3]], 8, 8, key_size=1))
