"""Attention operations `o_i = Z_i^-1 sum_{j <= i} s_ij v_j`, from softmax to kernels without any normalisation.

| name | s_ij | Z_i |
|---|---|---|
| `softmax` | exp(z), z = q.k / sqrt(d) | sum_j s_ij |
| `sigmoid`, `sigmoid-normalised` | 1 / (1 + exp(-z)) | 1, or the sum + 1e-8 |
| `elu1`, `elu1-normalised` | ELU(z) + 1 | 1, or the sum + 1e-8 |
| `kernel-elu`, `kernel-elu-normalised` | (ELU(q) + 1).(ELU(k) + 1) / sqrt(d) | 1, or the sum + 1e-8 |
| `kernel-identity`, `kernel-identity-normalised` | q.k / sqrt(d), which may be negative | 1, or max(abs(sum), 1) |

Rotary positions turn q and k before the feature map. Everything but softmax multiplies by the 0/1 mask after its non-linearity.
The sigmoid has no bias of -log T. The paper's kernel with a learnt map of two layers is not among them.

Cost: O(T^2 d) time and O(T^2) memory a head where the weights are wanted; `fused_softmax` spares the memory in training.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import elu, scaled_dot_product_attention

Scores = Float[Tensor, "*batch queries keys"]
Visible = Bool[Tensor, "... queries keys"]


def softmax_weights(scores: Scores, visible: Visible) -> Scores:
    """Exponentials that sum to one."""
    return scores.masked_fill(~visible, -torch.inf).softmax(-1)


def sigmoid_weights(scores: Scores, visible: Visible) -> Scores:
    """Each key on its own scale, from 0 to 1."""
    return scores.sigmoid() * visible


def elu1_weights(scores: Scores, visible: Visible) -> Scores:
    """Each key on its own scale, from 0 up."""
    return (elu(scores) + 1) * visible


def plain_weights(scores: Scores, visible: Visible) -> Scores:
    """The scores themselves."""
    return scores * visible


def over_sum(weigh: Callable[[Scores, Visible], Scores]) -> Callable[[Scores, Visible], Scores]:
    """The same weights over their sum, for weights that are not negative."""

    def weights(scores: Scores, visible: Visible) -> Scores:
        raw = weigh(scores, visible)
        return raw / (raw.sum(-1, keepdim=True) + 1e-8)

    return weights


def over_size(weigh: Callable[[Scores, Visible], Scores]) -> Callable[[Scores, Visible], Scores]:
    """The same weights over the size of their sum where that is above one, for weights of either sign."""

    def weights(scores: Scores, visible: Visible) -> Scores:
        raw = weigh(scores, visible)
        return raw / raw.sum(-1, keepdim=True).abs().clamp(min=1)

    return weights


def identity(x: Tensor) -> Tensor:
    """No feature map."""
    return x


def elu_plus_one(x: Tensor) -> Tensor:
    """`ELU(x) + 1`, which is positive."""
    return elu(x) + 1


@dataclass(frozen=True, slots=True)
class Operation:
    """A feature map of queries and keys, and how scores become weights."""

    weigh: Callable[[Scores, Visible], Scores]
    feature: Callable[[Tensor], Tensor] = identity


OPERATIONS: dict[str, Operation] = {
    "softmax": Operation(softmax_weights),
    "sigmoid": Operation(sigmoid_weights),
    "sigmoid-normalised": Operation(over_sum(sigmoid_weights)),
    "elu1": Operation(elu1_weights),
    "elu1-normalised": Operation(over_sum(elu1_weights)),
    "kernel-elu": Operation(plain_weights, elu_plus_one),
    "kernel-elu-normalised": Operation(over_sum(plain_weights), elu_plus_one),
    "kernel-identity": Operation(plain_weights),
    "kernel-identity-normalised": Operation(over_size(plain_weights)),
}
"""Every operation by name."""


def attention_weights(
    query: Float[Tensor, "*batch queries d"],
    key: Float[Tensor, "*batch keys d"],
    visible: Visible,
    operation: Operation,
) -> Scores:
    """What each value is multiplied by, `s_ij / Z_i`, before any proxy.

    >>> query = key = torch.zeros(2, 4)
    >>> attention_weights(query, key, torch.ones(2, 2).tril().bool(), OPERATIONS["sigmoid"])
    tensor([[0.5000, 0.0000],
            [0.5000, 0.5000]])
    """
    scores = operation.feature(query) @ operation.feature(key).mT / query.shape[-1] ** 0.5
    return operation.weigh(scores, visible)


def fused_softmax(
    query: Float[Tensor, "runs batch heads queries d"],
    key: Float[Tensor, "runs batch heads keys d"],
    value: Float[Tensor, "runs batch heads keys d"],
    visible: Bool[Tensor, "runs queries keys"],
) -> Float[Tensor, "runs batch heads queries d"]:
    """What softmax weights make of the values, without building the weights."""
    runs, count = query.shape[:2]
    added = torch.zeros(visible.shape).masked_fill(~visible, -torch.inf)
    each = added[:, None, None].expand(-1, count, -1, -1, -1)
    mask = added[0] if bool((visible == visible[:1]).all()) else each.flatten(0, 1)
    flat = (part.flatten(0, 1) for part in (query, key, value))
    return scaled_dot_product_attention(*flat, attn_mask=mask).unflatten(0, (runs, count))
