"""What is particular to flow attention among the mixers; the contract is in test_mixers.py."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import linear

from regard._errors import InputError
from regard.nn import BidirectionalFlowAttention, FlowAttention
from regard.nn.projections import merge_heads, split_heads
from regard.ops import flow_attention, flow_attention_step


def projected(mixer: torch.nn.Module, hidden: torch.Tensor) -> list[torch.Tensor]:
    layers = (mixer.q_proj, mixer.k_proj, mixer.v_proj)
    return [split_heads(linear(hidden, one.weight, one.bias), mixer.heads) for one in layers]


@pytest.mark.parametrize("clip", [(-1.0, 1.0), None])
def test_is_a_chain_of_steps_between_its_projections(clip: tuple[float, float] | None) -> None:
    mixer, hidden = FlowAttention(12, 3, clip=clip).double(), torch.randn(2, 9, 12).double()
    query, key, value = projected(mixer, 3 * hidden)
    state, parts = None, []
    for t in range(9):
        one, state = flow_attention_step(
            query[:, :, t], key[:, :, t], value[:, :, t], state, clip=clip
        )
        parts.append(one)
    mixed = merge_heads(torch.stack(parts, 2))
    expected = linear(mixed, mixer.o_proj.weight, mixer.o_proj.bias)
    torch.testing.assert_close(mixer(3 * hidden), expected)


def test_clipping_matters() -> None:
    torch.manual_seed(0)
    mixer, hidden = FlowAttention(12, 3), 3 * torch.randn(2, 9, 12)
    clipped = mixer(hidden)
    mixer.clip = None
    assert (mixer(hidden) - clipped).abs().max() > 1e-3


def test_state_does_not_grow() -> None:
    mixer, state = FlowAttention(16, 2), {}
    sizes = set()
    for tokens in (1, 7, 100):
        mixer(torch.randn(1, tokens, 16), state=state)
        sizes.add(sum(part.numel() for part in state.values()))
    assert sizes == {2 * (8 * 8 + 4 * 8 + 1) + 1}
    assert state["tokens"].tolist() == [108]


def test_both_directions() -> None:
    mixer = BidirectionalFlowAttention(12, 3, clip=[-1.0, 1.0]).double()
    hidden = torch.randn(2, 9, 12).double()
    mixed = flow_attention(*projected(mixer, hidden), clip=(-1.0, 1.0))
    expected = linear(merge_heads(mixed), mixer.o_proj.weight, mixer.o_proj.bias)
    torch.testing.assert_close(mixer(hidden), expected)
    other = hidden.clone()
    other[:, -1] += 1
    assert (mixer(other) - mixer(hidden))[:, 0].abs().max() > 1e-6, "it looks ahead"


def test_both_directions_are_deaf_to_padding() -> None:
    mixer, hidden = BidirectionalFlowAttention(12, 3).double(), torch.randn(2, 9, 12).double()
    valid = torch.arange(9) < torch.tensor([[9], [5]])
    padded = mixer(torch.where(valid[..., None], hidden, 100.0), valid=valid)
    torch.testing.assert_close(padded[1:, :5], mixer(hidden[1:, :5]))
    torch.testing.assert_close(padded[:1], mixer(hidden[:1]))


def test_every_parameter_of_both_directions_learns() -> None:
    mixer = BidirectionalFlowAttention(12, 3)
    mixer(torch.randn(2, 9, 12)).square().mean().backward()
    for name, parameter in mixer.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_mistakes_are_named() -> None:
    with pytest.raises(InputError, match="chunk"):
        FlowAttention(16, 2, chunk=0)
    with pytest.raises(InputError, match="heads"):
        BidirectionalFlowAttention(16, 3)
