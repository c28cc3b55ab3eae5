"""Mixture of experts: a router picks a few of many feed-forward layers for each token.

    g = softmax over the `active` largest logits, 0 elsewhere;      y = sum_e g_e down_e (silu(gate_e x) * up_e x)

So that all experts are used, training adds the balance loss

    E sum_e u_e P_e - 1,      u_e the mean gate of expert e,   P_e its mean probability (softmax over all logits)

which is 0 when use is even and E - 1 when one expert has everything. u is a count and has no gradient; P carries it.

Source: Shazeer et al. 2017, arXiv 1701.06538; the product of use and probability: Fedus et al. 2021, arXiv 2101.03961. Hydra
(arXiv 2508.15099) writes E sum_e u_e^2 - 1, whose released form has no gradient at all.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import silu

from regard.ops.head_gates import routed_gates


def expert_gates(
    logits: Float[Tensor, "*tokens experts"], active: int
) -> Float[Tensor, "*tokens experts"]:
    """The weight of every expert: they add up to 1, all but `active` of them are 0.

    Raises:
        InputError: `active` is not within 1 .. experts.

    >>> expert_gates(torch.tensor([0.0, -1.0, 0.0]), 2)
    tensor([0.5000, 0.0000, 0.5000])
    """
    return routed_gates(logits, active) / active


def expert_balance(
    gates: Float[Tensor, "*tokens experts"],
    logits: Float[Tensor, "*tokens experts"],
    valid: Bool[Tensor, "*tokens"] | None = None,
) -> Float[Tensor, ""]:
    """The balance loss over the tokens that are no padding.

    >>> logits = torch.tensor([[20.0, 0.0], [0.0, 20.0]])
    >>> float(expert_balance(expert_gates(logits, 1), logits)), float(expert_balance(expert_gates(logits[:1], 1), logits[:1]))
    (0.0, 1.0)
    """
    use, probability = gates.detach().flatten(0, -2), logits.softmax(-1).flatten(0, -2)
    if valid is not None:
        keep = valid.flatten()
        use, probability = use[keep], probability[keep]
    return logits.shape[-1] * (use.mean(0) * probability.mean(0)).sum() - 1


def expert_mixture(
    hidden: Float[Tensor, "tokens width"],
    gates: Float[Tensor, "tokens experts"],
    gate: Float[Tensor, "experts inner width"],
    up: Float[Tensor, "experts inner width"],
    down: Float[Tensor, "experts width inner"],
) -> Float[Tensor, "tokens width"]:
    """What the experts write to each token, weighed by its gates; an expert only sees the tokens whose gate is not 0.

    Cost: 3 width x inner multiplications for each gate that is not 0.

    >>> hidden, weight = torch.randn(5, 4), torch.randn(3, 3, 6, 4)
    >>> idle = torch.zeros(5, 3)
    >>> expert_mixture(hidden, idle, weight[0], weight[1], weight[2].mT).any()
    tensor(False)
    """
    output = torch.zeros_like(hidden)
    for expert in range(len(gate)):
        rows = gates[:, expert].nonzero()[:, 0]
        seen = hidden[rows]
        made = (silu(seen @ gate[expert].mT) * (seen @ up[expert].mT)) @ down[expert].mT
        output = output.index_add(0, rows, gates[rows, expert, None] * made)
    return output
