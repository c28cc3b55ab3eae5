"""Flow attention: conservation, the explicit matrix, the token-by-token loop, and what padding must not do."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from regard._errors import InputError
from regard.ops import (
    causal_flow_attention,
    conserved_flows,
    flow_attention,
    flow_attention_step,
)

EPS = 1e-6
CLIPS = [None, (-1.0, 1.0)]


def draw(
    *shape: int, count: int = 3, seed: int = 0, scale: float = 1.0
) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        scale * torch.randn(*shape, dtype=torch.float64, generator=generator) for _ in range(count)
    )


def by_matrix(query, key, value, clip) -> torch.Tensor:
    """One head, `[tokens, dim]` each, written with the matrix of capacities and its weights."""
    q, k = torch.sigmoid(query), torch.sigmoid(key)
    n, m = len(q), len(k)
    total = lambda x: x.sum(0) + EPS  # noqa: E731
    incoming, outgoing = (q + EPS) @ total(k), (k + EPS) @ total(q)
    conserved_in = (q + EPS) @ total(k / outgoing[:, None])
    conserved_out = (k + EPS) @ total(q / incoming[:, None])
    if clip is not None:
        conserved_out = conserved_out.clamp(*clip)
    competition = conserved_out.exp() / conserved_out.exp().sum() * m
    weights = (
        (q @ k.T) / incoming[:, None] * competition * torch.sigmoid(conserved_in * n / m)[:, None]
    )
    return weights @ value


def by_loop(query, key, value, clip) -> torch.Tensor:
    """One head, token by token, every sum kept by name."""
    outputs = []
    sum_k = sum_q = sum_kb = sum_qa = torch.zeros(query.shape[1], dtype=query.dtype)
    sum_exp, sum_kv = 0.0, torch.zeros(query.shape[1], value.shape[1], dtype=query.dtype)
    for t in range(1, len(query) + 1):
        q, k, v = torch.sigmoid(query[t - 1]), torch.sigmoid(key[t - 1]), value[t - 1]
        sum_k, sum_q = sum_k + k, sum_q + q
        incoming, outgoing = (q + EPS) @ (sum_k + EPS), (k + EPS) @ (sum_q + EPS)
        sum_kb, sum_qa = sum_kb + k * t / outgoing, sum_qa + q * t / incoming
        conserved_in = (q + EPS) @ (sum_kb + EPS) / t
        conserved_out = (k + EPS) @ (sum_qa + EPS) / t
        if clip is not None:
            conserved_out = conserved_out.clamp(*clip)
        sum_exp = sum_exp + conserved_out.exp()
        sum_kv = sum_kv + torch.outer(k, conserved_out.exp() / sum_exp * t * v)
        outputs.append(torch.sigmoid(conserved_in) * (q / incoming) @ sum_kv)
    return torch.stack(outputs)


def per_head(function, query, key, value, *rest) -> torch.Tensor:
    rows = [
        torch.stack(
            [function(query[b, h], key[b, h], value[b, h], *rest) for h in range(query.shape[1])]
        )
        for b in range(len(query))
    ]
    return torch.stack(rows)


@pytest.mark.parametrize("scale", [0.1, 1.0, 8.0])
def test_flow_is_conserved(scale: float) -> None:
    (query,) = draw(2, 3, 11, 6, count=1, scale=scale)
    (key,) = draw(2, 3, 17, 6, count=1, seed=1, scale=scale)
    flows = conserved_flows(query, key)
    received, sent = flows.conserved_incoming.sum(-1), flows.conserved_outgoing.sum(-1)
    torch.testing.assert_close(received, torch.full_like(received, 17), atol=1e-3, rtol=0)
    torch.testing.assert_close(sent, torch.full_like(sent, 11), atol=1e-3, rtol=0)


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize(("queries", "keys"), [(13, 13), (13, 4), (5, 21), (1, 1)])
def test_linear_order_is_the_matrix(
    queries: int, keys: int, clip: tuple[float, float] | None
) -> None:
    (query,) = draw(2, 3, queries, 6, count=1)
    (key,) = draw(2, 3, keys, 6, count=1, seed=1)
    (value,) = draw(2, 3, keys, 4, count=1, seed=2)
    found = flow_attention(query, key, value, clip=clip)
    expected = per_head(by_matrix, query, key, value, clip)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("chunk", [1, 5, 64])
def test_causal_is_the_loop(chunk: int, clip: tuple[float, float] | None) -> None:
    query, key = draw(2, 2, 19, 6, count=2, scale=2.0)
    (value,) = draw(2, 2, 19, 4, count=1, seed=1)
    found, _ = causal_flow_attention(query, key, value, clip=clip, chunk=chunk)
    expected = per_head(by_loop, query, key, value, clip)
    torch.testing.assert_close(found, expected, atol=1e-11, rtol=1e-11)


def test_steps_are_the_causal_form() -> None:
    query, key, value = draw(2, 3, 15, 4)
    whole, end = causal_flow_attention(query, key, value)
    state, parts = None, []
    for t in range(15):
        one, state = flow_attention_step(query[:, :, t], key[:, :, t], value[:, :, t], state)
        parts.append(one)
    torch.testing.assert_close(torch.stack(parts, 2), whole, atol=1e-12, rtol=1e-12)
    for mine, other in zip(state, end, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-11, rtol=1e-11)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(1, 10), st.integers(0, 6))
def test_parts_are_the_whole(sizes: list[int], chunk: int, padding: int) -> None:
    tokens = sum(sizes)
    query, key, value = draw(2, 1, tokens, 3)
    valid = torch.arange(tokens).expand(2, -1) >= torch.tensor([[0], [min(padding, tokens - 1)]])
    whole, _ = causal_flow_attention(query, key, value, valid=valid)
    state, parts = None, []
    for q, k, v, real in zip(
        *(part.split(sizes, 2) for part in (query, key, value)), valid.split(sizes, 1), strict=True
    ):
        part, state = causal_flow_attention(q, k, v, valid=real, state=state, chunk=chunk)
        parts.append(part)
    torch.testing.assert_close(torch.cat(parts, 2), whole)


def test_no_token_sees_the_future() -> None:
    query, key, value = (part.float() for part in draw(1, 2, 30, 4))
    changed = [part.clone() for part in (query, key, value)]
    for part in changed:
        part[:, :, 20:] *= -50
    before, _ = causal_flow_attention(query, key, value, chunk=8)
    after, _ = causal_flow_attention(*changed, chunk=8)
    assert torch.equal(before[:, :, :20], after[:, :, :20])
    assert not torch.allclose(before[:, :, 20:], after[:, :, 20:])


def test_order_does_not_matter_without_causality() -> None:
    query, key, value = draw(1, 2, 12, 4)
    order = torch.randperm(12)
    found = flow_attention(query[:, :, order], key[:, :, order], value[:, :, order])
    torch.testing.assert_close(found, flow_attention(query, key, value)[:, :, order])


@pytest.mark.parametrize("clip", CLIPS)
def test_padding_is_not_there(clip: tuple[float, float] | None) -> None:
    query, key, value = draw(1, 2, 12, 4, scale=3.0)
    (other,) = draw(1, 2, 9, 4, count=1, seed=3)
    real, asked = torch.rand(1, 12) > 0.4, torch.rand(1, 9) > 0.4
    found = flow_attention(other, key, value, valid=real, query_valid=asked, clip=clip)
    alone = flow_attention(
        other[:, :, asked[0]], key[:, :, real[0]], value[:, :, real[0]], clip=clip
    )
    torch.testing.assert_close(found[:, :, asked[0]], alone)
    assert not found[:, :, ~asked[0]].any()
    found, state = causal_flow_attention(query, key, value, valid=real, clip=clip)
    kept = [part[:, :, real[0]] for part in (query, key, value)]
    alone, end = causal_flow_attention(*kept, clip=clip)
    torch.testing.assert_close(found[:, :, real[0]], alone)
    for mine, theirs in zip(state, end, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_gradients() -> None:
    inputs = tuple(part.requires_grad_() for part in draw(1, 2, 6, 3))
    for clip in CLIPS:
        assert torch.autograd.gradcheck(lambda *x, c=clip: flow_attention(*x, clip=c), inputs)
        assert torch.autograd.gradcheck(
            lambda *x, c=clip: causal_flow_attention(*x, clip=c, chunk=2)[0], inputs
        )


def test_gradients_under_padding_are_those_without() -> None:
    inputs = tuple(part.requires_grad_() for part in draw(1, 2, 9, 3))
    valid = (torch.arange(9) >= 3)[None]
    padded, _ = causal_flow_attention(*inputs, valid=valid)
    alone, _ = causal_flow_attention(*(part[:, :, 3:] for part in inputs))
    weight = torch.randn_like(alone)
    for mine, theirs in zip(
        torch.autograd.grad((padded[:, :, 3:] * weight).sum(), inputs),
        torch.autograd.grad((alone * weight).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs)


def test_strong_unclipped_sources_do_not_overflow() -> None:
    """Keys near zero for long, then one near one: its conserved outgoing flow is in the thousands."""
    query, key, value = (part.float() for part in draw(1, 1, 40, 4))
    key = torch.full_like(key, -12.0)
    key[:, :, 30] = 12.0
    found, state = causal_flow_attention(query, key, value, clip=None)
    assert float(state.competition.max()) > 90  # exp of it exceeds float32
    assert found.isfinite().all()


def test_half_precision_is_summed_in_float32() -> None:
    query, key, value = (part.half() for part in draw(1, 1, 4000, 4))
    found, state = causal_flow_attention(query, key, value + 100)
    assert found.dtype == torch.float32 and found.isfinite().all()
    assert state.memory.abs().max() > torch.finfo(torch.float16).max


def test_memory_grows_with_tokens_not_with_their_square() -> None:
    """No tensor that autograd keeps has tokens^2 or tokens x dim x value_dim numbers."""
    tokens, dim = 2048, 16
    inputs = [part.float().requires_grad_() for part in draw(1, 1, tokens, dim)]
    largest = 0

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal largest
        largest = max(largest, tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        causal_flow_attention(*inputs, chunk=64)
    assert 0 < largest <= tokens * 64


def test_mistakes_are_named() -> None:
    query, key, value = draw(1, 1, 4, 2)
    with pytest.raises(InputError, match="chunk must be 1 or more, got 0"):
        causal_flow_attention(query, key, value, chunk=0)
    with pytest.raises(InputError, match="1 or more tokens"):
        flow_attention(query, key[:, :, :0], value[:, :, :0])
