"""The delta rule as a mixer: a key that is told twice gives its last value."""

from __future__ import annotations

import torch

from regard.nn import DeltaRule


def test_the_chunk_changes_the_speed_only() -> None:
    states, found = torch.randn(2, 45, 16).double(), []
    for chunk in (1, 7, 64):
        torch.manual_seed(0)
        found.append(DeltaRule(16, 2, chunk=chunk).double()(states))
    torch.testing.assert_close(found[1], found[0])
    torch.testing.assert_close(found[2], found[0])


def test_padding_in_the_middle_changes_nothing() -> None:
    mixer, states = DeltaRule(16, 2).double(), torch.randn(2, 20, 16).double()
    valid = torch.rand(2, 20, generator=torch.Generator().manual_seed(3)) > 0.4
    found = mixer(torch.where(valid[..., None], states, 50.0), valid=valid)
    for row in range(2):
        alone = mixer(states[row : row + 1, valid[row]])
        torch.testing.assert_close(found[row, valid[row]], alone[0], atol=1e-10, rtol=1e-10)


def test_the_state_is_one_matrix_a_head() -> None:
    mixer, state = DeltaRule(16, 2), {}
    mixer(torch.randn(3, 9, 16), state=state)
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == {
        "tail": (3, 3, 48),
        "matrix": (3, 2, 8, 8),
    }
