"""How much of a sink a key is: importance, the sink rate, and what both are when attention looks at nothing in particular."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor


def causal_mask(length: int) -> Bool[Tensor, "length length"]:
    """Which keys a query sees: itself and everything before it."""
    return torch.ones(length, length, dtype=torch.bool).tril()


def prefix_mask(length: int, prefix: int) -> Bool[Tensor, "length length"]:
    """Causal, and the first `prefix` tokens see each other."""
    visible = causal_mask(length)
    visible[:prefix, :prefix] = True
    return visible


def window_mask(length: int, window: int) -> Bool[Tensor, "length length"]:
    """Causal, and no query sees further back than its last `window` tokens, itself included."""
    return causal_mask(length).triu(1 - window)


def proxy_weights(
    weights: Float[Tensor, "*batch queries keys"],
) -> Float[Tensor, "*batch queries keys"]:
    """Rows that sum to one, for operations whose rows do not: `|s_ij| / (sum_j |s_ij| + 1e-8)`.

    Softmax rows stay what they are. Any common factor of a row drops out, so normalised and raw scores give the same proxies.
    """
    size = weights.abs()
    return size / (size.sum(-1, keepdim=True) + 1e-8)


def token_importance(
    weights: Float[Tensor, "*batch length length"],
    visible: Bool[Tensor, "... length length"] | None = None,
) -> Float[Tensor, "*batch length"]:
    """`a_k = mean over i >= k of A[i, k]`, over the rows that can see key k.

    For a causal mask that is `1 / (T - k + 1) sum_{i >= k} A[i, k]`. Rows before k, which a prefix mask lets see k, do not count;
    with a window only the rows that still see k do.

    >>> token_importance(torch.tensor([[1.0, 0.0], [0.5, 0.5]]))
    tensor([0.7500, 0.5000])
    """
    length = weights.shape[-1]
    rows = causal_mask(length)
    counted = rows if visible is None else rows & visible
    return (weights * counted).sum(-2) / counted.sum(-2).clamp(min=1)


def relative_importance(
    weights: Float[Tensor, "*batch length length"], window: int
) -> Float[Tensor, "*batch"]:
    """Mean attention on the oldest key in the window, over the rows that no longer see the first token of the text."""
    return weights.diagonal(-(window - 1), -2, -1)[..., 1:].mean(-1)


def sink_rate(importance: Float[Tensor, "*heads"], eps: float | int = 0.3) -> Float[Tensor, ""]:
    """`Sink^eps`: 100 times the share of (head, sequence) pairs whose importance is above eps, strictly."""
    return 100 * (importance > eps).float().mean()


def even_importance(length: int) -> Float[np.ndarray, "length"]:
    """a_k of attention that spreads evenly, `A[i, k] = 1 / i`: `1 / (T - k + 1) sum_{i >= k} 1 / i`.

    The first key gets `H_T / T` (H the harmonic number), far below any useful eps: nothing is a sink before training.

    >>> even_importance(2)
    array([0.75, 0.5 ])
    """
    rows = np.arange(1, length + 1)
    tail = np.cumsum((1 / rows)[::-1])[::-1]
    return np.asarray(tail / (length - rows + 1))
