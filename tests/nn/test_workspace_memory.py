"""The workspace against its equations, one token at a time."""

from __future__ import annotations

import pytest
import torch

from regard._errors import InputError
from regard.nn import WorkspaceMemory


def make(**options: object) -> WorkspaceMemory:
    torch.manual_seed(0)
    return WorkspaceMemory(
        16, 2, **{"slots": 6, "active": 3, "rank": 5, "chunk": 4, **options}
    ).double()  # type: ignore[arg-type]


def by_the_token(workspace: WorkspaceMemory, hidden: torch.Tensor) -> torch.Tensor:
    outputs = []
    for row in hidden:
        slots, pending, read = workspace.slots, [], []
        for x in row:
            known = workspace.slot_norm(slots)
            share = (
                workspace.k_proj(known) @ workspace.q_proj(workspace.norm(x)) / 5**0.5
            ).softmax(0)
            found = workspace.o_proj(share @ workspace.v_proj(known))
            read.append(workspace.read_gate(x).sigmoid() * found)
            pending.append(x)
            if len(pending) == workspace.chunk:
                mean, pending = torch.stack(pending).mean(0), []
                score = known @ workspace.address_proj(mean) / 4
                lowest = slots.norm(dim=1).argsort()[: workspace.active]
                address = torch.zeros(6, dtype=torch.float64)
                address = address.scatter(0, lowest, score[lowest].softmax(0))
                weight = (workspace.write_gate(mean).sigmoid() * address)[:, None]
                slots = (1 - weight) * slots + weight * workspace.write_proj(mean)
        outputs.append(torch.stack(read))
    return torch.stack(outputs)


def test_it_is_the_equations() -> None:
    workspace, hidden = make(), torch.randn(2, 19, 16, dtype=torch.float64)
    torch.testing.assert_close(workspace(hidden), by_the_token(workspace, hidden))


def test_what_is_written_stays_and_every_text_has_its_own() -> None:
    workspace, hidden = make(), torch.randn(2, 40, 16, dtype=torch.float64)
    other = hidden.clone()
    other[0, 1] += 1
    change = (workspace(other) - workspace(hidden)).abs().amax(-1)
    assert (change[0, 2:4] == 0).all(), "the chunk that is being read is not in the slots yet"
    assert change[0, 4:].min() > 1e-12
    assert (change[1] == 0).all()


def test_writing_learns() -> None:
    workspace, hidden = make(), torch.randn(1, 9, 16, dtype=torch.float64)
    workspace(hidden)[:, 8].sum().backward()
    for layer in (workspace.write_proj, workspace.address_proj, workspace.write_gate):
        assert layer.weight.grad is not None and layer.weight.grad.abs().sum() > 0


def test_the_state_keeps_its_size() -> None:
    workspace, state = make(), {}
    for _ in range(7):
        workspace(torch.randn(2, 5, 16, dtype=torch.float64), state=state)
        assert sum(tensor.numel() for tensor in state.values()) == 2 * (6 * 16 + 16 + 1)


def test_numbers_out_of_range_are_named() -> None:
    for name, value in (("slots", 0), ("rank", 0), ("chunk", 0), ("active", 65)):
        with pytest.raises(InputError, match=name):
            WorkspaceMemory(16, 2, **{name: value})
