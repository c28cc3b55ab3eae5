"""How far one model's next-token distributions are from another's, or from the text itself.

    KL(P || Q)_t = sum_v P_t(v) (log P_t(v) - log Q_t(v))        nats; P the reference
    NLL_t        = -log Q_t(x_{t+1})                             nats
    top-1        = share of t with argmax P_t = argmax Q_t

All three take logits, work in float32 (float64 stays float64) and return one number a position,
so that the caller decides over what to average. Cost: a few passes over the logits.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def kl_divergence(
    reference: Float[Tensor, "*positions vocabulary"],
    other: Float[Tensor, "*positions vocabulary"],
) -> Float[Tensor, "*positions"]:
    """KL divergence of `other` from `reference`, both logits, in nats; never below zero.

    A token that the reference rules out (logit -inf) adds nothing, whatever the other says.

    >>> kl_divergence(torch.tensor([0.0, 0.0]), torch.tensor([0.0, 0.0])).item()
    0.0
    """
    p, q = _log_softmax(reference), _log_softmax(other)
    terms = torch.where(p == -torch.inf, 0.0, p.exp() * (p - q))
    return terms.sum(-1).clamp(min=0)


def negative_log_likelihood(
    logits: Float[Tensor, "*positions vocabulary"], targets: Int[Tensor, "*positions"]
) -> Float[Tensor, "*positions"]:
    """Minus the log-probability that the logits give to `targets`, in nats.

    >>> negative_log_likelihood(torch.zeros(1, 4), torch.tensor([2])).exp().item()  # 1 / 4
    4.0
    """
    return -_log_softmax(logits).gather(-1, targets[..., None])[..., 0]


def top1_agreement(
    reference: Float[Tensor, "*positions vocabulary"],
    other: Float[Tensor, "*positions vocabulary"],
) -> Bool[Tensor, "*positions"]:
    """Whether both give the same token the largest logit (the first of equals).

    >>> top1_agreement(torch.eye(3), torch.eye(3).roll(1, 0)).any().item()
    False
    """
    return reference.argmax(-1) == other.argmax(-1)


def _log_softmax(logits: Tensor) -> Tensor:
    if logits.dtype != torch.float64:
        logits = logits.float()
    return logits.log_softmax(-1)
