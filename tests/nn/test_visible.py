"""The mask of a window by blocks is the plain rule, and attention under it the dense one's."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from regard.engine import BlockSparseMask
from regard.nn import SlidingWindowAttention
from regard.nn._visible import BLOCK, causal_rule, window_mask


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 500), st.integers(0, 300), st.integers(1, 400), st.integers(0, 200))
def test_blocks_are_the_rule(queries: int, past: int, window: int, prefix: int) -> None:
    keys = queries + past
    mask = window_mask(queries, keys, window, prefix)
    found = mask.window(torch.arange(queries))
    shown = found.visible(queries, torch.device("cpu"))
    seen = torch.zeros(queries, keys, dtype=torch.bool)
    seen[:, found.lo : found.hi] = True if shown is None else shown[0, 0]
    query, key = torch.arange(past, keys)[:, None], torch.arange(keys)[None, :]
    assert torch.equal(seen, (key <= query) & ((query - key < window) | (key < prefix)))


@pytest.mark.parametrize("past", [0, 70])
def test_a_long_text_takes_the_blocks_and_gives_the_dense_result(past: int) -> None:
    torch.manual_seed(0)
    tokens, window = 3 * BLOCK + 5, 40
    keys = tokens + past
    assert isinstance(causal_rule(tokens, None, keys, window=window), BlockSparseMask)
    mixer = SlidingWindowAttention(32, 4, window=window).double()
    hidden = torch.randn(2, keys, 32, dtype=torch.float64, requires_grad=True)
    state: dict[str, torch.Tensor] = {}
    first = [mixer(hidden[:, :past], state=state)] if past else []
    output = torch.cat([*first, mixer(hidden[:, past:], state=state)], 1)

    from regard.nn.rotary import rotate

    positions = torch.arange(keys)
    query, key = (rotate(part, positions) for part in mixer.query_key_of(hidden))
    apart = positions[:, None] - positions[None, :]
    mixed = scaled_dot_product_attention(
        query, key, mixer.value_of(hidden), (apart >= 0) & (apart < window)
    )
    expected = mixer.output_of(mixed, hidden)
    torch.testing.assert_close(output, expected, atol=1e-10, rtol=0)
    weight = torch.randn_like(output)
    found, wanted = (torch.autograd.grad(out, hidden, weight)[0] for out in (output, expected))
    torch.testing.assert_close(found, wanted, atol=1e-9, rtol=0)
