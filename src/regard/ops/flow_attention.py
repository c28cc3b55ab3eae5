"""Flow attention: linear attention in which sources compete and sinks share, because flow is conserved.

Values are sources, outputs are sinks, and Q_i . K_j is the capacity between them, with Q = sigmoid(q), K = sigmoid(k). For n
queries and m keys (eps is added to both factors of every product; left out here)

    I_i  = Q_i . sum_j K_j             O_j  = K_j . sum_i Q_i            what flows into sink i, out of source j
    I'_i = Q_i . sum_j K_j / O_j       O'_j = K_j . sum_i Q_i / I_i      the same when all sources send 1, all sinks receive 1
    w_j  = m softmax_j(O')                                               sources compete
    o_i  = sigmoid(I'_i n / m) (Q_i / I_i) . sum_j K_j^T w_j v_j         sinks get their share

The causal form takes every sum over the tokens up to t and the mean where the above has a total (N_t = t):

    I_t  = Q_t . sum K                 O_t  = K_t . sum Q
    I'_t = Q_t . sum_s K_s (s / O_s) / t         O'_t = clip(K_t . sum_s Q_s (s / I_s) / t)
    w_t  = t exp(O'_t) / sum_s exp(O'_s)
    o_t  = sigmoid(I'_t) (Q_t / I_t) . sum_s K_s^T w_s v_s

so O_t counts the queries up to t only: an approximation without which a source would see the future.

Source: Wu et al. 2022, "Flowformer: Linearizing Transformers with Conservation Flows", arXiv 2202.06258. By conservation the
mean of O' is n / m, so that clipping it to [-1, 1] flattens about half of the sources of self-attention, and nearly all when
n = 4 m. The released code clips in its core and its language model and does not in its time-series one; hence the defaults here.
Padding, which the paper does not treat, has no capacity and is not counted in n, m or t. The normaliser of w is kept as a
logarithm, so that unclipped O' cannot overflow.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from regard._errors import InputError
from regard.ops.linear_attention import causal_product, check_sequences, wide

EPS = 1e-6
Clip = tuple[float, float]


class Flows(NamedTuple):
    """Incoming flow of the sinks (I, I') and outgoing flow of the sources (O, O')."""

    incoming: Float[Tensor, "batch heads queries"]
    outgoing: Float[Tensor, "batch heads keys"]
    conserved_incoming: Float[Tensor, "batch heads queries"]
    conserved_outgoing: Float[Tensor, "batch heads keys"]


class FlowState(NamedTuple):
    """What a sequence leaves behind, all sums over its valid tokens.

    Attributes:
        tokens: t.
        keys, queries: of K and Q.
        sent, received: of K_s (s / O_s) and Q_s (s / I_s).
        competition: logarithm of the sum of exp(O'_s).
        memory: of K_s^T w_s v_s.
    """

    tokens: Float[Tensor, " batch"]
    keys: Float[Tensor, "batch heads dim"]
    queries: Float[Tensor, "batch heads dim"]
    sent: Float[Tensor, "batch heads dim"]
    received: Float[Tensor, "batch heads dim"]
    competition: Float[Tensor, "batch heads"]
    memory: Float[Tensor, "batch heads dim value_dim"]


def flow_attention(
    query: Float[Tensor, "batch heads queries dim"],
    key: Float[Tensor, "batch heads keys dim"],
    value: Float[Tensor, "batch heads keys value_dim"],
    *,
    valid: Bool[Tensor, "batch keys"] | None = None,
    query_valid: Bool[Tensor, "batch queries"] | None = None,
    clip: Clip | None = None,
) -> Float[Tensor, "batch heads queries value_dim"]:
    """Every query sees every valid key; queries and keys may be of different sequences.

    Args:
        query, key, value: before the sigmoid.
        valid: the keys that are no padding.
        query_valid: the queries that are no padding: a padded query would take part in O and I'.
        clip: bounds of O'.

    Returns:
        The outputs, in float32 at least; zero at padded queries.

    Raises:
        InputError: shapes that do not fit.

    Cost: O((queries + keys) dim value_dim) time, O(dim value_dim) memory beside the inputs.

    >>> flow_attention(torch.randn(1, 2, 5, 4), torch.randn(1, 2, 9, 4), torch.randn(1, 2, 9, 3)).shape
    torch.Size([1, 2, 5, 3])
    """
    check_sequences(key, value, valid)
    flows = conserved_flows(query, key, valid=valid, query_valid=query_valid)
    sinks, sources = _counts(query, query_valid), _counts(key, valid)
    query, key, value = capacities(query, query_valid), capacities(key, valid), wide(value)
    strength = flows.conserved_outgoing
    if clip is not None:
        strength = strength.clamp(*clip)
    if valid is not None:
        strength = strength.masked_fill(~valid[:, None], torch.finfo(strength.dtype).min)
    competition = strength.softmax(-1) * sources
    allocation = torch.sigmoid(flows.conserved_incoming * sinks / sources)
    collected = key.transpose(2, 3) @ (value * competition[..., None])
    return allocation[..., None] * ((query / flows.incoming[..., None]) @ collected)


def conserved_flows(
    query: Float[Tensor, "batch heads queries dim"],
    key: Float[Tensor, "batch heads keys dim"],
    *,
    valid: Bool[Tensor, "batch keys"] | None = None,
    query_valid: Bool[Tensor, "batch queries"] | None = None,
) -> Flows:
    """The four flows between queries and keys of any number.

    Up to eps the conserved incoming flows of a head add up to the number of keys, and the outgoing ones to that of queries.

    Cost: O((queries + keys) dim) time and memory.

    >>> flows = conserved_flows(torch.randn(1, 1, 5, 4), torch.randn(1, 1, 9, 4))
    >>> round(float(flows.conserved_incoming.sum()), 3), round(float(flows.conserved_outgoing.sum()), 3)
    (9.0, 5.0)
    """
    query, key = capacities(query, query_valid), capacities(key, valid)
    incoming = _dot(query, key.sum(2, keepdim=True))
    outgoing = _dot(key, query.sum(2, keepdim=True))
    return Flows(
        incoming,
        outgoing,
        _dot(query, (key / outgoing[..., None]).sum(2, keepdim=True)),
        _dot(key, (query / incoming[..., None]).sum(2, keepdim=True)),
    )


def causal_flow_attention(
    query: Float[Tensor, "batch heads tokens dim"],
    key: Float[Tensor, "batch heads tokens dim"],
    value: Float[Tensor, "batch heads tokens value_dim"],
    *,
    valid: Bool[Tensor, "batch tokens"] | None = None,
    state: FlowState | None = None,
    clip: Clip | None = (-1.0, 1.0),
    chunk: int = 64,
) -> tuple[Float[Tensor, "batch heads tokens value_dim"], FlowState]:
    """Every query sees itself and the valid keys before it, those that `state` was left by included.

    Args:
        query, key, value: before the sigmoid.
        valid: the tokens that are no padding; the output at padding means nothing.
        state: of the tokens before.
        clip: bounds of O'.
        chunk: tokens that are mixed by a masked product; any size gives the same numbers.

    Returns:
        The outputs, in float32 at least, and the state after the last token.

    Raises:
        InputError: shapes that do not fit, or a chunk below 1.

    Cost: O(tokens (chunk + value_dim) dim) time; memory `tokens x chunk` and `tokens / chunk` times `dim x value_dim`.

    >>> q, k, v = torch.randn(3, 1, 2, 10, 4)
    >>> output, state = causal_flow_attention(q, k, v)
    >>> again, _ = causal_flow_attention(q[:, :, :7], k[:, :, :7], v[:, :, :7])
    >>> torch.allclose(again, output[:, :, :7], atol=1e-6), state.tokens
    (True, tensor([10.]))
    """
    check_sequences(key, value, valid)
    if query.shape != key.shape:
        raise InputError(
            f"query and key of causal flow must have one shape, got {tuple(query.shape)} and {tuple(key.shape)}"
        )
    query, key, value = capacities(query, valid), capacities(key, valid), wide(value)
    known = _empty(key, value) if state is None else state
    new = torch.ones_like(key[:, 0, :, 0]) if valid is None else valid.to(key.dtype)
    count = known.tokens[:, None] + new.cumsum(1)
    steps = count[:, None].clamp_min(1)

    keys = known.keys[:, :, None] + key.cumsum(2)
    queries = known.queries[:, :, None] + query.cumsum(2)
    incoming, outgoing = _dot(query, keys), _dot(key, queries)
    sent = known.sent[:, :, None] + (key * (steps / outgoing)[..., None]).cumsum(2)
    received = known.received[:, :, None] + (query * (steps / incoming)[..., None]).cumsum(2)

    strength = _dot(key, received) / steps
    if clip is not None:
        strength = strength.clamp(*clip)
    if valid is not None:
        strength = strength.masked_fill(~valid[:, None], _nothing(strength.dtype))
    total = torch.logaddexp(known.competition[..., None], strength.logcumsumexp(-1))
    competition = torch.exp(strength - total) * steps
    mixed, memory = causal_product(
        query / incoming[..., None],
        key,
        value * competition[..., None],
        before=None if state is None else state.memory,
        chunk=chunk,
    )
    mixed = torch.sigmoid(_dot(query, sent) / steps)[..., None] * mixed
    last = [part[:, :, -1] for part in (keys, queries, sent, received, total)]
    return mixed, FlowState(count[:, -1], last[0], last[1], last[2], last[3], last[4], memory)


def flow_attention_step(
    query: Float[Tensor, "batch heads dim"],
    key: Float[Tensor, "batch heads dim"],
    value: Float[Tensor, "batch heads value_dim"],
    state: FlowState | None = None,
    *,
    clip: Clip | None = (-1.0, 1.0),
) -> tuple[Float[Tensor, "batch heads value_dim"], FlowState]:
    """One token of `causal_flow_attention`: O(dim value_dim) time, whatever came before.

    >>> output, state = flow_attention_step(*torch.randn(3, 1, 2, 4))
    >>> output.shape, state.tokens
    (torch.Size([1, 2, 4]), tensor([1.]))
    """
    query, key, value = capacities(query), capacities(key), wide(value)
    known = _empty(key[:, :, None], value[:, :, None]) if state is None else state
    count, keys, queries = known.tokens + 1, known.keys + key, known.queries + query
    t = count[:, None]
    incoming, outgoing = _dot(query, keys), _dot(key, queries)
    sent = known.sent + key * (t / outgoing)[..., None]
    received = known.received + query * (t / incoming)[..., None]
    strength = _dot(key, received) / t
    if clip is not None:
        strength = strength.clamp(*clip)
    total = torch.logaddexp(known.competition, strength)
    share = (torch.exp(strength - total) * t)[..., None]
    memory = known.memory + key[..., None] * (share * value)[..., None, :]
    output = ((query / incoming[..., None])[..., None, :] @ memory)[..., 0, :]
    output = torch.sigmoid(_dot(query, sent) / t)[..., None] * output
    return output, FlowState(count, keys, queries, sent, received, total, memory)


def capacities(states: Tensor, valid: Bool[Tensor, "batch tokens"] | None = None) -> Tensor:
    """The sigmoid of queries or keys in float32 at least, zero where a token is padding."""
    found = torch.sigmoid(wide(states))
    return found if valid is None else found.masked_fill(~valid[:, None, :, None], 0)


def _dot(one: Tensor, other: Tensor) -> Tensor:
    return ((one + EPS) * (other + EPS)).sum(-1)


def _counts(states: Tensor, valid: Tensor | None) -> Tensor | int:
    """Tokens of every row, `[batch, 1, 1]`, at least 1; a number when none is padding."""
    return states.shape[2] if valid is None else valid.sum(-1).clamp_min(1)[:, None, None]


def _nothing(dtype: torch.dtype) -> float:
    """A logarithm of nothing that can be subtracted from itself."""
    return torch.finfo(dtype).min / 4


def _empty(key: Tensor, value: Tensor) -> FlowState:
    sums = key.new_zeros(key.shape[0], key.shape[1], key.shape[3])
    log = sums.new_full(sums.shape[:2], _nothing(key.dtype))
    memory = sums.new_zeros(*sums.shape, value.shape[-1])
    return FlowState(sums.new_zeros(len(sums)), sums, sums, sums, sums, log, memory)
