"""Attention written down the plain way: full maps, one head at a time, float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from regard.engine import AttentionCall, Block, Method


@dataclass
class Dense:
    """Everything of one call in full: `weights` `[batch, heads, queries, keys]`, `output`, `logsumexp`, `visible`."""

    scores: Tensor
    weights: Tensor
    output: Tensor
    logsumexp: Tensor
    visible: Tensor
    entropy: Tensor


def dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Tensor,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
) -> Dense:
    """`visible` `[batch, heads, queries, keys]`; rows without a visible key have weights 0."""
    batch, heads, queries, dim = query.shape
    keys, group = key.shape[2], heads // key.shape[1]
    scaling = dim**-0.5 if scaling is None else scaling
    visible = visible.expand(batch, heads, queries, keys)
    scores = torch.empty(batch, heads, queries, keys, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            scores[b, h] = query[b, h].double() @ key[b, h // group].double().T * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias.double()
    hidden = scores.masked_fill(~visible, float("-inf"))
    logsumexp = torch.logsumexp(hidden, -1)
    total = logsumexp
    if sinks is not None:
        sinks = sinks.double()
        sinks = sinks[None, :, None] if sinks.dim() == 1 else sinks
        total = torch.logaddexp(logsumexp, sinks.expand(batch, heads, queries))
    weights = torch.exp(hidden - total[..., None])
    weights = torch.where(visible.any(-1, keepdim=True), weights, 0.0)
    output = torch.empty(batch, heads, queries, value.shape[-1], dtype=torch.float64)
    for h in range(heads):
        output[:, h] = weights[:, h] @ value[:, h // group].double()
    entropy = torch.special.entr(weights).sum(-1)
    if sinks is not None:
        entropy = entropy + torch.special.entr((1 - weights.sum(-1)).clamp(0, 1))
    return Dense(scores, weights, output, logsumexp, visible, entropy)


def causal(queries: int, keys: int, offset: int = 0, window: int | None = None) -> Tensor:
    """`[1, 1, queries, keys]`."""
    row = torch.arange(queries)[:, None] + offset
    column = torch.arange(keys)[None, :]
    seen = column <= row
    if window is not None:
        seen &= column > row - window
    return seen[None, None]


class Reassemble(Method):
    """Reads every block and writes what it offers into full tensors."""

    reads_only = True

    def __init__(self, width: int = 4) -> None:
        self.width = width
        self.blocks = 0

    def before(self, call: AttentionCall) -> None:
        shape = (call.query.shape[0], call.heads, call.queries, call.keys)
        nothing = torch.full(shape, float("nan"), dtype=torch.float64)
        self.weights_ = torch.zeros(shape, dtype=torch.float64)
        self.rows = nothing[..., 0].clone()
        self.entropy, self.logsumexp, self.mean_key = (nothing[..., 0].clone() for _ in range(3))
        self.counts, self.first = nothing[:, 0, :, 0].clone(), nothing[:, 0, :, 0].clone()
        self.received = torch.zeros(shape[0], shape[1], shape[3], dtype=torch.float64)
        self.diagonals = torch.full((*shape[:3], self.width), float("nan"), dtype=torch.float64)
        self.shares: set[float] = set()
        self.row_numbers: list[int] = []

    def weights(self, block: Block) -> None:
        rows = block.rows
        self.blocks += 1
        self.row_numbers += rows.tolist()
        self.shares.add(block.share)
        self.weights_[:, :, rows, block.keys] = block.weights.double()
        self.entropy[:, :, rows] = block.entropy.double()
        self.logsumexp[:, :, rows] = block.logsumexp.double()
        self.mean_key[:, :, rows] = block.mean_key.double()
        self.counts[:, rows] = block.counts.double()
        self.first[:, rows] = block.first_key.double()
        self.received[:, :, block.keys] += block.received().double()
        self.diagonals[:, :, rows] = block.diagonals(self.width).double()


def make(
    batch: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    queries: int = 40,
    keys: int | None = None,
    dim: int = 8,
    value_dim: int | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Random query, key and value with uneven attention."""
    generator = torch.Generator().manual_seed(seed)
    keys = queries if keys is None else keys
    query = torch.randn(batch, heads, queries, dim, generator=generator, dtype=torch.float64) * 1.5
    key = torch.randn(batch, kv_heads, keys, dim, generator=generator, dtype=torch.float64)
    value = torch.randn(
        batch, kv_heads, keys, value_dim or dim, generator=generator, dtype=torch.float64
    )
    return query.to(dtype), key.to(dtype), value.to(dtype)
