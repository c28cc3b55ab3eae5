"""Causal attention over scores that each belong to one key and to no query: a token's query meets its own key only.

    s_j = <silu(q_j), k_j> / sqrt(d);   A_ij = exp(s_j) / sum_{t <= i} exp(s_t),   j <= i;      o_i = sum_j A_ij v_j

All queries rank the keys alike; a later query only has more of them, and its denominator has only grown. The sums are those of
`regard.ops.attention_scan`, whose running maximum makes scores of any size safe.
Source: the non-approximate variant of "Deconstructing Attention" (arXiv 2510.11602).
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from regard.ops.attention_scan import Attended, attention_scan


def self_gate(
    query: Float[Tensor, "batch heads tokens dim"], key: Float[Tensor, "batch heads tokens dim"]
) -> Float[Tensor, "batch heads tokens"]:
    """`<silu(q_j), k_j> / sqrt(dim)` of every token with itself, in float32 at least.

    >>> self_gate(torch.zeros(1, 1, 2, 4), torch.ones(1, 1, 2, 4))
    tensor([[[0., 0.]]])
    """
    precise = torch.promote_types(query.dtype, torch.float32)
    gate = torch.nn.functional.silu(query.to(precise))
    return (gate * key.to(precise)).sum(-1) * query.shape[-1] ** -0.5


def position_softmax(
    scores: Float[Tensor, "batch heads tokens"],
    value: Float[Tensor, "batch heads tokens value_dim"],
    *,
    valid: Bool[Tensor, "batch tokens"] | None = None,
    state: Attended | None = None,
) -> tuple[Float[Tensor, "batch heads tokens value_dim"], Attended]:
    """Head outputs and the state after these tokens; a query whose keys are all padding gets 0.

    Cost: that of `attention_scan`; the state holds one value and two numbers a head.

    >>> position_softmax(torch.zeros(1, 1, 3), torch.tensor([3.0, 5.0, 7.0]).view(1, 1, 3, 1))[0].flatten()
    tensor([3., 4., 5.])
    """
    if valid is not None:
        scores = scores.masked_fill(~valid[:, None], -torch.inf)
        value = value.where(valid[:, None, :, None], 0)
    mixed, state = attention_scan(scores, value, state)
    return mixed.to(value.dtype), state
