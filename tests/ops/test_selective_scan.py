"""The scan in blocks against the loop over tokens."""

from __future__ import annotations

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regard._errors import InputError
from regard.ops import selective_scan

MODULE = sys.modules["regard.ops.selective_scan"]


def by_the_token(inputs, step, rate, write, read, initial):
    state, outputs = initial, []
    for t in range(inputs.shape[1]):
        fade = torch.exp(step[:, t, :, None] * rate)
        state = fade * state + (step[:, t] * inputs[:, t])[..., None] * write[:, t, None]
        outputs.append(torch.einsum("bcn,bn->bc", state, read[:, t]))
    return torch.stack(outputs, 1), state


def draw(tokens, channels=3, state=4, batch=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    kind = {"dtype": torch.float64, "generator": generator}
    inputs = torch.randn(batch, tokens, channels, **kind)
    step = torch.rand(batch, tokens, channels, **kind)
    rate = -4 * torch.rand(channels, state, **kind)
    write, read = torch.randn(2, batch, tokens, state, **kind).unbind()
    return inputs, step, rate, write, read, torch.randn(batch, channels, state, **kind)


@settings(deadline=None)
@given(st.integers(1, 70), st.integers(0, 99))
def test_it_is_the_loop(tokens, seed):
    parts = draw(tokens, seed=seed)
    for found, expected in zip(selective_scan(*parts), by_the_token(*parts), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-11, rtol=1e-11)
    parts = (*parts[:-1], 0 * parts[-1])
    torch.testing.assert_close(selective_scan(*parts[:-1]), by_the_token(*parts))


def test_many_channels_go_in_several_rounds(monkeypatch):
    parts = draw(150)
    whole = selective_scan(*parts)
    monkeypatch.setattr(MODULE, "ROOM", 1)
    torch.testing.assert_close(selective_scan(*parts), whole)
    monkeypatch.setattr(MODULE, "BLOCK", 7)
    torch.testing.assert_close(selective_scan(*parts), whole)


@pytest.mark.parametrize("cut", [1, 16, 40])
def test_parts_are_the_whole(cut):
    inputs, step, rate, write, read, initial = draw(50)
    whole, last = selective_scan(inputs, step, rate, write, read, initial)
    at, state = [], initial
    for part in (slice(cut), slice(cut, None)):
        output, state = selective_scan(
            inputs[:, part], step[:, part], rate, write[:, part], read[:, part], state
        )
        at.append(output)
    torch.testing.assert_close(torch.cat(at, 1), whole)
    torch.testing.assert_close(state, last)


def test_steps_of_nought_leave_the_state_and_long_ones_clear_it():
    inputs, step, rate, write, read, initial = draw(40)
    rate = rate - 0.1
    step[:, 10:30] = 0
    short = [torch.cat([part[:, :10], part[:, 30:]], 1) for part in (inputs, step, write, read)]
    _, expected = selective_scan(short[0], short[1], rate, short[2], short[3], initial)
    torch.testing.assert_close(
        selective_scan(inputs, step, rate, write, read, initial)[1], expected
    )
    step[:, 35] = 1e6  # every decay underflows here
    found = selective_scan(inputs, step, rate, write, read, initial)
    torch.testing.assert_close(found, by_the_token(inputs, step, rate, write, read, initial))


def test_the_future_changes_nothing():
    parts = draw(60)
    before = selective_scan(*parts)[0]
    for part in (parts[0], parts[1], parts[3], parts[4]):
        part[:, 37:] = torch.rand_like(part[:, 37:])
    after = selective_scan(*parts)[0]
    torch.testing.assert_close(after[:, :37], before[:, :37], atol=1e-12, rtol=0)
    assert not torch.allclose(after[:, 37:], before[:, 37:])


def test_gradients(monkeypatch):
    monkeypatch.setattr(MODULE, "BLOCK", 3)
    parts = [part.requires_grad_() for part in draw(7, channels=2, state=2, batch=1)]
    assert torch.autograd.gradcheck(selective_scan, parts)


def test_no_tokens_are_refused():
    parts = draw(3)
    with pytest.raises(InputError, match="1 or more tokens"):
        selective_scan(*(p[:, :0] for p in parts[:2]), parts[2], *(p[:, :0] for p in parts[3:5]))
