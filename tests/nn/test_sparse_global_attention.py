"""Sparse global attention against dense attention under the same mask."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

import regard
from regard._errors import InputError
from regard.engine import BlockSparseMask
from regard.instruments import Distance
from regard.nn import LanguageModel, LanguageModelConfig, SparseGlobalAttention
from regard.nn.sparse_global_attention import blocks_of, kept_places

WIDTH = 16


def dense(mixer: SparseGlobalAttention, hidden: torch.Tensor) -> torch.Tensor:
    place = torch.arange(hidden.shape[1])
    query, key = mixer.query_key_of(hidden)
    back = place[:, None] - place[None, :]
    seen = back <= mixer.window
    if mixer.stride is not None:
        seen = seen | (place % mixer.stride == 0)
    mixed = scaled_dot_product_attention(query, key, mixer.value_of(hidden), seen & (back >= 0))
    return mixer.output_of(mixed, hidden)


@pytest.mark.parametrize(
    ("tokens", "window", "stride"),
    [(50, 6, 16), (50, 0, 7), (400, 40, 64), (500, 130, 100), (300, 5, None), (300, 400, 32)],
)
def test_it_is_dense_attention_under_the_mask(tokens: int, window: int, stride: int | None) -> None:
    mixer = SparseGlobalAttention(WIDTH, 2, window=window, stride=stride).double()
    hidden = torch.randn(2, tokens, WIDTH, dtype=torch.float64, requires_grad=True)
    found, expected = mixer(hidden), dense(mixer, hidden)
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)
    weight = torch.randn_like(found)
    mine, theirs = (torch.autograd.grad(out, hidden, weight)[0] for out in (found, expected))
    torch.testing.assert_close(mine, theirs, atol=1e-9, rtol=0)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 500), st.integers(0, 300), st.integers(0, 200), st.integers(1, 90))
def test_blocks_are_the_rule(tokens: int, seen: int, window: int, stride: int) -> None:
    mask = blocks_of(tokens, seen, window, stride)
    found = mask.window(torch.arange(tokens))
    shown = found.visible(tokens, torch.device("cpu"))
    visible = torch.zeros(tokens, mask.keys, dtype=torch.bool)
    visible[:, found.lo : found.hi] = True if shown is None else shown[0, 0]
    key = torch.cat([kept_places(seen, window, stride), torch.arange(seen, seen + tokens)])
    back = torch.arange(seen, seen + tokens)[:, None] - key
    assert torch.equal(visible, (back >= 0) & ((back <= window) | (key % stride == 0)))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 120), st.integers(0, 30), st.integers(1, 40))
def test_what_is_kept_is_what_later_tokens_see(seen: int, window: int, stride: int) -> None:
    later = torch.arange(seen, seen + 200)[:, None]
    place = torch.arange(seen)
    visible = ((later - place <= window) | (place % stride == 0)).any(0)
    assert torch.equal(kept_places(seen, window, stride), place[visible])


@pytest.mark.parametrize("sizes", [[300, 1, 1, 198], [200, 300], [5, 295, 200]])
def test_long_parts_are_the_whole(sizes: list[int]) -> None:
    mixer = SparseGlobalAttention(WIDTH, 2, window=20, stride=32).double()
    hidden = torch.randn(2, 500, WIDTH, dtype=torch.float64)
    state: dict[str, torch.Tensor] = {}
    parts = [mixer(part, state=state) for part in hidden.split(sizes, 1)]
    torch.testing.assert_close(torch.cat(parts, 1), dense(mixer, hidden), atol=1e-10, rtol=0)
    assert state["key"].shape[2] == 20 + 15  # places 0, 32, .. 448 before the window


def test_long_texts_go_by_blocks_after_padding_too() -> None:
    mixer = SparseGlobalAttention(WIDTH, 2, window=20, stride=32).double()
    hidden = torch.randn(1, 400, WIDTH, dtype=torch.float64)
    valid = torch.arange(9)[None] >= 4
    masks, state = [], {}
    plain = mixer.attend
    mixer.attend = lambda *args, **more: masks.append(more["mask"]) or plain(*args, **more)  # type: ignore[method-assign]
    padded = torch.cat([100 * torch.ones_like(hidden[:, :4]), hidden[:, :5]], 1)
    first = mixer(padded, valid=valid, state=state)[:, 4:]
    rest = mixer(hidden[:, 5:], state=state)
    torch.testing.assert_close(
        torch.cat([first, rest], 1), dense(mixer, hidden), atol=1e-10, rtol=0
    )
    assert isinstance(mixer(hidden), torch.Tensor) and isinstance(masks[-1], BlockSparseMask)


def test_instruments_see_it() -> None:
    config = LanguageModelConfig(
        vocab_size=20,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        mixers=[["sparse_global", {"window": 3, "stride": None}]],
    )
    model, distance = LanguageModel(config).eval(), Distance()
    with regard.attach(model, distance):
        model(torch.randint(20, (1, 60)))
    (found, *_) = distance.compute().values()
    assert float(found.matrix().max()) <= 3


def test_numbers_out_of_range_are_named() -> None:
    with pytest.raises(InputError, match="window"):
        SparseGlobalAttention(16, 2, window=-1)
    with pytest.raises(InputError, match="stride"):
        SparseGlobalAttention(16, 2, stride=0)
