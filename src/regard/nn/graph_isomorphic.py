"""Attention as a graph whose tokens aggregate their neighbours with a graph network: GIN-Attention and PNA-Attention.

    A = softmax(alpha q . k / sqrt(d) + causal),  alpha learnt, 1 at first;  E = f(A), causal again

    GIN   x = the head's slice of the input, no value projection
          u_i = eps x_i + sum_j E_ij x_j,  eps learnt, 0 at first
          o_i = W_2 silu(RMSNorm(dropout(W_1 u_i)))              W_1 [m d, d], W_2 [d, m d], for each head its own
    PNA   v = W_v h;  o_i = W_2 silu(W_1 [sum; mean; max; variance of v over the neighbours of i]);  output = W_o o

A GIN layer thus replaces the linear maps W_v and W_o by a small network of each head, and W_o may be left out: the best model of
the paper has m = 1/2 and none. `regard.ops.graph_attention` has the aggregates and the choices of f.

Source: Buehler 2025, "Graph-Aware Isomorphic Attention for Adaptive Dynamics in Transformers", arXiv 2501.02393. Here the two
parts of a PNA layer are those that its text describes: the released maximum returns a token's own value. Left out: scores from
a network, differential attention, rectified scores in place of the softmax, a learnt threshold, combinations of f.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from regard._errors import InputError
from regard.nn.mixer import Mixer, State
from regard.nn.projections import Projections, merge_heads, split_heads
from regard.nn.rotary import rotate
from regard.nn.softmax_attention import SoftmaxAttention, remember
from regard.ops.graph_attention import (
    check_adjacency,
    check_aggregators,
    gin_aggregate,
    pna_aggregate,
    process_adjacency,
)
from regard.ops.linear_attention import wide


class HeadNetwork(nn.Module):
    """Two layers for each head, with SiLU between them: `W_2 silu(RMSNorm(dropout(W_1 u)))`, both with biases.

    Args:
        heads: networks.
        inputs: numbers that go in.
        hidden: width between the layers.
        dim: numbers that come out.
        norm: normalise the hidden numbers.
        dropout: on the hidden numbers, before the norm.
    """

    def __init__(
        self,
        heads: int,
        inputs: int,
        hidden: int,
        dim: int,
        *,
        norm: bool = True,
        dropout: float | int = 0.0,
    ) -> None:
        super().__init__()
        bound_in, bound_out = inputs**-0.5, hidden**-0.5
        uniform = lambda bound, *shape: nn.Parameter((2 * torch.rand(*shape) - 1) * bound)  # noqa: E731
        self.first = uniform(bound_in, heads, inputs, hidden)
        self.first_bias = uniform(bound_in, heads, 1, hidden)
        self.second = uniform(bound_out, heads, hidden, dim)
        self.second_bias = uniform(bound_out, heads, 1, dim)
        self.gain = nn.Parameter(torch.ones(heads, 1, hidden)) if norm else None
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, states: Float[Tensor, "batch heads tokens inputs"]
    ) -> Float[Tensor, "batch heads tokens dim"]:
        hidden = self.dropout(states @ self.first + self.first_bias)
        if self.gain is not None:
            size = wide(hidden).square().mean(-1, keepdim=True)
            hidden = self.gain * (wide(hidden) * torch.rsqrt(size + 1e-6)).to(hidden.dtype)
        return nn.functional.silu(hidden) @ self.second + self.second_bias


class GINAttention(SoftmaxAttention):
    """GIN-Attention with rotary positions.

    Args:
        width: of the tokens.
        heads: must divide `width`, with an even quotient.
        mlp_mult: m, the hidden width of a head's network over the head size.
        o_proj: project the heads' outputs.
        sharpening: learn alpha; 1 otherwise.
        adjacency: f, one of `regard.ops.graph_attention.ADJACENCIES`; "none" takes the softmaxed weights as they are.
        threshold: of f.
        dropout: within the network.

    Cost: 2 width^2 multiplications a token for queries and keys, 2 mlp_mult width^2 / heads for the networks, 2 width for each
    visible key; with an `adjacency` also the queries x keys weights in memory. The state holds the keys and inputs of all tokens.

    Raises:
        InputError: heads that do not divide, a multiplier that leaves no hidden number, or an unknown adjacency.

    >>> mixer = GINAttention(width=32, heads=4)
    >>> mixer(torch.randn(2, 10, 32)).shape
    torch.Size([2, 10, 32])
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        mlp_mult: float | int = 0.5,
        o_proj: bool = False,
        sharpening: bool = True,
        adjacency: str = "none",
        threshold: float | int = 0.2,
        dropout: float | int = 0.1,
    ) -> None:
        super().__init__(width, heads)
        check_adjacency(adjacency)
        dim = width // heads
        self.adjacency, self.threshold = adjacency, threshold
        del self.v_proj
        if not o_proj:
            self.o_proj = nn.Identity()
        self.alpha = nn.Parameter(torch.ones(())) if sharpening else None
        self.epsilon = nn.Parameter(torch.zeros(heads, 1, 1))
        self.network = HeadNetwork(heads, dim, _hidden(mlp_mult, dim), dim, dropout=dropout)

    def value_of(self, states: Tensor) -> Tensor:
        return split_heads(states, self.heads)

    def query_key_of(self, states: Tensor) -> tuple[Tensor, Tensor]:
        query, key = super().query_key_of(states)
        return query if self.alpha is None else self.alpha * query, key

    def mix(
        self, hidden: Tensor, valid: Tensor | None, state: State | None
    ) -> Float[Tensor, "batch heads tokens dim"]:
        own = self.value_of(hidden)
        if self.adjacency == "none":  # plain softmax attention, which instruments see
            mixed = super().mix(hidden, valid, state).to(hidden.dtype) + self.epsilon * own
        else:
            weights, states, visible = weighed(self, hidden, valid, state)
            edges = process_adjacency(weights, visible, self.adjacency, self.threshold)
            mixed = gin_aggregate(edges, wide(states), wide(own), wide(self.epsilon))
        return self.network(mixed.to(hidden.dtype))


