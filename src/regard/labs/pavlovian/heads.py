"""The effective dimension of a head's keys, and how many associations it lets a linear memory hold."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from regard.engine import AttentionCall, Method


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


class KeyReader(Method):
    """Keeps the keys of every layer, `[batch, kv heads, tokens, dim]`, after their positions."""

    reads_only = True

    def __init__(self) -> None:
        self.keys: dict[int, Tensor] = {}

    def before(self, call: AttentionCall) -> None:
        self.keys[call.site.layer] = call.key.detach()


@dataclass(frozen=True, slots=True)
class HeadCapacity:
    """What a linear memory could hold on the keys of one KV head.

    Attributes:
        layer, head: which.
        dimension: effective dimension of the centred keys.
        cross_talk: mean squared error that each further association adds, 1 over `dimension`.
        safe: associations without interference in the worst case, the square root of `dimension`.
    """

    layer: int
    head: int
    dimension: float
    cross_talk: float
    safe: float


@torch.no_grad()
def head_capacity_report(
    model: nn.Module,
    tokens: Int[Tensor, "batch tokens"],
    places: Int[Tensor, " places"] | None = None,
) -> list[HeadCapacity]:
    """Reads the keys of a live model on texts without padding: a row for each KV head of each layer.

    Keys are taken after their positions, all texts together, so that rotations count as directions. The first token of a text
    often is an attention sink with a key far off all others; `places` leaves out what is not an association.

    Args:
        model: anything `attach` takes.
        tokens: of one or more texts.
        places: positions whose keys count; all by default.

    Cost: one forward pass, and O(batch x places x dim^2) for each KV head.
    """
    from regard.attach import attach  # loads transformers, which nothing else here needs

    reader = KeyReader()
    with attach(model, reader):
        model(tokens)
    rows = []
    for layer, keys in sorted(reader.keys.items()):
        kept = keys if places is None else keys[:, :, places]
        pooled = kept.transpose(0, 1).flatten(1, 2).double()
        for head, ratio in enumerate(participation_ratio(centred(pooled)).tolist()):
            rows.append(HeadCapacity(layer, head, ratio, 1 / ratio, ratio**0.5))
    return rows
