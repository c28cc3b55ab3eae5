"""Chunk-routed experts: one of them alone, the tokens that choose among them, and how far the published form looks ahead."""

from __future__ import annotations

import pytest
import torch

from regard._errors import InputError
from regard.nn import ChunkMoE, WholeChunkMoE
from regard.nn.feed_forward import SwiGLU


def make(kind: type[ChunkMoE] = ChunkMoE, **options: object) -> ChunkMoE:
    torch.manual_seed(0)
    return kind(16, 2, **{"chunk": 8, "inner": 24, **options}).double()  # type: ignore[arg-type]


def hidden(tokens: int = 37, rows: int = 2) -> torch.Tensor:
    return torch.randn(rows, tokens, 16, dtype=torch.float64)


def test_one_expert_is_a_feed_forward_layer() -> None:
    mixer, layer = make(experts=1, active=1), SwiGLU(16, 24).double()
    with torch.no_grad():
        layer.gate_proj.weight.copy_(mixer.gate_proj[0])
        layer.up_proj.weight.copy_(mixer.up_proj[0])
        layer.down_proj.weight.copy_(mixer.down_proj[0])
    states = hidden()
    torch.testing.assert_close(mixer(states), layer(states))
    assert mixer.router is None and set(dict(mixer.named_parameters())) == {
        "gate_proj",
        "up_proj",
        "down_proj",
    }


def test_a_chunk_is_routed_on_the_mean_of_the_one_before() -> None:
    mixer, states = make(temperature=0.5), hidden(20)
    assert mixer.router is not None
    found = mixer.logits(states)
    summary = [mixer.start.expand(2, -1), states[:, :8].mean(1), states[:, 8:16].mean(1)]
    for chunk, mean in enumerate(summary):
        here = found[:, 8 * chunk : 8 * chunk + 8]
        torch.testing.assert_close(here, (mixer.router(mean) / 0.5)[:, None].expand_as(here))


def test_the_published_router_reads_its_own_chunk_and_so_looks_ahead() -> None:
    states = hidden(20)
    whole = make(WholeChunkMoE)
    assert whole.router is not None
    means = [states[:, :8].mean(1), states[:, 8:16].mean(1), states[:, 16:].mean(1)]
    found = whole.logits(states)
    for chunk, mean in enumerate(means):
        torch.testing.assert_close(found[:, 8 * chunk], whole.router(mean))
    other = states.clone()
    other[:, 12:] *= -3
    assert not torch.allclose(whole(other)[:, 8:12], whole(states)[:, 8:12])
    torch.testing.assert_close(make()(other)[:, :12], make()(states)[:, :12])
    with pytest.raises(InputError, match="ChunkMoE goes token by token"):
        whole(states, state={})


def test_padding_counts_neither_in_chunks_nor_in_the_balance() -> None:
    for kind in (ChunkMoE, WholeChunkMoE):
        mixer, states = make(kind, balance=1.0).train(), hidden(30)
        valid = torch.ones(2, 30, dtype=torch.bool)
        valid[0, :11] = False
        valid[1, 25:] = False
        padded = torch.where(valid[..., None], states, 50.0)
        output = mixer(padded, valid=valid)
        loss = mixer.losses["balance"]
        alone = [mixer(states[:1, 11:]), mixer(states[1:, :25])]
        torch.testing.assert_close(output[0, 11:], alone[0][0])
        torch.testing.assert_close(output[1, :25], alone[1][0])
        gates = torch.cat([mixer.gates(states[:1, 11:])[0], mixer.gates(states[1:, :25])[0]])
        logits = torch.cat([mixer.logits(states[:1, 11:])[0], mixer.logits(states[1:, :25])[0]])
        expected = 4 * (gates.mean(0) * logits.softmax(-1).mean(0)).sum() - 1
        torch.testing.assert_close(loss, expected)


def test_the_balance_loss_spreads_the_work() -> None:
    states = (
        0.3 * hidden(64, rows=16) + 1
    )  # all chunks are alike: without the loss two experts do everything
    least = {}
    for balance in (0.0, 1.0):
        mixer = make(balance=balance).train()
        optimiser = torch.optim.Adam(mixer.parameters(), lr=0.02)
        for _ in range(150):
            output = mixer(states)
            loss = (output - states).square().mean() + mixer.losses["balance"]
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        least[balance] = float(mixer.gates(states).detach().mean((0, 1)).min())
    assert least[0.0] < 0.02 < 0.05 < least[1.0]


def test_the_state_keeps_its_size() -> None:
    mixer, state = make(), {}
    for _ in range(7):
        mixer(hidden(5), state=state)
        assert sum(tensor.numel() for tensor in state.values()) == 2 * (16 + 16 + 1)


def test_numbers_out_of_range_are_named() -> None:
    for name, value in (("chunk", 0), ("inner", 0), ("active", 5), ("temperature", 0.0)):
        with pytest.raises(InputError, match=name):
            ChunkMoE(16, 2, **{name: value})
