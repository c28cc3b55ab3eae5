"""Gates of a mixture of heads: each token switches on a few heads and weighs what they write.

With H_i the output of head i, the attention layer writes sum_i g_i W_o,i H_i, where multi-head attention has g_i = 1. Of the
heads, the first h_s are shared (always on); of the h_r others, a token's router logits choose K, the set S:

    shared   g_i = 2 alpha_1 * h_s softmax(shared logits)_i
    routed   g_i = 2 alpha_2 * K softmax(routed logits)_i / (sum over S of the same)   for i in S, else 0
    alpha    = softmax(split logits)

Factors of 2, h_s and K keep the scale: with equal logits every head that is on has g_i = 1. (The paper's equations leave them
out, and the layer's output then shrinks by about the number of heads; the released models have them.) Without shared heads, or
without routed ones, the others stand alone and alpha is left out.

So that all heads are used, training adds h_r * sum_i f_i P_i, with f_i the share of tokens that choose head i and P_i its mean
probability; it is K when use is even. It has a gradient through P alone.

Source: Jin et al. 2024, "MoH: Multi-Head Attention as Mixture-of-Head Attention", arXiv 2410.11842.

Cost: a softmax and a top-K over the heads of each token.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from regard._errors import InputError


def chosen_heads(
    logits: Float[Tensor, "*tokens routed"], active: int
) -> Bool[Tensor, "*tokens routed"]:
    """The `active` heads of the highest logits of each token.

    Raises:
        InputError: `active` is not within 1 .. routed.

    >>> chosen_heads(torch.tensor([0.3, 0.1, 0.9]), 2)
    tensor([ True, False,  True])
    """
    routed = logits.shape[-1]
    if not 1 <= active <= routed:
        raise InputError.of("active", given=active, expected=f"within 1 .. {routed} routed heads")
    on = torch.zeros_like(logits, dtype=torch.bool)
    return on.scatter(-1, logits.topk(active, -1).indices, True)


def routed_gates(
    logits: Float[Tensor, "*tokens routed"], active: int
) -> Float[Tensor, "*tokens routed"]:
    """`active * p_i / sum_S p` on the chosen heads, 0 elsewhere: the softmax over the chosen, times their number.

    >>> routed_gates(torch.tensor([0.0, -1.0, 0.0]), 2)
    tensor([1., 0., 1.])
    """
    on = chosen_heads(logits, active)
    return active * logits.masked_fill(~on, -torch.inf).softmax(-1)


def head_gates(
    shared: Float[Tensor, "*tokens shared"],
    routed: Float[Tensor, "*tokens routed"],
    split: Float[Tensor, "*tokens 2"],
    active: int,
) -> Float[Tensor, "*tokens heads"]:
    """Gates of all heads from the logits of the three routers, shared heads first; `shared` or `routed` may be empty.

    Raises:
        InputError: `active` is not within 1 .. routed (0 where there are none).

    >>> head_gates(torch.zeros(2), torch.tensor([1.0, 0.0, 1.0]), torch.zeros(2), active=2)
    tensor([1., 1., 1., 0., 1.])
    """
    always = shared.shape[-1] * shared.softmax(-1)
    if routed.shape[-1] == 0:
        if active:
            raise InputError.of("active", given=active, expected="0 without routed heads")
        return always
    sometimes = routed_gates(routed, active)
    if shared.shape[-1] == 0:
        return sometimes
    alpha = 2 * split.softmax(-1)
    return torch.cat([alpha[..., :1] * always, alpha[..., 1:] * sometimes], -1)


def straight_through_gates(
    logits: Float[Tensor, "*tokens routed"], active: int
) -> Float[Tensor, "*tokens routed"]:
    """1 for the chosen heads and 0 for the others, with the gradient of the softmax over all of them.

    For pretrained models, whose heads must keep the weight of exactly 1. The paper says that it trains these gates with a
    straight-through estimator; which soft gate lends its gradient is our reading.

    >>> straight_through_gates(torch.tensor([0.3, 0.1, 0.9]), 2)
    tensor([1., 0., 1.])
    """
    hard = chosen_heads(logits, active).to(logits.dtype)
    if not logits.requires_grad:
        return hard
    soft = logits.softmax(-1)
    return hard + (soft - soft.detach())


def query_norm_logits(
    query: Float[Tensor, "batch routed tokens dim"],
) -> Float[Tensor, "batch tokens routed"]:
    """Router without parameters: each head's query norm, divided by their standard deviation over a token's routed heads.

    Rotary positions keep norms, so queries may be taken before or after them. Only the logits' scale, hence the softmax, depends
    on the deviation; the choice does not.

    Raises:
        InputError: fewer than two heads, which have no deviation.

    >>> query_norm_logits(torch.tensor([1.0, 3.0]).view(1, 2, 1, 1))
    tensor([[[0.7071, 2.1213]]])
    """
    if query.shape[1] < 2:
        raise InputError.of("routed heads", given=query.shape[1], expected="2 or more")
    norms = query.to(torch.promote_types(query.dtype, torch.float32)).norm(dim=-1).transpose(1, 2)
    return norms / norms.std(-1, keepdim=True).clamp_min(1e-6)


def load_balance_loss(
    logits: Float[Tensor, "*tokens routed"],
    active: int,
    valid: Bool[Tensor, "*tokens"] | None = None,
) -> Float[Tensor, ""]:
    """`routed * sum_i f_i P_i` over the tokens that are no padding: `active` when all heads are used evenly, more otherwise.

    >>> load_balance_loss(torch.zeros(6, 4), 2)
    tensor(2.)
    """
    probability = logits.softmax(-1).flatten(0, -2)
    on = chosen_heads(logits, active).to(probability.dtype).flatten(0, -2)
    if valid is not None:
        keep = valid.flatten()
        probability, on = probability[keep], on[keep]
    return logits.shape[-1] * (on.mean(0) * probability.mean(0)).sum()
