"""The effective dimension of a head's keys, and how many associations it lets a linear memory hold."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor


def centred(keys: Float[Tensor, "... tokens dim"]) -> Float[Tensor, "... tokens dim"]:
    """Keys without their mean: a common offset adds the same score to every key, which a softmax does not see."""
    return keys - keys.mean(-2, keepdim=True)


def participation_ratio(keys: Float[Tensor, "... tokens dim"]) -> Float[Tensor, "..."]:
    """`(sum lambda)^2 / sum lambda^2` over the eigenvalues of `K^T K`: d for keys that spread evenly over d directions.

    For pairs of keys of one covariance, 1 over it is E (k . k')^2 / (E |k|^2)^2, the cross-talk of `theory.cross_talk_error`.

    Cost: O(tokens x dim^2).

    >>> participation_ratio(torch.eye(6))
    tensor(6.)
    """
    moment = keys.mT @ keys
    return moment.diagonal(dim1=-2, dim2=-1).sum(-1).square() / moment.square().sum((-2, -1))


def safe_associations(keys: Float[Tensor, "... tokens dim"]) -> Float[Tensor, "..."]:
    """How many associations the worst case allows on these keys, centred: the square root of their effective dimension.

    >>> safe_associations(torch.cat([torch.eye(4), -torch.eye(4)]))
    tensor(2.)
    """
    return participation_ratio(centred(keys)).sqrt()
