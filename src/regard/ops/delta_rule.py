"""The delta rule: a matrix that overwrites what it holds for a key, computed chunk by chunk.

    S_t = S_{t-1} (I - beta_t k_t k_t^T) + beta_t v_t k_t^T,        y_t = S_t q_t

With |k| = 1 and beta = 1 the old value of the key is gone and the new one there. Within a chunk the writes depend on each
other through a unit triangular matrix (the WY form of products of Householder-like factors): with rows K, V, Q,

    T = (I + strict_tril(diag(beta) K K^T))^-1 diag(beta),    D = T V - T K S_0^T,
    Y = Q S_0^T + tril(Q K^T) D,                              S_end = S_0 + D^T K.

Source: Schlag, Irie and Schmidhuber 2021 (arXiv 2102.11174); the chunked form: Yang et al. 2024 (arXiv 2406.06484).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from regard._errors import at_least_one


def delta_rule(
    query: Float[Tensor, "batch heads tokens dim"],
    key: Float[Tensor, "batch heads tokens dim"],
    value: Float[Tensor, "batch heads tokens value_dim"],
    beta: Float[Tensor, "batch heads tokens"],
    state: Float[Tensor, "batch heads value_dim dim"] | None = None,
    *,
    chunk: int = 64,
) -> tuple[
    Float[Tensor, "batch heads tokens value_dim"], Float[Tensor, "batch heads value_dim dim"]
]:
    """Writes and reads the tokens in order; what was read, and the matrix afterwards.

    Args:
        query: asked of the matrix once its own token is written.
        key: stable while beta |k|^2 is in [0, 2].
        value: what the key is to give.
        beta: write strengths; 0 leaves the matrix as it is.
        state: the matrix before; None for zeros.
        chunk: tokens at a time. The result does not depend on it.

    Cost: for each token 4 dim x value_dim + chunk x (2 dim + 2 value_dim) multiplications.

    Raises:
        InputError: a chunk below 1.

    >>> key = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]).view(1, 1, 3, 2)
    >>> value = torch.tensor([[5.0], [6.0], [7.0]]).view(1, 1, 3, 1)
    >>> delta_rule(key, key, value, torch.ones(1, 1, 3))[1]  # the last value of each key
    tensor([[[[7., 6.]]]])
    """
    at_least_one(chunk=chunk)
    batch, heads, tokens, dim = key.shape
    now = key.new_zeros(batch, heads, value.shape[-1], dim) if state is None else state
    chunk = min(chunk, tokens)
    short = -tokens % chunk
    if short:
        query, key, value = (_pad(part, short) for part in (query, key, value))
        beta = torch.nn.functional.pad(beta, (0, short))
    query, key, value, beta = (part.unflatten(2, (-1, chunk)) for part in (query, key, value, beta))
    scaled = beta[..., None] * key
    system = (scaled @ key.mT).tril(-1) + torch.eye(chunk, dtype=key.dtype, device=key.device)
    right = torch.cat([beta[..., None] * value, scaled], -1)
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    values, keys = solved.split([value.shape[-1], dim], -1)
    weights = (query @ key.mT).tril()
    read = []
    chunks = (part.unbind(2) for part in (query, key, keys, values, weights))  # one gradient each
    for asked, held, solved_keys, solved_values, weight in zip(*chunks, strict=True):
        written = solved_values - solved_keys @ now.mT
        read.append(asked @ now.mT + weight @ written)
        now = now + written.mT @ held
    return torch.cat(read, 2)[:, :, :tokens], now


def _pad(states: Tensor, more: int) -> Tensor:
    return torch.nn.functional.pad(states, (0, 0, 0, more))
