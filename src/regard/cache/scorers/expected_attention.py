"""Expected Attention: keys that future queries will look at, judged by the distribution of past queries.

    score_j = (softmax_j( m . k_j + k_j^T C k_j / 2 ) + epsilon) |v_j|,   averaged over the heads of a group,

with m and C the mean and covariance of the queries so far, scaled, taken out of their positions and rotated to the average of
the next `horizon` ones.

Source: Devoto et al. 2025, "Expected Attention: KV Cache Compression by Estimating Attention from Future Queries
Distribution", arXiv 2510.00636.
Cost: the queries' outer products (`dim^2` a query and head, 5 % of a prefill of 2048 tokens of SmolLM2), `dim^2` a key and head
at each eviction; memory `(heads / 2 + 1) dim^2` numbers a layer and row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from regard._errors import InputError
from regard.cache.layer import Layer
from regard.cache.rotary import Rotary
from regard.cache.scorer import Scorer
from regard.cache.scorers._slots import key_positions, query_positions
from regard.engine import AttentionCall
from regard.ops.expected_attention import Moments, expected_attention, merge_moments, query_moments


@dataclass(frozen=True)
class ExpectedAttention(Scorer):
    """Attention expected from future queries, times the norm of the value.

    Args:
        horizon: future positions that are averaged over.
        covariance: whether to use the second-order term.
        epsilon: added to the share before it is multiplied by the norm of the value.
        skip: first tokens of the text whose queries are left out, outliers in most models.

    Raises:
        InputError: `horizon` below 1, or a model whose position embedding cannot be undone.
    """

    horizon: int = 512
    covariance: bool = True
    epsilon: float = 0.0
    skip: int = 4

    def __post_init__(self) -> None:
        if self.horizon < 1:
            raise InputError.of("horizon", given=self.horizon, expected="a whole number >= 1")

    def watch(self, call: AttentionCall, layer: Layer) -> None:
        memory, positions = layer.memory, query_positions(call, layer)
        far = torch.iinfo(positions.dtype).max
        first, last = positions.masked_fill(positions < 0, far).amin(-1), positions.amax(-1)
        if "first" in memory:
            first = torch.minimum(memory["first"], first)
            last = torch.maximum(memory["last"], last)
        memory["first"], memory["last"] = first, last  # columns where each text begins and ends
        used = (positions >= 0) & (positions - self.skip >= first[:, None])
        rotary = Rotary.of(_module(call), layer.index)
        query = rotary.unturn(call.query * call.scaling, positions.clamp_min(0))
        moments = query_moments(query, used, self.covariance)
        if "mean" in memory:
            moments = merge_moments(_unpacked(memory), moments)
        memory["count"], memory["mean"], spread = moments
        if self.covariance:
            memory["spread"] = _triangle(spread / moments[0].clamp_min(1)[:, None, None, None])
        memory["turn"] = rotary.average(last + 1, self.horizon, query.shape[-1]).to(query)

    def score(self, layer: Layer) -> Float[Tensor, "batch kv_heads held"]:
        keys, values, memory = layer.keys, layer.values, layer.memory
        assert keys is not None and values is not None
        past = key_positions(layer) - self.skip >= memory["first"][:, None, None]
        turn = memory["turn"][:, None]
        mean = (turn @ memory["mean"][..., None])[..., 0]
        spread = None
        if self.covariance:
            spread = turn @ _square(memory["spread"], mean.shape[-1]) @ turn.transpose(-1, -2)
        shares = expected_attention(keys.float(), mean, spread, past, scaling=1.0)
        return (shares + self.epsilon) * values.float().norm(dim=-1)


def _triangle(spread: Float[Tensor, "batch heads dim dim"]) -> Float[Tensor, "batch heads half"]:
    """The upper half of symmetric matrices, which is what is stored."""
    row, column = torch.triu_indices(*spread.shape[-2:], device=spread.device)
    return spread[..., row, column]


def _square(half: Float[Tensor, "batch heads half"], dim: int) -> Float[Tensor, "batch heads d d"]:
    row, column = torch.triu_indices(dim, dim, device=half.device)
    full = half.new_empty(*half.shape[:2], dim, dim)
    full[..., row, column] = half
    full[..., column, row] = half
    return full


def _unpacked(memory: dict[str, Tensor]) -> Moments:
    count, mean = memory["count"], memory["mean"]
    if "spread" not in memory:
        return count, mean, mean.new_zeros(*mean.shape, 0)
    return count, mean, _square(memory["spread"], mean.shape[-1]) * count[:, None, None, None]


def _module(call: AttentionCall) -> torch.nn.Module:
    if call.module is None:
        raise InputError("Expected Attention needs the attention module of the call, got none")
    return call.module
