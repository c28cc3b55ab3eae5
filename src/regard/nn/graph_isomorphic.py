"""Attention as a graph whose tokens aggregate their neighbours with a graph network: GIN-Attention and PNA-Attention.

    A = softmax(alpha q . k / sqrt(d) + causal),  alpha learnt, 1 at first;  E = f(A), causal again

    GIN   x = the head's slice of the input, no value projection
          u_i = eps x_i + sum_j E_ij x_j,  eps learnt, 0 at first
          o_i = W_2 silu(RMSNorm(dropout(W_1 u_i)))              W_1 [m d, d], W_2 [d, m d], for each head its own
    PNA   v = W_v h;  o_i = W_2 silu(W_1 [sum; mean; max; variance of v over the neighbours of i]);  output = W_o o

A GIN layer thus replaces the linear maps W_v and W_o by a small network of each head, and W_o may be left out: the best model of
the paper has m = 1/2 and none. `regard.ops.graph_attention` has the aggregates and the choices of f. Both are softmax attention
with another `attend`, and their weights go through `regard`'s engine, so that instruments and interventions attach.

Source: Buehler 2025, "Graph-Aware Isomorphic Attention for Adaptive Dynamics in Transformers", arXiv 2501.02393. Here the two
parts of a PNA layer are those that its text describes: the released maximum returns a token's own value. Left out: scores from
a network, differential attention, rectified scores in place of the softmax, a learnt threshold, combinations of f.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from regard._errors import InputError
from regard.attach.session import dispatch
from regard.engine import AttentionCall, blockwise, dense
from regard.nn.projections import split_heads
from regard.nn.softmax_attention import SoftmaxAttention
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


class GraphAttention(SoftmaxAttention):
    """Base of both: softmax attention whose weights are the edges of a graph. Subclasses define `attend`.

    Args:
        width: of the tokens.
        heads: must divide `width`, with an even quotient.
        sharpening: learn alpha; 1 otherwise.
        adjacency: f, one of `regard.ops.graph_attention.ADJACENCIES`; "none" takes the softmaxed weights as they are.
        threshold: of f.

    Raises:
        InputError: heads that do not divide, or an unknown adjacency.
    """

    network: HeadNetwork

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        sharpening: bool,
        adjacency: str,
        threshold: float | int,
    ) -> None:
        super().__init__(width, heads)
        check_adjacency(adjacency)
        self.adjacency, self.threshold = adjacency, threshold
        self.alpha = nn.Parameter(torch.ones(())) if sharpening else None

    def query_key_of(self, states: Tensor) -> tuple[Tensor, Tensor]:
        query, key = super().query_key_of(states)
        return query if self.alpha is None else self.alpha * query, key

    def edges(
        self, query: Tensor, key: Tensor, *, mask: Any = None, **rest: Any
    ) -> Float[Tensor, "batch heads queries keys"]:
        """E of new tokens over all so far, from weights that methods have seen and may have changed."""
        (batch, heads, queries, _), keys = query.shape, key.shape[2]
        visible = torch.ones(1, 1, queries, keys, dtype=torch.bool, device=query.device)
        visible = visible.tril(keys - queries) if mask is None else mask.visible()
        query, key = wide(query), wide(key)
        one_hot = torch.eye(keys, dtype=query.dtype, device=query.device)
        call = AttentionCall.make(
            query,
            key,
            one_hot.expand(batch, heads, keys, keys),  # attention to them is the weights
            mask=mask,
            module=self,
            query_offset=keys - queries,
            **rest,
        )
        given = (call.key, call.value, call.mask)

        def weights_of(call: AttentionCall) -> Tensor:
            same = zip(given, (call.key, call.value, call.mask), strict=True)
            if dense.can_attend(call) and all(old is new for old, new in same):
                scores = call.query @ call.key.mT * call.scaling
                return scores.masked_fill(~visible, -torch.inf).softmax(-1)
            output = blockwise.attend(call, (), ())  # a method has put in something else
            assert output is not None
            return output

        call.fused = weights_of
        return process_adjacency(dispatch(self, call), visible, self.adjacency, self.threshold)


class GINAttention(GraphAttention):
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
    visible key. With an `adjacency` also the queries x keys weights in memory, and methods that read every row of weights take
    keys multiplications more for each of them; to what reads values or head outputs these are then the tokens' indicators and
    the weights. The state holds the keys and inputs of all tokens.

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
        super().__init__(
            width, heads, sharpening=sharpening, adjacency=adjacency, threshold=threshold
        )
        dim = width // heads
        del self.v_proj
        if not o_proj:
            self.o_proj = nn.Identity()
        self.epsilon = nn.Parameter(torch.zeros(heads, 1, 1))
        self.network = HeadNetwork(heads, dim, _hidden(mlp_mult, dim), dim, dropout=dropout)

    def value_of(self, states: Tensor) -> Tensor:
        return split_heads(states, self.heads)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, **rest: Any) -> Tensor:
        own = value[:, :, -query.shape[2] :]
        if self.adjacency == "none":  # plain softmax attention, which needs no weights in memory
            mixed = super().attend(query, key, value, **rest) + self.epsilon * own
        else:
            edges = self.edges(query, key, **rest)
            mixed = gin_aggregate(edges, wide(value), wide(own), wide(self.epsilon))
        return self.network(mixed.to(value.dtype))


class PNAAttention(GraphAttention):
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
    2 width for each visible key; the maximum compares as many numbers again. The weights are queries x keys in memory, and
    methods that read every row of them take keys multiplications more for each; what reads values or head outputs sees the
    tokens' indicators and the weights. The state holds keys and values of all tokens.

    Raises:
        InputError: heads that do not divide, a multiplier that leaves no hidden number, an unknown adjacency or aggregator.

    >>> mixer = PNAAttention(width=32, heads=4)
    >>> mixer(torch.randn(2, 10, 32)).shape
    torch.Size([2, 10, 32])
    """

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
        super().__init__(
            width, heads, sharpening=sharpening, adjacency=adjacency, threshold=threshold
        )
        check_aggregators(aggregators)
        dim = width // heads
        self.aggregators, self.neighbour = tuple(aggregators), neighbour
        self.network = HeadNetwork(
            heads, len(self.aggregators) * dim, _hidden(mlp_mult, dim), dim, norm=False
        )

    def attend(self, query: Tensor, key: Tensor, value: Tensor, **rest: Any) -> Tensor:
        found = pna_aggregate(
            self.edges(query, key, **rest),
            wide(value),
            wide(value[:, :, -query.shape[2] :]),
            aggregators=self.aggregators,
            threshold=self.neighbour,
        )
        return self.network(found.to(value.dtype))


def _hidden(multiplier: float | int, dim: int) -> int:
    hidden = int(multiplier * dim)
    if hidden < 1:
        raise InputError.of("mlp_mult", given=multiplier, expected=f"at least 1 / {dim}")
    return hidden
