"""Fading linear attention against its loop and its matrix."""

from __future__ import annotations

import pytest
import torch

from regard._errors import InputError
from regard.ops import decayed_linear_attention
from regard.ops.linear_attention import causal_product


def draw(tokens: int = 23, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    kind = {"dtype": torch.float64, "generator": generator}
    query, key = (torch.randn(2, 3, tokens, 5, **kind) for _ in range(2))
    value = torch.randn(2, 3, tokens, 4, **kind)
    fade = -torch.rand(2, 3, tokens, **kind)
    return query, key, value, fade, torch.randn(2, 3, 5, 4, **kind)


def by_the_token(query, key, value, fade, memory):
    read = []
    for t in range(query.shape[2]):
        written = key[:, :, t, :, None] * value[:, :, t, None, :]
        memory = fade[:, :, t, None, None].exp() * memory + written
        read.append((query[:, :, t, None] @ memory)[:, :, 0])
    return torch.stack(read, 2), memory


@pytest.mark.parametrize("chunk", [1, 7, 23, 64])
def test_it_is_the_loop(chunk):
    query, key, value, fade, memory = draw()
    found, after = decayed_linear_attention(query, key, value, fade, memory=memory, chunk=chunk)
    expected, last = by_the_token(query, key, value, fade, memory)
    torch.testing.assert_close(found, expected, atol=1e-11, rtol=1e-11)
    torch.testing.assert_close(after, last, atol=1e-11, rtol=1e-11)


def test_without_fading_it_is_the_causal_product():
    query, key, value, fade, memory = draw()
    found = decayed_linear_attention(query, key, value, 0 * fade, memory=memory, chunk=8)
    expected = causal_product(query, key, value, before=memory, chunk=8)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("cut", [1, 9, 22])
def test_parts_are_the_whole(cut):
    query, key, value, fade, _ = draw()
    whole, end = decayed_linear_attention(query, key, value, fade, chunk=6)
    parts = [part.split([cut, 23 - cut], 2) for part in (query, key, value, fade)]
    first, memory = decayed_linear_attention(*(part[0] for part in parts), chunk=6)
    rest, last = decayed_linear_attention(*(part[1] for part in parts), memory=memory, chunk=6)
    torch.testing.assert_close(torch.cat([first, rest], 2), whole)
    torch.testing.assert_close(last, end)


def test_strong_fading_overflows_nowhere():
    query, key, value, fade, memory = (part.float() for part in draw(200))
    fade = (100 * fade).requires_grad_()
    found, after = decayed_linear_attention(query, key, value, fade, memory=memory)
    (gradient,) = torch.autograd.grad(found.sum() + after.sum(), fade)
    assert bool(found.isfinite().all() and after.isfinite().all() and gradient.isfinite().all())


def test_the_future_changes_not_a_bit():
    query, key, value, fade, _ = (part.float() for part in draw(30))
    before, _ = decayed_linear_attention(query, key, value, fade, chunk=8)
    value[:, :, 20:] *= 1e6
    fade[:, :, 20:] -= 9
    after, _ = decayed_linear_attention(query, key, value, fade, chunk=8)
    assert torch.equal(before[:, :, :20], after[:, :, :20])
    assert not torch.equal(before[:, :, 20:], after[:, :, 20:])


def test_gradients():
    parts = tuple(part[:1, :1].requires_grad_() for part in draw(6))
    run = lambda q, k, v, a, m: decayed_linear_attention(q, k, v, a, memory=m, chunk=4)  # noqa: E731
    assert torch.autograd.gradcheck(run, parts)


def test_what_does_not_fit_is_named():
    query, key, value, fade, _ = draw()
    with pytest.raises(InputError, match=r"chunk must be 1 or more, got 0"):
        decayed_linear_attention(query, key, value, fade, chunk=0)
