"""Causal attention with the exponential replaced by its Taylor series of second order, in linear time.

    a_ij = 1 + x_ij + x_ij^2 / 2,   x_ij = scale q_i . k_j;      o_i = sum_{j <= i} a_ij v_j / sum_{j <= i} a_ij

a_ij = ((1 + x)^2 + 1) / 2 is never below 1/2, so the weights are a distribution. As x^2 = <phi(q), phi(k)> with phi(x) the
products of all pairs of entries, the sums over earlier tokens fit into a state of one size. `taylor_attention` normalises the
three orders together; `separate_taylor_attention` adds them up each divided by its own sum, the recurrent form that the source
prints, whose first-order sum can come near 0.

Cost for n tokens, size d, values of size e: n d^2 e multiplications through the state and 3 n chunk (d + e) inside chunks.
Source: the approximate variant of "Deconstructing Attention" (arXiv 2510.11602).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor


class TaylorState(NamedTuple):
    """Sums over the tokens seen: of values with a last column of ones, weighted by the powers 0, 1 and 2 of the key."""

    zeroth: Float[Tensor, "batch heads value_dim_and_1"]
    first: Float[Tensor, "batch heads dim value_dim_and_1"]
    second: Float[Tensor, "batch heads dim dim value_dim_and_1"]

    @classmethod
    def empty(cls, key: Tensor, value: Tensor) -> TaylorState:
        """No tokens yet, for keys and values like these; at least float32."""
        batch, heads, _, dim = key.shape
        wide = value.shape[-1] + 1
        precise = torch.promote_types(key.dtype, torch.float32)
        sizes = ((wide,), (dim, wide), (dim, dim, wide))
        return cls(*(key.new_zeros(batch, heads, *size, dtype=precise) for size in sizes))


def taylor_attention(
    query: Float[Tensor, "batch heads tokens dim"],
    key: Float[Tensor, "batch heads tokens dim"],
    value: Float[Tensor, "batch heads tokens value_dim"],
    *,
    scale: float | None = None,
    valid: Bool[Tensor, "batch tokens"] | None = None,
    state: TaylorState | None = None,
    chunk: int = 128,
) -> tuple[Float[Tensor, "batch heads tokens value_dim"], TaylorState]:
    """Head outputs and the state after these tokens. `scale` is 1 / sqrt(dim) by default.

    A query whose keys are all padding gets 0.

    >>> query = torch.zeros(1, 1, 3, 2)
    >>> taylor_attention(query, query, torch.tensor([3.0, 5.0, 7.0]).view(1, 1, 3, 1))[0].flatten()
    tensor([3., 4., 5.])
    """
    orders, state = _orders(query, key, value, scale, valid, state, chunk)
    return _ratio(orders.sum(0)).to(value.dtype), state


def separate_taylor_attention(
    query: Float[Tensor, "batch heads tokens dim"],
    key: Float[Tensor, "batch heads tokens dim"],
    value: Float[Tensor, "batch heads tokens value_dim"],
    *,
    scale: float | None = None,
    valid: Bool[Tensor, "batch tokens"] | None = None,
    state: TaylorState | None = None,
    chunk: int = 128,
) -> tuple[Float[Tensor, "batch heads tokens value_dim"], TaylorState]:
    """The sum of three averages, one for each order: `sum_j v_j / i + sum_j x_ij v_j / sum_j x_ij + the same with x_ij^2`.

    Numerically unsafe where `sum_j x_ij` is near 0. Arguments as for `taylor_attention`.
    """
    orders, state = _orders(query, key, value, scale, valid, state, chunk)
    return _ratio(orders).sum(0).to(value.dtype), state


def _orders(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float | None,
    valid: Tensor | None,
    state: TaylorState | None,
    chunk: int,
) -> tuple[Float[Tensor, "orders batch heads tokens value_dim_and_1"], TaylorState]:
    """For each order, the weighted sum of values over earlier tokens and, in the last column, the sum of weights."""
    precise = torch.promote_types(query.dtype, torch.float32)
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    query, key = query.to(precise) * factor, key.to(precise)
    wide = torch.cat([value.to(precise), value.new_ones(*value.shape[:-1], 1, dtype=precise)], -1)
    if (
        valid is not None
    ):  # a padding token adds nothing: its values and its one are 0, and its key must not be infinite
        real = valid[:, None, :, None]
        wide, key = wide.where(real, 0), key.where(real, 0)
    parts, empty = [], state is None
    state = TaylorState.empty(key, value) if state is None else state
    for q, k, v in zip(*(one.split(chunk, 2) for one in (query, key, wide)), strict=True):
        products = q @ k.transpose(-1, -2)
        earlier = torch.ones_like(products[0, 0]).tril()
        powers = [earlier.expand_as(products), products * earlier, products.square() / 2 * earlier]
        sums = torch.stack(powers) @ v
        if not empty:
            before = [
                state.zeroth[:, :, None].expand_as(sums[0]),
                q @ state.first,
                torch.einsum("bhni,bhnj,bhije->bhne", q, q, state.second) / 2,
            ]
            sums = sums + torch.stack(before)
        parts.append(sums)
        state = TaylorState(
            state.zeroth + v.sum(2),
            state.first + k.transpose(-1, -2) @ v,
            state.second + torch.einsum("bhni,bhnj,bhne->bhije", k, k, v),
        )
        empty = False
    return torch.cat(parts, dim=3), state


def _ratio(sums: Float[Tensor, "... value_dim_and_1"]) -> Tensor:
    """Sum of values over sum of weights; 0 where there are no weights."""
    weight = sums[..., -1:]
    return sums[..., :-1] / torch.where(weight == 0, 1, weight)
