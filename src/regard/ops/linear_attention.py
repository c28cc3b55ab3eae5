"""Linear attention: a product of features in place of the softmax, so that the sums over keys can be done first.

    phi(x) = elu(x) + 1
    o_i = phi(q_i) . S_i / (phi(q_i) . z_i + eps),    S_i = sum_{j <= i} phi(k_j) v_j^T,    z_i = sum_{j <= i} phi(k_j)

Without the limit j <= i it is the form in which every query sees every key. S and z are all that a sequence leaves behind.
The causal sums are taken in chunks of c tokens: what lies before the chunk comes from S, what lies inside it from a masked
c x c product, and no token ever has an S of its own.

Source: Katharopoulos et al. 2020, "Transformers are RNNs", arXiv 2006.16236; the chunks: Hua et al. 2022, arXiv 2202.10447.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from regard._errors import InputError, at_least_one


class LinearState(NamedTuple):
    """What a sequence leaves behind: `memory` is S, `normaliser` z."""

    memory: Float[Tensor, "batch heads dim value_dim"]
    normaliser: Float[Tensor, "batch heads dim"]


def linear_attention(
    query: Float[Tensor, "batch heads queries dim"],
    key: Float[Tensor, "batch heads keys dim"],
    value: Float[Tensor, "batch heads keys value_dim"],
    *,
    valid: Bool[Tensor, "batch keys"] | None = None,
    eps: float = 1e-6,
) -> Float[Tensor, "batch heads queries value_dim"]:
    """Every query sees every valid key.

    Cost: O((queries + keys) dim value_dim) time, O(dim value_dim) memory beside the inputs.

    >>> ones = torch.ones(1, 1, 3, 2)
    >>> linear_attention(torch.randn(1, 1, 5, 2), ones, ones).round(decimals=4).unique()
    tensor([1.])
    """
    check_sequences(key, value, valid)
    query, key, value = features(query), features(key, valid), wide(value)
    normaliser = (query * key.sum(2, keepdim=True)).sum(-1, keepdim=True) + eps
    return query @ (key.transpose(2, 3) @ value) / normaliser


def causal_linear_attention(
    query: Float[Tensor, "batch heads tokens dim"],
    key: Float[Tensor, "batch heads tokens dim"],
    value: Float[Tensor, "batch heads tokens value_dim"],
    *,
    valid: Bool[Tensor, "batch tokens"] | None = None,
    state: LinearState | None = None,
    chunk: int = 64,
    eps: float = 1e-6,
) -> tuple[Float[Tensor, "batch heads tokens value_dim"], LinearState]:
    """Every query sees itself and the valid keys before it, those that `state` was left by included.

    Returns:
        The outputs, in float32 at least, and the state after the last token.

    Cost: O(tokens (chunk + value_dim) dim) time; memory `tokens x chunk` and `tokens / chunk` states.

    >>> q, k, v = torch.randn(3, 1, 1, 6, 4)
    >>> whole, _ = causal_linear_attention(q, k, v)
    >>> first, state = causal_linear_attention(q[:, :, :4], k[:, :, :4], v[:, :, :4])
    >>> rest, _ = causal_linear_attention(q[:, :, 4:], k[:, :, 4:], v[:, :, 4:], state=state)
    >>> torch.allclose(torch.cat([first, rest], 2), whole, atol=1e-6)
    True
    """
    check_sequences(key, value, valid)
    query, key, value = features(query), features(key, valid), wide(value)
    sums = key.cumsum(2)
    if state is not None:
        sums = sums + state.normaliser[:, :, None]
    before = None if state is None else state.memory
    mixed, memory = causal_product(query, key, value, before=before, chunk=chunk)
    mixed = mixed / ((query * sums).sum(-1, keepdim=True) + eps)
    return mixed, LinearState(memory, sums[:, :, -1])


def causal_product(
    query: Float[Tensor, "batch heads tokens dim"],
    key: Float[Tensor, "batch heads tokens dim"],
    value: Float[Tensor, "batch heads tokens value_dim"],
    *,
    before: Float[Tensor, "batch heads dim value_dim"] | None = None,
    chunk: int = 64,
) -> tuple[
    Float[Tensor, "batch heads tokens value_dim"], Float[Tensor, "batch heads dim value_dim"]
]:
    """`q_i . (before + sum_{j <= i} k_j v_j^T)` for every i, and that sum after the last token.

    Cost: O(tokens (chunk + value_dim) dim) time; memory `tokens x chunk` and `tokens / chunk` sums.

    Raises:
        InputError: a chunk below 1.
    """
    at_least_one(chunk=chunk)
    tokens = query.shape[2]
    chunk = min(chunk, tokens)
    query, key, value = (_in_chunks(part, chunk) for part in (query, key, value))
    own = key.transpose(-2, -1) @ value
    first = torch.zeros_like(own[:, :, :1]) if before is None else before[:, :, None]
    sums = torch.cat([first, own], 2).cumsum(2)
    inside = (query @ key.transpose(-2, -1)).tril() @ value
    mixed = inside + query @ sums[:, :, :-1]
    return mixed.flatten(2, 3)[:, :, :tokens], sums[:, :, -1]


def features(states: Tensor, valid: Bool[Tensor, "batch keys"] | None = None) -> Tensor:
    """`elu(x) + 1` in float32 at least, zero where a token is padding."""
    found = torch.nn.functional.elu(wide(states)) + 1
    return found if valid is None else found.masked_fill(~valid[:, None, :, None], 0)


def wide(states: Tensor) -> Tensor:
    """In float32 at least: running sums outgrow the precision of half types."""
    return states if states.dtype == torch.float64 else states.float()


def check_sequences(key: Tensor, value: Tensor, valid: Tensor | None) -> None:
    """Raises InputError unless key, value and valid agree on a number of tokens above zero."""
    if key.shape[2] == 0:
        raise InputError.of("key", given=tuple(key.shape), expected="of 1 or more tokens")
    if key.shape[:3] != value.shape[:3]:
        raise InputError(
            f"key and value must agree in batch, heads and tokens, got {tuple(key.shape)} and {tuple(value.shape)}"
        )
    if valid is not None and valid.shape != (key.shape[0], key.shape[2]):
        raise InputError(
            f"valid must be (batch, tokens) of the keys {tuple(key.shape)}, got {tuple(valid.shape)}"
        )


def _in_chunks(states: Tensor, chunk: int) -> Tensor:
    """`[batch, heads, tokens, dim]` to `[batch, heads, chunks, chunk, dim]`, zeros after the last token."""
    short = -states.shape[2] % chunk
    if short:
        states = torch.nn.functional.pad(states, (0, 0, 0, short))
    return states.unflatten(2, (-1, chunk))
