"""The scan against the loop over tokens."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from regard._errors import InputError
from regard.ops import linear_recurrence


def by_the_token(decay, inputs, initial):
    state, states = initial, []
    for t in range(inputs.shape[-2]):
        state = decay[..., t, :] * state + inputs[..., t, :]
        states.append(state)
    return torch.stack(states, -2)


def draw(tokens: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    kind = {"dtype": torch.float64, "generator": generator}
    decay = torch.rand(2, 3, tokens, 5, **kind)
    return decay, torch.randn(2, 3, tokens, 5, **kind), torch.randn(2, 3, 5, **kind)


@given(st.integers(1, 40), st.integers(0, 99))
def test_it_is_the_loop(tokens, seed):
    decay, inputs, initial = draw(tokens, seed)
    found = linear_recurrence(decay, inputs, initial)
    torch.testing.assert_close(found, by_the_token(decay, inputs, initial), atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(
        linear_recurrence(decay, inputs), by_the_token(decay, inputs, 0 * initial)
    )


def test_decays_of_nought_and_of_almost_nought_do_no_harm():
    decay, inputs, initial = draw(33)
    decay[..., 7, :] = 0
    decay[..., 9:12, :] = 1e-300
    decay[..., 20, :] = -2
    found = linear_recurrence(decay, inputs, initial)
    torch.testing.assert_close(found, by_the_token(decay, inputs, initial), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("cut", [1, 8, 16])
def test_parts_are_the_whole(cut):
    decay, inputs, initial = draw(17)
    whole = linear_recurrence(decay, inputs, initial)
    first = linear_recurrence(decay[..., :cut, :], inputs[..., :cut, :], initial)
    rest = linear_recurrence(decay[..., cut:, :], inputs[..., cut:, :], first[..., -1, :])
    torch.testing.assert_close(torch.cat([first, rest], -2), whole)


def test_the_future_changes_not_a_bit():
    decay, inputs, _ = (part.float() for part in draw(30))
    before = linear_recurrence(decay, inputs)
    inputs[..., 20:, :] *= 1e6
    decay[..., 20:, :] = 3
    after = linear_recurrence(decay, inputs)
    assert torch.equal(before[..., :20, :], after[..., :20, :])
    assert not torch.equal(before[..., 20:, :], after[..., 20:, :])


def test_gradients():
    decay, inputs, initial = (part[0].requires_grad_() for part in draw(6))
    assert torch.autograd.gradcheck(linear_recurrence, (decay, inputs, initial))


def test_no_tokens_are_refused():
    with pytest.raises(InputError, match="1 or more tokens"):
        linear_recurrence(torch.ones(0, 2), torch.ones(0, 2))
