"""Merging fine-tuned tensors: which edits to keep, and how to average what several experts kept.

With an expert's edit D = w - w_0 and the second moment v of its gradients (Adam's `exp_avg_sq`) as diagonal curvature:

    saliency = v D^2                        what putting a number back to the base costs, times two
    mask = saliency >= tau                  tau the k-th largest over ALL tensors of the model
    w = w_0 + sum_t P_t D_t / sum_t P_t     P_t = (v_t^p + eps) mask_t;  w_0 where no expert kept anything

p = 1 is the minimum of the summed quadratic losses, p = 1/2 (published) is Adam's own preconditioner. Beside it stand what it
is compared with: trimming by size and electing signs (TIES), dropping at random and rescaling (DARE).

Sources: Mahdavinia et al. 2025, "Harnessing Optimization Dynamics for Curvature-Informed Model Merging", arXiv 2509.11167; TIES,
arXiv 2306.01708 (its disjoint mean, over the experts that agree); DARE, arXiv 2311.03099.

Cost: a few passes over the tensors, in float32 or better; `graft_threshold` selects once over all numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from regard._errors import InputError

EPSILON = 1e-26
"""Second moments are as small as 1e-14: the usual 1e-8 would turn the weighted mean into a plain one."""


def rank_one(second: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
    """Row sums times column sums over the total: exact for a moment of rank one, and rows + columns numbers to keep.

    >>> rank_one(torch.tensor([[1.0, 2.0], [2.0, 4.0]]))
    tensor([[1., 2.],
            [2., 4.]])
    """
    total = second.sum()
    if not float(total) > 0:
        return torch.zeros_like(second)
    return second.sum(1, keepdim=True) @ (second.sum(0, keepdim=True) / total)


def low_rank(second: Float[Tensor, "rows columns"], rank: int) -> Float[Tensor, "rows columns"]:
    """The best approximation of that rank, negative numbers set to 0."""
    if rank < 1:
        raise InputError.of("rank", given=rank, expected="at least 1")
    left, sizes, right = torch.linalg.svd(second, full_matrices=False)
    return ((left[:, :rank] * sizes[:rank]) @ right[:rank]).relu()


def fisher_saliency(
    edit: Float[Tensor, "*shape"], second: Float[Tensor, "*shape"]
) -> Float[Tensor, "*shape"]:
    """`v D^2`."""
    return second * edit.square()


def graft_threshold(saliencies: Sequence[Float[Tensor, "..."]], density: float) -> float:
    """The k-th largest saliency over all tensors, k = floor(density x numbers); infinity when k is 0.

    >>> graft_threshold([torch.tensor([3.0, 1.0]), torch.tensor([[2.0, 0.0]])], 0.5)
    2.0

    Raises:
        InputError: a density outside [0, 1], or no numbers.
    """
    if not 0 <= density <= 1:
        raise InputError.of("density", given=density, expected="a share in [0, 1]")
    total = sum(saliency.numel() for saliency in saliencies)
    if total == 0:
        raise InputError("a threshold needs at least one number")
    kept = int(density * total + 1e-9)  # 0.3 x 10 is 2.9999...
    if kept == 0:
        return float("inf")
    everything = torch.cat([saliency.flatten() for saliency in saliencies])
    return float(torch.kthvalue(everything, total - kept + 1).values)


def curvature_mean(
    edits: Float[Tensor, "experts *shape"],
    seconds: Float[Tensor, "experts *shape"],
    masks: Bool[Tensor, "experts *shape"] | None = None,
    *,
    power: float = 0.5,
    epsilon: float = EPSILON,
) -> Float[Tensor, "*shape"]:
    """The edits' mean weighted by `(v^power + epsilon) mask`; 0, the base, where every mask is 0.

    Raises:
        InputError: a power that is not above 0, or an expert whose second moment has a negative number.

    >>> curvature_mean(torch.tensor([[1.0], [4.0]]), torch.tensor([[4.0], [1.0]]))
    tensor([2.])
    """
    if not power > 0:
        raise InputError.of("power", given=power, expected="above 0")
    if bool((seconds < 0).any()):
        raise InputError.of("second moments", given=float(seconds.min()), expected="at least 0")
    weights = seconds.pow(power) + epsilon
    if masks is not None:
        weights = weights * masks
    total = weights.sum(0)
    return torch.where(total > 0, (weights * edits).sum(0) / total.where(total > 0, 1.0), 0.0)


def elected_mean(edits: Float[Tensor, "experts *shape"]) -> Float[Tensor, "*shape"]:
    """The mean of the edits that agree with the sign of the sum, zeros left out (TIES).

    >>> elected_mean(torch.tensor([[3.0], [-1.0], [1.0], [0.0]]))
    tensor([2.])
    """
    agree = (edits.sign() == edits.sum(0).sign()) & (edits != 0)
    return (edits * agree).sum(0) / agree.sum(0).clamp_min(1)


def drop_and_rescale(
    edit: Float[Tensor, "*shape"], density: float, generator: torch.Generator
) -> Float[Tensor, "*shape"]:
    """Keeps each number with that probability and divides it by it, so that the expectation stays (DARE)."""
    if not 0 < density <= 1:
        raise InputError.of("density", given=density, expected="a share in (0, 1]")
    kept = torch.rand(edit.shape, generator=generator, device=generator.device) < density
    return edit * kept.to(edit.device) / density
