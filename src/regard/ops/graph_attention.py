"""Attention read as a graph: tokens are nodes, a weight A_ij is an edge from key j to query i, and j <= i keeps it causal.

    GIN     u_i = eps x_i + sum_j A_ij x_j
    PNA     [sum; mean; max; variance] of v_j over the neighbours of i, with degree D_i = sum_j A_ij (1 where that is 0):
            sum = A v,  mean = sum / D,  variance = max(A v^2 / D - mean^2, 0),  max over {j: A_ij > threshold} of each number

A weight can first be sharpened into an edge: f(A - threshold), or the largest of each row (`process_adjacency`).

Heads of a pretrained layer share one sparse graph (`sparse_attention_graph`):

    S = min(sum_h A_h, 1);   E = sigmoid(a (S - th)) where that is above e_0, else 0

so that E > 0 exactly where S > th + log(e_0 / (1 - e_0)) / a. A masked pair has S = 0: e_0 must lie above sigmoid(-a th), or
every pair would be an edge.

Source: Buehler 2025, "Graph-Aware Isomorphic Attention for Adaptive Dynamics in Transformers", arXiv 2501.02393. eps multiplies x
alone, as in the released code (a classical GIN has 1 + eps). Two deviations from that code: its maximum over neighbours returns
a token's own value, and it takes queries for the sources of edges, so that only self-loops pass its causal filter.

Cost: that of A, and queries x keys x dim for the aggregates; the maximum compares as many numbers, in blocks of queries.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import silu, softplus

from regard._errors import InputError

SHARPNESS = 10.0
"""b of the sharp soft-plus and of the sigmoid."""
TOP_SHARE = 0.1
"""Share of the visible keys that `top_k` keeps."""
BLOCK_NUMBERS = 1 << 24
"""Numbers compared at once by `neighbour_max`."""


def gin_aggregate(
    adjacency: Float[Tensor, "*batch queries keys"],
    states: Float[Tensor, "*batch keys dim"],
    own: Float[Tensor, "*batch queries dim"],
    epsilon: Float[Tensor, "*extra"] | float | int,
) -> Float[Tensor, "*batch queries dim"]:
    """`A x + eps x_own`.

    >>> x = torch.eye(2)
    >>> gin_aggregate(torch.tensor([[1.0, 0.0], [0.5, 0.5]]), x, x, 0.0)
    tensor([[1.0000, 0.0000],
            [0.5000, 0.5000]])
    """
    return adjacency @ states + epsilon * own


def _top_share(weights: Tensor, threshold: float, visible: Tensor) -> Tensor:
    """The largest weights of a row, `TOP_SHARE` of its visible keys and at least one."""
    count = (visible.sum(-1, keepdim=True) * TOP_SHARE).ceil().clamp_min(1)
    order = weights.masked_fill(~visible, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    place = order.argsort(dim=-1)
    return weights * (place < count)


ADJACENCIES: dict[str, Callable[[Tensor, float, Tensor], Tensor]] = {
    "none": lambda a, th, visible: a,
    "relu": lambda a, th, visible: (a - th).relu(),
    "silu": lambda a, th, visible: silu(a - th),
    "softplus": lambda a, th, visible: softplus(a - th),
    "sharp_softplus": lambda a, th, visible: softplus(SHARPNESS * (a - th)) / SHARPNESS,
    "sigmoid": lambda a, th, visible: torch.sigmoid(SHARPNESS * (a - th)),
    "binary": lambda a, th, visible: (a > th).to(a.dtype),
    "top_k": _top_share,
}
"""What an edge is made of. `binary` gives queries and keys no gradient; `top_k` keeps weights as they are, not ones."""


def process_adjacency(
    weights: Float[Tensor, "*batch queries keys"],
    visible: Bool[Tensor, "*mask queries keys"],
    name: str,
    threshold: float | int = 0.2,
) -> Float[Tensor, "*batch queries keys"]:
    """`f(A - threshold)` on the visible pairs, 0 elsewhere; `name` is one of `ADJACENCIES`.

    >>> weights = torch.tensor([[1.0, 0.0], [0.25, 0.75]])
    >>> process_adjacency(weights, torch.ones(2, 2).tril() > 0, "relu")
    tensor([[0.8000, 0.0000],
            [0.0500, 0.5500]])

    Raises:
        InputError: an unknown name.
    """
    check_adjacency(name)
    processed = ADJACENCIES[name](weights, float(threshold), visible.expand(weights.shape))
    return processed.masked_fill(~visible, 0)


def check_adjacency(name: str) -> None:
    """Raises InputError unless `name` is one of `ADJACENCIES`."""
    if name not in ADJACENCIES:
        raise InputError.unknown("adjacency", given=name, known=ADJACENCIES)


AGGREGATORS = ("sum", "mean", "max", "var", "max_norm", "min_norm")
"""What `pna_aggregate` knows; `max_norm` and `min_norm` are the neighbour whose vector is longest and shortest."""


def pna_aggregate(
    adjacency: Float[Tensor, "*batch queries keys"],
    values: Float[Tensor, "*batch keys dim"],
    own: Float[Tensor, "*batch queries dim"],
    *,
    aggregators: Sequence[str] = ("sum", "mean", "max", "var"),
    threshold: float | int = 0.0,
) -> Float[Tensor, "*batch queries out"]:
    """Aggregates of each query's neighbours side by side.

    Args:
        adjacency: A, 0 where there is no edge.
        values: of the keys.
        own: the queries' own values; `max`, `max_norm` and `min_norm` of a query without neighbours.
        aggregators: some of `AGGREGATORS`, in the order of the result.
        threshold: a key is a neighbour where A is above it.

    Raises:
        InputError: no aggregators, or an unknown one.

    >>> values = torch.tensor([[1.0], [3.0]])
    >>> pna_aggregate(torch.tensor([[1.0, 0.0], [0.5, 0.5]]), values, values)
    tensor([[1., 1., 1., 0.],
            [2., 2., 3., 1.]])
    """
    check_aggregators(aggregators)
    total = adjacency @ values
    degree = adjacency.sum(-1, keepdim=True)
    degree = torch.where(degree == 0, 1.0, degree)
    mean = total / degree
    neighbours = adjacency > threshold
    found = []
    for name in aggregators:
        if name == "sum":
            found.append(total)
        elif name == "mean":
            found.append(mean)
        elif name == "var":
            found.append((adjacency @ values.square() / degree - mean.square()).clamp_min(0))
        elif name == "max":
            found.append(neighbour_max(values, neighbours, own))
        else:
            sign = 1 if name == "max_norm" else -1
            found.append(_by_norm(sign, values, neighbours, own))
    return torch.cat(found, -1)


def check_aggregators(names: Sequence[str]) -> None:
    """Raises InputError unless there are names and all are of `AGGREGATORS`."""
    if isinstance(names, str) or not names or any(name not in AGGREGATORS for name in names):
        raise InputError.of(
            "aggregators", given=names, expected=f"a list of {', '.join(AGGREGATORS)}"
        )


def neighbour_max(
    values: Float[Tensor, "*batch keys dim"],
    neighbours: Bool[Tensor, "*batch queries keys"],
    own: Float[Tensor, "*batch queries dim"],
) -> Float[Tensor, "*batch queries dim"]:
    """The largest of each number over the neighbours of a query, its own where it has none.

    >>> values = torch.tensor([[5.0, 0.0], [1.0, 2.0]])
    >>> neighbour_max(values, torch.tensor([[False, False], [True, True]]), values)
    tensor([[5., 0.],
            [5., 2.]])
    """
    queries = neighbours.shape[-2]
    size = max(1, BLOCK_NUMBERS // max(1, values.numel()))
    columns = values.mT.contiguous()
    with (
        torch.no_grad()
    ):  # where the largest are; the numbers themselves are gathered, which has a gradient
        blocks = []
        for start in range(0, queries, size):
            shown = neighbours[..., start : start + size, None, :]
            apart = torch.where(shown, columns.unsqueeze(-3), -torch.inf)
            blocks.append(apart.argmax(-1))
        index = torch.cat(blocks, -2)
    found = values.gather(-2, index)
    return torch.where(neighbours.any(-1, keepdim=True), found, own)


def _by_norm(sign: int, values: Tensor, neighbours: Tensor, own: Tensor) -> Tensor:
    norms = sign * values.norm(dim=-1).unsqueeze(-2)
    index = torch.where(neighbours, norms, -torch.inf).argmax(-1, keepdim=True)
    found = values.gather(-2, index.expand(*index.shape[:-1], values.shape[-1]))
    return torch.where(neighbours.any(-1, keepdim=True), found, own)


def shared_attention(
    weights: Float[Tensor, "*batch heads queries keys"],
) -> Float[Tensor, "*batch queries keys"]:
    """`min(sum_h A_h, 1)`: how much any head attends."""
    return weights.sum(-3).clamp_max(1.0)


def sparse_attention_graph(
    shared: Float[Tensor, "*batch queries keys"],
    *,
    threshold: float | int = 0.1,
    steepness: float | int = 10.0,
    keep: float | int = 0.6,
) -> Float[Tensor, "*batch queries keys"]:
    """`E = sigmoid(steepness (S - threshold))` where that is above `keep`, else 0: edges from keys to queries.

    >>> sparse_attention_graph(torch.tensor([[0.5, 0.1405, 0.1406, 0.0]]))
    tensor([[0.9820, 0.0000, 0.6001, 0.0000]])

    Raises:
        InputError: a steepness that is not above 0, or numbers by which pairs without attention would be edges.
    """
    check_graph(threshold, steepness, keep)
    edges = torch.sigmoid(steepness * (shared - threshold))
    return edges * (edges > keep)


def edge_cut(threshold: float | int, steepness: float | int, keep: float | int) -> float:
    """The attention above which there is an edge: `threshold + log(keep / (1 - keep)) / steepness`."""
    return threshold + math.log(keep / (1 - keep)) / steepness


def check_graph(threshold: float | int, steepness: float | int, keep: float | int) -> None:
    """Raises InputError unless these numbers make a sparse graph."""
    if not steepness > 0:
        raise InputError.of("steepness", given=steepness, expected="above 0")
    least = 1 / (1 + math.exp(min(steepness * threshold, 700)))
    if not least <= keep < 1:
        raise InputError.of(
            "keep",
            given=keep,
            expected=f"in [{least:.4g}, 1)",
            fix="below that, pairs without any attention would be edges",
        )


def self_loops(
    edges: Float[Tensor, "*batch queries keys"],
) -> Float[Tensor, "*batch queries keys"]:
    """The edges of each token to itself alone; the last query stands at the last key.

    >>> self_loops(torch.ones(1, 2, 3))
    tensor([[[0., 1., 0.],
             [0., 0., 1.]]])
    """
    queries, keys = edges.shape[-2:]
    own = torch.ones(queries, keys, dtype=torch.bool, device=edges.device)
    offset = keys - queries
    return edges * (own.tril(offset) & own.triu(offset))


@dataclass(frozen=True, slots=True)
class AttentionGraph:
    """Edges of a sparse graph of tokens, and what they are like.

    Attributes:
        source: key of each edge.
        target: query of each edge.
        weight: of each edge.
        queries: nodes that edges lead to.
        density: edges over pairs with key <= query.
        degree: mean edges into a query.
        loops: share of the edges that lead from a token to itself.
        distance: mean of target - source.
    """

    source: Int[Tensor, " edges"]
    target: Int[Tensor, " edges"]
    weight: Float[Tensor, " edges"]
    queries: int
    density: float
    degree: float
    loops: float
    distance: float


def attention_graph(edges: Float[Tensor, "queries keys"]) -> AttentionGraph:
    """The edge list of one text's graph with its statistics; the last query stands at the last key.

    >>> graph = attention_graph(torch.tensor([[0.9, 0.0], [0.7, 0.8]]))
    >>> graph.source.tolist(), graph.target.tolist(), graph.density
    ([0, 0, 1], [0, 1, 1], 1.0)
    """
    queries, keys = edges.shape
    place, source = edges.nonzero(as_tuple=True)
    target = place + keys - queries
    count, lengths = len(source), (target - source).double()
    pairs = sum(range(keys - queries + 1, keys + 1))
    return AttentionGraph(
        source,
        target,
        edges[place, source],
        queries,
        density=count / pairs if pairs else 0.0,
        degree=count / queries if queries else 0.0,
        loops=float((lengths == 0).double().mean()) if count else 0.0,
        distance=float(lengths.mean()) if count else 0.0,
    )
