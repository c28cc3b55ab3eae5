"""What is particular to attention as a graph among the mixers; the contract is in test_mixers.py."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import silu

import regard
from regard._errors import InputError
from regard.engine import Block, Method
from regard.instruments import Entropy
from regard.nn import GINAttention, LanguageModel, LanguageModelConfig, PNAAttention
from regard.nn.projections import merge_heads, split_heads
from regard.nn.rotary import rotate
from regard.ops.graph_attention import ADJACENCIES, pna_aggregate, process_adjacency

TOKENS, WIDTH, HEADS = 11, 24, 3
CAUSAL = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()


def hidden() -> torch.Tensor:
    return torch.randn(
        2, TOKENS, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )


def shaken(mixer: nn.Module) -> nn.Module:
    for parameter in mixer.parameters():
        if parameter.ndim < 2 or not parameter.any():
            nn.init.normal_(parameter, std=0.5)
    return mixer.double().eval()


def weights_of(mixer: GINAttention | PNAAttention, states: torch.Tensor) -> torch.Tensor:
    places = torch.arange(states.shape[1])
    causal = CAUSAL[: len(places), : len(places)]
    query = rotate(split_heads(states @ mixer.q_proj.weight.T, HEADS), places)
    key = rotate(split_heads(states @ mixer.k_proj.weight.T, HEADS), places)
    scores = mixer.alpha * query @ key.mT / (WIDTH // HEADS) ** 0.5
    return scores.masked_fill(~causal, -torch.inf).softmax(-1)


def network_of(mixer: GINAttention | PNAAttention, head: int, states: torch.Tensor, norm: bool):
    """One head's network as a chain of torch's own layers."""
    net = mixer.network
    first, second = nn.Linear(*net.first.shape[1:]), nn.Linear(*net.second.shape[1:])
    with torch.no_grad():
        first.weight, first.bias = (
            nn.Parameter(net.first[head].T),
            nn.Parameter(net.first_bias[head, 0]),
        )
        second.weight, second.bias = (
            nn.Parameter(net.second[head].T),
            nn.Parameter(net.second_bias[head, 0]),
        )
    middle = first(states)
    if norm:
        scale = nn.RMSNorm(middle.shape[-1], eps=1e-6).double()
        scale.weight = nn.Parameter(net.gain[head, 0])
        middle = scale(middle)
    return second(silu(middle))


@pytest.mark.parametrize("o_proj", [False, True])
def test_gin_by_its_equations(o_proj: bool) -> None:
    mixer, states = shaken(GINAttention(WIDTH, HEADS, o_proj=o_proj)), hidden()
    weights, parts = weights_of(mixer, states), split_heads(states, HEADS)
    heads = [
        network_of(
            mixer, h, mixer.epsilon[h] * parts[:, h] + weights[:, h] @ parts[:, h], norm=True
        )
        for h in range(HEADS)
    ]
    expected = torch.cat(heads, -1)
    if o_proj:
        expected = expected @ mixer.o_proj.weight.T
    torch.testing.assert_close(mixer(states), expected)


def test_pna_by_its_equations() -> None:
    mixer, states = shaken(PNAAttention(WIDTH, HEADS)), hidden()
    weights, values = (
        weights_of(mixer, states),
        split_heads(states @ mixer.v_proj.weight.T, HEADS),
    )
    mean = weights @ values
    var = weights @ values**2 - mean**2
    parts = torch.cat([mean, mean, values.cummax(2).values, var], -1)
    heads = [network_of(mixer, h, parts[:, h], norm=False) for h in range(HEADS)]
    expected = torch.cat(heads, -1) @ mixer.o_proj.weight.T
    torch.testing.assert_close(mixer(states), expected)


def test_with_a_network_that_does_nothing_gin_is_the_weighted_sum() -> None:
    mixer, states = GINAttention(WIDTH, HEADS).double().eval(), hidden()
    mixer.network = nn.Identity()
    parts = split_heads(states, HEADS)
    torch.testing.assert_close(mixer(states), merge_heads(weights_of(mixer, states) @ parts))


@pytest.mark.parametrize("name", sorted(set(ADJACENCIES) - {"none"}))
@pytest.mark.parametrize("kind", [GINAttention, PNAAttention])
def test_every_adjacency_is_causal_and_streams(kind: type[nn.Module], name: str) -> None:
    mixer, states = shaken(kind(WIDTH, HEADS, adjacency=name, threshold=0.12)), hidden()
    whole, state = mixer(states), {}
    parts = [mixer(part, state=state) for part in states.split([4, 1, 6], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-9, rtol=1e-9)
    other = states.clone()
    other[:, 6:] += 1
    torch.testing.assert_close(mixer(other)[:, :6], whole[:, :6])


def test_the_form_for_language_models() -> None:
    names = ("mean", "max_norm", "var", "min_norm")
    mixer = shaken(PNAAttention(WIDTH, HEADS, aggregators=names, neighbour=0.1))
    assert mixer(hidden()).isfinite().all()
    assert mixer.network.first.shape == (HEADS, 4 * WIDTH // HEADS, WIDTH // HEADS // 2)


def test_parameters() -> None:
    count = lambda mixer: sum(p.numel() for p in mixer.parameters())  # noqa: E731
    dim, half = WIDTH // HEADS, WIDTH // HEADS // 2
    network = HEADS * (dim * half + half + half + half * dim + dim)
    assert count(GINAttention(WIDTH, HEADS)) == 2 * WIDTH**2 + network + HEADS + 1
    assert count(GINAttention(WIDTH, HEADS, o_proj=True, sharpening=False)) == (
        3 * WIDTH**2 + network + HEADS
    )


def test_dropout_is_for_training() -> None:
    mixer, states = GINAttention(WIDTH, HEADS).double(), hidden()
    assert not torch.equal(mixer(states), mixer(states))
    mixer.eval()
    assert torch.equal(mixer(states), mixer(states))


class Reader(Method):
    """Keeps the weights that it sees, at their keys."""

    reads_only = True

    def __init__(self) -> None:
        self.rows: list[torch.Tensor] = []

    def weights(self, block: Block) -> None:
        after = block.call.keys - block.keys.stop
        self.rows.append(nn.functional.pad(block.weights, (block.keys.start, after)).clone())


class FirstOnly(Method):
    """All attention to the first key."""

    def weights(self, block: Block) -> torch.Tensor:
        return torch.zeros_like(block.weights).index_fill(-1, torch.tensor([0]), 1)


class Alone(nn.Module):
    """A mixer as a model of one block."""

    def __init__(self, mixer: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"self_attn": mixer})])

    def forward(self, states: torch.Tensor, **rest: object) -> torch.Tensor:
        return self.layers[0]["self_attn"](states, **rest)


KINDS = [(kind, name) for kind in (GINAttention, PNAAttention) for name in ADJACENCIES]


@pytest.mark.parametrize(("kind", "name"), KINDS)
def test_instruments_see_the_softmax_and_change_nothing(
    kind: type[nn.Module], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("regard.engine.blockwise.block_size", lambda call: 4)
    mixer = shaken(kind(WIDTH, HEADS, adjacency=name, threshold=0.12))
    model, states = Alone(mixer), hidden()
    plain, reader = model(states), Reader()
    with regard.attach(model, reader):
        torch.testing.assert_close(model(states), plain)
    torch.testing.assert_close(torch.cat(reader.rows, 2), weights_of(mixer, states))


@pytest.mark.parametrize("kind", [GINAttention, PNAAttention])
def test_they_see_new_tokens_after_a_state_and_no_padding(kind: type[nn.Module]) -> None:
    mixer, states = shaken(kind(WIDTH, HEADS, adjacency="relu")), hidden()
    model, state, reader = Alone(mixer), {}, Reader()
    valid = torch.ones(2, TOKENS, dtype=torch.bool)
    valid[0, :3] = False
    model(states[:, :7], valid=valid[:, :7], state=state)
    with regard.attach(model, reader):
        model(states[:, 7:], valid=valid[:, 7:], state=state)
    shorter = states[:1, 3:]
    expected = weights_of(mixer, shorter)[:, :, 4:]  # rotary scores know distances only
    (found,) = reader.rows
    assert not found[0, :, :, :3].any()
    torch.testing.assert_close(found[:1, :, :, 3:], expected)
    torch.testing.assert_close(found[1:], weights_of(mixer, states[1:])[:, :, 7:])


@pytest.mark.parametrize("name", ["none", "sigmoid"])
@pytest.mark.parametrize("kind", [GINAttention, PNAAttention])
def test_what_a_method_does_to_the_weights_is_what_is_aggregated(
    kind: type[nn.Module], name: str
) -> None:
    mixer, states = shaken(kind(WIDTH, HEADS, adjacency=name)), hidden()
    model = Alone(mixer)
    with regard.attach(model, FirstOnly()):
        found = model(states)
    weights = torch.zeros(2, HEADS, TOKENS, TOKENS, dtype=torch.float64)
    weights[..., 0] = 1
    edges = process_adjacency(weights, CAUSAL, name)
    values = mixer.value_of(states)
    mixed = {
        GINAttention: lambda: edges @ values + mixer.epsilon * values,
        PNAAttention: lambda: pna_aggregate(edges, values, values),
    }[kind]()
    expected = mixer.o_proj(merge_heads(mixer.network(mixed)))
    torch.testing.assert_close(found, expected)


def test_sampled_rows_are_rows_of_the_softmax() -> None:
    mixer, states = shaken(PNAAttention(WIDTH, HEADS)), hidden()
    model, reader = Alone(mixer), Reader()
    plain = model(states)
    with regard.attach(model, reader, rows=1 / 3):
        assert torch.equal(model(states), plain)
    weights = weights_of(mixer, states)
    for row in torch.cat(reader.rows, 2).unbind(2):
        assert ((weights - row[:, :, None]).abs().amax((0, 1, 3)) < 1e-12).sum() == 1


@pytest.mark.parametrize("mixer", ["gin", ("gin", {"adjacency": "relu"}), "pna"])
def test_observing_a_language_model(mixer: object) -> None:
    model = LanguageModel(LanguageModelConfig(mixers=[mixer], num_hidden_layers=2)).eval().double()
    ids = torch.randint(256, (1, 20))
    seen = regard.observe(model, ids, Entropy())["entropy"].values
    states = model.layers[0].input_layernorm(model.embed_tokens(ids))
    query, key = model.layers[0].self_attn.query_key_of(states)
    query, key = (rotate(part, torch.arange(20)) for part in (query, key))
    scores = query @ key.mT / query.shape[-1] ** 0.5
    causal = torch.ones(20, 20).tril() > 0
    weights = scores.masked_fill(~causal, -torch.inf).softmax(-1)
    expected = torch.special.entr(weights).sum(-1).mean(-1)[0]
    torch.testing.assert_close(seen["", 0], expected, check_dtype=False, rtol=1e-6, atol=1e-6)
    assert len(seen) == 2


def test_mistakes_are_named() -> None:
    with pytest.raises(InputError, match="mlp_mult"):
        GINAttention(WIDTH, HEADS, mlp_mult=0.01)
    with pytest.raises(InputError, match="adjacency"):
        PNAAttention(WIDTH, HEADS, adjacency="sparse")
    with pytest.raises(InputError, match="aggregators"):
        PNAAttention(WIDTH, HEADS, aggregators=["median"])
