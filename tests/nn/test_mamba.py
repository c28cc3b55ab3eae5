"""The Mamba block against transformers' own."""

from __future__ import annotations

import pytest
import torch
from transformers import MambaConfig
from transformers.models.mamba.modeling_mamba import MambaMixer

from regard._errors import InputError
from regard.nn import Mamba


def twin(mixer: Mamba, width: int) -> MambaMixer:
    config = MambaConfig(hidden_size=width, state_size=16, num_hidden_layers=1)
    other = MambaMixer(config, 0).eval()
    with torch.no_grad():
        for mine, theirs in (
            (mixer.in_proj.weight, other.in_proj.weight),
            (mixer.convolution.weight[:, None], other.conv1d.weight),
            (mixer.convolution_bias, other.conv1d.bias),
            (mixer.x_proj.weight, other.x_proj.weight),
            (mixer.step_proj.weight, other.dt_proj.weight),
            (mixer.step_proj.bias, other.dt_proj.bias),
            (mixer.log_rate, other.A_log),
            (mixer.skip, other.D),
            (mixer.out_proj.weight, other.out_proj.weight),
        ):
            theirs.copy_(mine)
    return other


def test_it_is_the_block_of_transformers() -> None:
    mixer = Mamba(32, 4)
    torch.nn.init.normal_(mixer.convolution_bias)
    torch.nn.init.normal_(mixer.skip)
    hidden = torch.randn(2, 70, 32, requires_grad=True)
    other = twin(mixer, 32)
    found, expected = mixer(hidden), other(hidden)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    weight = torch.randn_like(found)
    mine, theirs = (torch.autograd.grad(out, hidden, weight)[0] for out in (found, expected))
    torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-3)


def test_it_begins_as_published() -> None:
    mixer = Mamba(32, 4)
    assert torch.allclose(mixer.rate, -torch.arange(1.0, 17).expand(64, -1))
    steps = torch.nn.functional.softplus(mixer.step_proj.bias)
    assert steps.min() > 0.99e-3 and steps.max() < 0.101
    assert (
        sum(p.numel() for p in mixer.parameters())
        == 32 * 128 + 64 * (4 + 1) + 64 * (2 + 32) + (2 * 64 + 64) + 64 * 16 + 64 + 64 * 32
    )


def test_the_state_keeps_its_size() -> None:
    mixer, state, sizes = Mamba(32, 4), {}, set()
    for _ in range(9):
        mixer(torch.randn(1, 5, 32), state=state)
        sizes.add(sum(tensor.numel() for tensor in state.values()))
    assert sizes == {64 * 16 + 3 * 64}


@pytest.mark.parametrize("name", ["state_size", "kernel", "expansion", "step_rank"])
def test_numbers_below_one_are_named(name: str) -> None:
    with pytest.raises(InputError, match=name):
        Mamba(32, 4, **{name: 0})
