"""Graph operators against loops over nodes and edges, and closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regard._errors import InputError
from regard.ops.graph_attention import (
    ADJACENCIES,
    AGGREGATORS,
    BLOCK_NUMBERS,
    attention_graph,
    edge_cut,
    gin_aggregate,
    neighbour_max,
    pna_aggregate,
    process_adjacency,
    self_loops,
    shared_attention,
    sparse_attention_graph,
)

F64 = torch.float64


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def causal(tokens: int) -> torch.Tensor:
    return torch.ones(tokens, tokens, dtype=torch.bool).tril()


def attention(*batch: int, tokens: int = 9, seed: int = 0) -> torch.Tensor:
    scores = 2 * draw(*batch, tokens, tokens, seed=seed)
    return scores.masked_fill(~causal(tokens), -torch.inf).softmax(-1)


def test_gin_is_a_scatter_over_edges() -> None:
    weights, x = attention(2), draw(2, 9, 4, seed=1)
    expected = 0.3 * x
    for b, i, j in weights.nonzero().tolist():
        expected[b, i] += weights[b, i, j] * x[b, j]
    torch.testing.assert_close(gin_aggregate(weights, x, x, 0.3), expected)


def test_pna_by_loops() -> None:
    edges = process_adjacency(attention(2, 3), causal(9), "relu", 0.5)
    assert bool((edges.sum(-1) == 0).any()), "a case without neighbours belongs to the test"
    values = draw(2, 3, 9, 4, seed=1)
    found = pna_aggregate(edges, values, values, aggregators=AGGREGATORS).unflatten(-1, (6, 4))
    for b in range(2):
        for h in range(3):
            for i in range(9):
                row, v = edges[b, h, i], values[b, h]
                near = [j for j in range(9) if row[j] > 0]
                total = sum((row[j] * v[j] for j in near), torch.zeros(4, dtype=F64))
                degree = float(row.sum()) or 1.0
                mean = total / degree
                square = sum((row[j] * v[j] ** 2 for j in near), torch.zeros(4, dtype=F64)) / degree
                lengths = [float(v[j].norm()) for j in near]
                expected = [
                    total,
                    mean,
                    torch.stack([v[j] for j in near]).amax(0) if near else v[i],
                    (square - mean**2).clamp_min(0),
                    v[near[lengths.index(max(lengths))]] if near else v[i],
                    v[near[lengths.index(min(lengths))]] if near else v[i],
                ]
                order = [AGGREGATORS.index(n) for n in ("sum", "mean", "max", "var")] + [4, 5]
                for place, one in zip(order, expected, strict=True):
                    torch.testing.assert_close(found[b, h, i, place], one)


def test_mean_is_sum_where_rows_sum_to_one_and_variance_is_that_of_the_weights() -> None:
    weights, values = attention(2), draw(2, 9, 4, seed=1)
    total, mean, var = pna_aggregate(
        weights, values, values, aggregators=("sum", "mean", "var")
    ).chunk(3, -1)
    torch.testing.assert_close(total, mean)
    spread = (values[:, None] - mean[:, :, None]) ** 2
    torch.testing.assert_close(var, (weights[..., None] * spread).sum(2))


def test_the_maximum_is_of_the_neighbours_not_of_the_token() -> None:
    values = torch.tensor([[9.0], [1.0], [2.0]], dtype=F64)
    found = neighbour_max(values, causal(3), values)
    assert found.flatten().tolist() == [9.0, 9.0, 9.0]
    torch.testing.assert_close(
        neighbour_max(draw(2, 7, 3), causal(7).expand(2, 7, 7), draw(2, 7, 3)),
        draw(2, 7, 3).cummax(1).values,
    )


def test_blocks_of_queries_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    values, near = draw(2, 9, 4), attention(2) > 0.2
    whole = neighbour_max(values, near, values)
    monkeypatch.setattr("regard.ops.graph_attention.BLOCK_NUMBERS", 3 * values.numel())
    assert 9 * values.numel() < BLOCK_NUMBERS  # so the first was one block
    torch.testing.assert_close(neighbour_max(values, near, values), whole)


@pytest.mark.parametrize("name", ["sum", "mean", "max", "var"])
def test_gradients(name: str) -> None:
    weights, values = attention(tokens=5), draw(5, 3, seed=1)
    check = lambda a, v: pna_aggregate(a.tril(), v, v, aggregators=[name])  # noqa: E731
    weights = weights + 0.1  # away from the edge between neighbour and none
    assert torch.autograd.gradcheck(check, (weights.requires_grad_(), values.requires_grad_()))
    mix = lambda a, v, e: gin_aggregate(a, v, v, e)  # noqa: E731
    epsilon = torch.tensor(0.2, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(mix, (weights, values, epsilon))


@pytest.mark.parametrize("name", sorted(ADJACENCIES))
def test_no_edge_leads_back_in_time(name: str) -> None:
    edges = process_adjacency(attention(2, tokens=12), causal(12), name)
    assert not edges.triu(1).any()
    assert edges.tril().any()


def test_each_edge_is_its_function_of_the_weight() -> None:
    weights, all_of = torch.tensor([[0.5, 0.2, 0.1]], dtype=F64), torch.ones(1, 3) > 0
    beyond = weights - 0.2
    expected = {
        "none": weights,
        "relu": torch.tensor([[0.3, 0.0, 0.0]], dtype=F64),
        "silu": beyond / (1 + torch.exp(-beyond)),
        "softplus": torch.log1p(torch.exp(beyond)),
        "sharp_softplus": torch.log1p(torch.exp(10 * beyond)) / 10,
        "sigmoid": 1 / (1 + torch.exp(-10 * beyond)),
        "binary": torch.tensor([[1.0, 0.0, 0.0]], dtype=F64),
        "top_k": torch.tensor([[0.5, 0.0, 0.0]], dtype=F64),
    }
    assert set(expected) == set(ADJACENCIES)
    for name, edges in expected.items():
        torch.testing.assert_close(process_adjacency(weights, all_of, name), edges)


def test_top_k_keeps_a_share_of_what_is_visible() -> None:
    weights = attention(2, tokens=40)
    edges = process_adjacency(weights, causal(40), "top_k")
    counts = (edges > 0).sum(-1)
    assert (counts == torch.tensor([math.ceil(0.1 * (i + 1) - 1e-9) for i in range(40)])).all()
    for row, kept in zip(weights.flatten(0, 1), edges.flatten(0, 1), strict=True):
        assert row[kept == 0].max() <= row[kept > 0].min()


@settings(max_examples=60, deadline=None)
@given(
    st.floats(0.02, 0.5),
    st.floats(1, 40),
    st.floats(0.5, 0.95),
    st.integers(0, 100),
)
def test_an_edge_exactly_where_attention_is_above_the_cut(
    threshold: float, steepness: float, keep: float, seed: int
) -> None:
    shared = shared_attention(attention(3, tokens=8, seed=seed))
    edges = sparse_attention_graph(shared, threshold=threshold, steepness=steepness, keep=keep)
    cut = edge_cut(threshold, steepness, keep)
    clear = (shared - cut).abs() > 1e-9
    assert torch.equal((edges > 0)[clear], (shared > cut)[clear])
    assert not edges.triu(1).any()


def test_the_cut_of_the_paper() -> None:
    assert edge_cut(0.1, 10, 0.6) == pytest.approx(0.1 + math.log(1.5) / 10, abs=1e-15)


def test_heads_are_summed_and_capped() -> None:
    weights = attention(2, 3)
    torch.testing.assert_close(shared_attention(weights), weights.sum(1).clamp(max=1))
    assert float(weights.sum(1).max()) > 1


def test_self_loops_of_new_tokens() -> None:
    edges = torch.rand(2, 3, 8)
    found = self_loops(edges)
    for i in range(3):
        assert torch.equal(found[:, i, 5 + i], edges[:, i, 5 + i])
    assert int((found != 0).sum()) == 6


def test_the_edge_list_makes_the_matrix_again_and_counts_it() -> None:
    edges = sparse_attention_graph(shared_attention(attention(4, tokens=12)))
    graph = attention_graph(edges)
    again = torch.zeros_like(edges)
    again[graph.target, graph.source] = graph.weight
    assert torch.equal(again, edges)
    count = int((edges > 0).sum())
    assert graph.density == count / 78 and graph.degree == count / 12
    assert graph.loops == int((edges.diagonal() > 0).sum()) / count
    later = attention_graph(edges[-3:])
    assert torch.equal(later.target.unique(), graph.target.unique()[-3:])
    assert later.density == int((edges[-3:] > 0).sum()) / (10 + 11 + 12)


def test_a_graph_without_edges() -> None:
    graph = attention_graph(torch.zeros(3, 3))
    assert (graph.density, graph.degree, graph.loops, graph.distance) == (0, 0, 0, 0)


def test_mistakes_are_named() -> None:
    weights = attention(1)
    with pytest.raises(InputError, match="did you mean sigmoid"):
        process_adjacency(weights, causal(9), "sigmoyd")
    for names in ([], ["sum", "median"], "sum"):
        with pytest.raises(InputError, match="aggregators"):
            pna_aggregate(weights, weights, weights, aggregators=names)
    with pytest.raises(InputError, match="without any attention would be edges"):
        sparse_attention_graph(weights, keep=0.2)  # below sigmoid(-1) = 0.269
    with pytest.raises(InputError, match="steepness"):
        sparse_attention_graph(weights, steepness=0)
