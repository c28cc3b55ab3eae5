"""The neural memory as a layer: what its state holds, what its parts do, and that training reaches through its own steps."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import conv1d

from regard._errors import InputError
from regard.nn import NeuralMemory
from regard.nn.neural_memory import FastWeightMemory, ShortConvolution


def hidden(batch: int = 2, tokens: int = 21, width: int = 16) -> torch.Tensor:
    return torch.randn(batch, tokens, width)


def test_the_state_does_not_grow() -> None:
    mixer = NeuralMemory(16, 2, chunk=4)
    state: dict[str, torch.Tensor] = {}
    mixer(hidden(tokens=3), state=state)
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    mixer(hidden(tokens=50), state=state)
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == shapes
    assert shapes["weights.0"] == (2, 2, 32, 8)
    assert state["count"].tolist() == [57 % 4] * 2  # the learned tokens count


def test_padding_in_the_middle_changes_nothing() -> None:
    mixer, states = NeuralMemory(16, 2, chunk=4).double(), hidden().double()
    valid = torch.rand(2, 21, generator=torch.Generator().manual_seed(3)) > 0.4
    state: dict[str, torch.Tensor] = {}
    noisy = torch.where(valid[..., None], states, 50.0)
    pieces = zip(noisy.split([6, 1, 9, 5], 1), valid.split([6, 1, 9, 5], 1), strict=True)
    found = torch.cat([mixer(part, valid=known, state=state) for part, known in pieces], 1)
    for row in range(2):
        alone = mixer(states[row : row + 1, valid[row]])
        torch.testing.assert_close(found[row, valid[row]], alone[0], atol=1e-10, rtol=1e-10)


def test_training_reaches_keys_and_values_through_the_inner_gradient() -> None:
    memory = FastWeightMemory(16, 2, chunk=4)
    memory(hidden())[:, -1].square().sum().backward()
    assert memory.decay_gate is not None
    for projection in (
        memory.k_proj,
        memory.v_proj,
        memory.step_gate.linear,
        memory.decay_gate.linear,
    ):
        assert projection.weight.grad is not None
        assert projection.weight.grad.norm() > 1e-6


def test_the_memory_says_what_it_was_told() -> None:
    torch.manual_seed(1)
    memory = FastWeightMemory(
        16, 1, depth=1, chunk=1, momentum=False, decay=False, kernel=1, clip=None
    )
    with torch.no_grad():
        memory.step_gate.linear.weight.zero_()
        memory.step_gate.linear.bias.fill_(50.0)  # theta = 1/2: a key of norm 1 is written at once
        memory.q_proj.weight.copy_(memory.k_proj.weight)
        memory.convolution.weight.fill_(1.0)
    states = hidden(tokens=5)
    value = torch.nn.functional.silu(memory.v_proj(states))
    torch.testing.assert_close(memory(states), value, atol=1e-5, rtol=1e-4)


def test_an_empty_memory_says_nothing() -> None:
    memory = FastWeightMemory(16, 2)
    assert not memory.read(hidden(), memory.empty(2)).any()


def test_momentum_decay_and_learned_tokens_can_be_left_out() -> None:
    states, found = hidden(), []
    for options in (
        {},
        {"momentum": False},
        {"decay": False},
        {"persistent": 0},
        {"depth": 1},
        {"kernel": 1},
    ):
        torch.manual_seed(0)
        mixer = NeuralMemory(16, 2, chunk=4, **options)  # type: ignore[arg-type]
        names = {
            name.split(".")[1] for name, _ in mixer.named_parameters() if name.startswith("memory")
        }
        assert ("momentum_gate" in names) == options.get("momentum", True)
        assert ("decay_gate" in names) == options.get("decay", True)
        found.append(mixer(states))
    for other in found[1:]:
        assert (other - found[0]).abs().max() > 1e-4


def test_the_convolution_is_torchs() -> None:
    convolution, states = ShortConvolution(6, 4), torch.randn(2, 9, 6)
    found, tail = convolution(states)
    padded = torch.nn.functional.pad(states.mT, (3, 0))
    expected = conv1d(padded, convolution.weight[:, None], groups=6).mT
    torch.testing.assert_close(found, expected)
    assert torch.equal(tail, states[:, -3:])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"depth": 0}, "depth must be 1 or more"),
        ({"chunk": 0}, "chunk must be 1 or more"),
        ({"largest_step": 0.0}, "largest_step must be above 0"),
        ({"persistent": -1}, "persistent must be 0 or more"),
    ],
)
def test_bad_options_are_named(options: dict[str, object], said: str) -> None:
    with pytest.raises(InputError, match=said):
        NeuralMemory(16, 2, **options)  # type: ignore[arg-type]
