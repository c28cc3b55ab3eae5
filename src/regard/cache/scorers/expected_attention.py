"""Expected Attention: keys that future queries will look at, judged by the distribution of past queries.

    score_j = (softmax_j( m . k_j + k_j^T C k_j / 2 ) + epsilon) |v_j|,   averaged over the heads of a group,

with m and C the mean and covariance of the queries so far, scaled, taken out of their positions and rotated to the average of
the next `horizon` ones.

Source: Devoto et al. 2025, "Expected Attention: KV Cache Compression by Estimating Attention from Future Queries
Distribution", arXiv 2510.00636.
Cost: the queries' outer products (`dim^2` a query and head, about 2 % of a prefill of SmolLM2), `dim^2` a key and head at each
eviction; memory `heads x dim^2` a layer and row.
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
from regard.ops.expected_attention import expected_attention, merge_moments, query_moments


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
        if "first" not in memory:  # the column at which each text begins, behind its padding
            far = torch.iinfo(positions.dtype).max
            memory["first"] = positions.masked_fill(positions < 0, far).amin(-1)
        used = positions >= memory["first"][:, None] + self.skip
        rotary = Rotary.of(_module(call), layer.index)
        query = rotary.unturn(call.query * call.scaling, positions.clamp_min(0))
        new = query_moments(query, used, self.covariance)
        if "count" in memory:
            new = merge_moments((memory["count"], memory["mean"], memory["scatter"]), new)
        memory["count"], memory["mean"], memory["scatter"] = new
        count, dim = memory["count"], query.shape[-1]
        future = torch.full_like(memory["first"], layer.seen)
        turn = rotary.average(future, self.horizon, dim)[:, None].to(query)
        memory["expected"] = (turn @ memory["mean"][..., None])[..., 0]
        if self.covariance:
            spread = memory["scatter"] / count.clamp_min(1)[:, None, None, None]
            memory["spread"] = turn @ spread @ turn.transpose(-1, -2)

    def score(self, layer: Layer) -> Float[Tensor, "batch kv_heads held"]:
        keys, values = layer.keys, layer.values
        assert keys is not None and values is not None
        past = key_positions(layer) >= layer.memory["first"][:, None, None] + self.skip
        shares = expected_attention(
            keys.float(), layer.memory["expected"], layer.memory.get("spread"), past, scaling=1.0
        )
        return (shares + self.epsilon) * values.float().norm(dim=-1)


def _module(call: AttentionCall) -> torch.nn.Module:
    if call.module is None:
        raise InputError("Expected Attention needs the attention module of the call, got none")
    return call.module