class PNAAttention(Projections, Mixer):
    """PNA-Attention with rotary positions.

    Args:
        width: of the tokens.
        heads: must divide `width`, with an even quotient.
        aggregators: some of `regard.ops.graph_attention.AGGREGATORS`; the paper's language-model form is mean, max_norm, var,
            min_norm.
        mlp_mult: m, the hidden width of a head's network over the head size.
        sharpening: learn alpha; 1 otherwise.
        adjacency: f, one of `regard.ops.graph_attention.ADJACENCIES`.
        threshold: of f.
        neighbour: a key is a neighbour where its edge is above this.

    Cost: 4 width^2 multiplications a token for the projections, (aggregators + 1) mlp_mult width^2 / heads for the networks,
    2 width for each visible key; the maximum compares as many numbers again. The weights are queries x keys in memory, and not
    seen by instruments. The state holds keys and values of all tokens.

    Raises:
        InputError: heads that do not divide, a multiplier that leaves no hidden number, an unknown adjacency or aggregator.

    >>> mixer = PNAAttention(width=32, heads=4)
    >>> mixer(torch.randn(2, 10, 32)).shape
    torch.Size([2, 10, 32])
    """

    positional = True

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        aggregators: Sequence[str] = ("sum", "mean", "max", "var"),
        mlp_mult: float | int = 0.5,
        sharpening: bool = True,
        adjacency: str = "none",
        threshold: float | int = 0.2,
        neighbour: float | int = 0.0,
    ) -> None:
        super().__init__(width, heads, even=True)
        check_adjacency(adjacency)
        check_aggregators(aggregators)
        dim = width // heads
        self.aggregators = tuple(aggregators)
        self.adjacency, self.threshold, self.neighbour = adjacency, threshold, neighbour
        self.alpha = nn.Parameter(torch.ones(())) if sharpening else None
        self.network = HeadNetwork(
            heads, len(self.aggregators) * dim, _hidden(mlp_mult, dim), dim, norm=False
        )

    def query_key_of(self, states: Tensor) -> tuple[Tensor, Tensor]:
        query, key = super().query_key_of(states)
        return query if self.alpha is None else self.alpha * query, key

    def forward(
        self,
        hidden: Float[Tensor, "batch tokens width"],
        *,
        valid: Bool[Tensor, "batch tokens"] | None = None,
        state: State | None = None,
    ) -> Float[Tensor, "batch tokens width"]:
        weights, values, visible = weighed(self, hidden, valid, state)
        found = pna_aggregate(
            process_adjacency(weights, visible, self.adjacency, self.threshold),
            wide(values),
            wide(values[:, :, -hidden.shape[1] :]),
            aggregators=self.aggregators,
            threshold=self.neighbour,
        )
        return self.o_proj(merge_heads(self.network(found.to(hidden.dtype))))


def weighed(
    mixer: Any, hidden: Tensor, valid: Tensor | None, state: State | None
) -> tuple[
    Float[Tensor, "batch heads queries keys"],
    Float[Tensor, "batch heads keys dim"],
    Bool[Tensor, "rows 1 queries keys"],
]:
    """Softmaxed weights of new tokens over all so far, the values, and who may see whom; keys and values go into the state.

    A padding token sees itself, so that no row of weights is empty.
    """
    tokens, device = hidden.shape[1], hidden.device
    seen = int(state["seen"][0]) if state else 0
    positions = torch.arange(seen, seen + tokens, device=device)
    query, key = (rotate(part, positions) for part in mixer.query_key_of(hidden))
    value, known = mixer.value_of(hidden), valid
    if state is not None:
        key, value, known = remember(state, key, value, valid)
    keys = key.shape[2]
    visible = torch.ones(1, 1, tokens, keys, dtype=torch.bool, device=device).tril(keys - tokens)
    if known is not None:
        itself = visible & ~visible.tril(keys - tokens - 1)
        visible = visible & (known[:, None, None] | itself)
    scores = wide(query) @ wide(key).mT * query.shape[-1] ** -0.5
    return scores.masked_fill(~visible, -torch.inf).softmax(-1), value, visible


def _hidden(multiplier: float | int, dim: int) -> int:
    hidden = int(multiplier * dim)
    if hidden < 1:
        raise InputError.of("mlp_mult", given=multiplier, expected=f"at least 1 / {dim}")
    return hidden
