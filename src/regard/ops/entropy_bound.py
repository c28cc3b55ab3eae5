"""How small the entropy of an attention row can be, given the size of its scores: the bound behind entropy collapse.

For a row of T scores u with ||u||_2 <= s, and beta = exp(-s sqrt(T / (T - 1))),

    H(softmax(u))  >=  log(1 + (T - 1) beta) + s sqrt(T (T - 1)) beta / (1 + (T - 1) beta)

with equality for u = s (e_1 - 1/T) / ||e_1 - 1/T||: one key above all others, which are equal. For large s the bound falls
like T s exp(-s). In a layer, u_i = c X W_K^T W_Q x_i (c the scaling), so that s = c ||W_K^T W_Q||_2 ||X X^T||_2 bounds every
row: entropy can only collapse where the norm of the product of query and key weights, or of the input, has grown.

Source: Zhai et al. 2023, "Stabilizing Transformer Training by Preventing Attention Entropy Collapse", arXiv 2303.06296,
theorem 3.1. Rotary positions turn every key by another angle, so the product of the weights has another norm for every pair
of positions and the paper's s is no bound for them; `score_norm(..., rotary=True)` takes one that is.

Cost: a few numbers a row; `score_norm` takes the spectral norms of the weights and of X.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from regard._errors import InputError


def entropy_lower_bound(
    norm: Float[Tensor, "..."], keys: int | Int[Tensor, "..."]
) -> Float[Tensor, "..."]:
    """The smallest entropy, in nats, of a softmax over `keys` scores of Euclidean norm at most `norm`.

    Falls from log(keys) at norm 0 towards 0; a row of one key has entropy 0. `norm` and `keys` broadcast.

    Raises:
        InputError: a row of no keys, or a negative norm.

    >>> entropy_lower_bound(torch.tensor([0.0, 2.0, 12.0], dtype=torch.float64), 8)
    tensor([2.0794e+00, 1.5683e+00, 2.5972e-04], dtype=torch.float64)
    """
    count = torch.as_tensor(keys, device=norm.device)
    if bool((count < 1).any()):
        raise InputError.of("keys", given=int(count.min()), expected="at least 1 in every row")
    if bool((norm < 0).any()):
        raise InputError.of("norm", given=float(norm.min()), expected="a norm, so at least 0")
    count = count.to(norm.dtype)
    rest = count - 1
    beta = torch.exp(-norm * torch.sqrt(count / rest.clamp_min(1)))
    bound = torch.log1p(rest * beta) + norm * torch.sqrt(count * rest) * beta / (1 + rest * beta)
    return torch.where(rest > 0, bound, torch.zeros_like(bound))


def extremal_scores(norm: Float[Tensor, "*rows"], keys: int) -> Float[Tensor, "*rows keys"]:
    """The scores of that norm whose softmax has the smallest entropy: `entropy_lower_bound` exactly.

    >>> extremal_scores(torch.tensor(1.0), 2)
    tensor([ 0.7071, -0.7071])
    """
    if keys < 2:
        raise InputError.of("keys", given=keys, expected="2 or more")
    direction = torch.full((keys,), -1 / keys, dtype=norm.dtype, device=norm.device)
    direction[0] += 1
    return norm[..., None] * (direction / direction.norm())


def score_norm(
    query_weight: Float[Tensor, "dim width"],
    key_weight: Float[Tensor, "dim width"],
    hidden: Float[Tensor, "*batch tokens width"],
    *,
    scaling: float,
    rotary: bool = False,
) -> Float[Tensor, "*batch"]:
    """A bound s on the norm of every row of scores of one head, to be put into `entropy_lower_bound`.

    Args:
        query_weight: W_Q of the head, as in `torch.nn.Linear`.
        key_weight: W_K of the head.
        hidden: X, what the layer's projections read (after the norm).
        scaling: factor on query . key, 1 / sqrt(dim) as a rule.
        rotary: whether queries and keys are turned by their positions. Then s = scaling ||W_Q||_2 ||W_K||_2 ||X||_F max ||x_i||,
            which holds whatever the angles; else s = scaling ||W_K^T W_Q||_2 ||X||_2^2, the paper's.

    Cost: O(width dim^2 + tokens width min(tokens, width)) for the norms.
    """
    if rotary:
        weights = spectral_norm(query_weight) * spectral_norm(key_weight)
        return scaling * weights * hidden.flatten(-2).norm(dim=-1) * hidden.norm(dim=-1).amax(-1)
    left, right = torch.linalg.qr(key_weight.T)[1], torch.linalg.qr(query_weight.T)[1]
    return scaling * spectral_norm(left @ right.T) * spectral_norm(hidden).square()


def spectral_norm(matrix: Float[Tensor, "*batch rows columns"]) -> Float[Tensor, "*batch"]:
    """The largest singular value, from the eigenvalues of the smaller Gram matrix."""
    if matrix.shape[-2] > matrix.shape[-1]:
        matrix = matrix.transpose(-1, -2)
    return torch.linalg.eigvalsh(matrix @ matrix.transpose(-1, -2))[..., -1].clamp_min(0).sqrt()
