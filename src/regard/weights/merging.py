"""Merge fine-tuned models of one base by the curvature that their optimisers already hold: FFG and OTA.

    v = capture_second_moments(optimizer, expert)           Adam's exp_avg_sq, raw, by parameter name
    kept = fast_fisher_graft(base, expert, v, density=0.4)  only the edits with the largest v (w - w_0)^2; the rest is the base
    merged = merge_ota(base, experts, moments, densities=[0.4, 0.3])
    model.load_state_dict(merged)

Models are state dicts. The threshold of a graft is one for the whole model: which layers and roles keep their edits is its
finding (`mask_density`). Experts trained with other batch sizes or clipping have moments of another scale and dominate;
`scale_free` divides each tensor's weights by their mean.

Source: Mahdavinia et al. 2025, "Harnessing Optimization Dynamics for Curvature-Informed Model Merging", arXiv 2509.11167. The
released code multiplies its epsilon by the mask as well and repairs the division by 0 afterwards; here the quotient is taken
where there is one. It also leaves the mask out of its linear and TIES variants unless told otherwise; here a graft is always
applied. It takes numbers whose moment is 0 for every expert back to the base; here they get the plain mean, as the formula says.
The mathematics is in `regard.ops.merging`; from files to files it goes by `regard.weights.merge_files`.

Cost: a few passes over the weights in float32, and experts x 3 copies of one tensor at a time; a graft holds all saliencies.
State dicts are read one tensor at a time, so a mapping that reads from a file as it is asked will do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from regard._errors import InputError
from regard.ops.merging import (
    EPSILON,
    curvature_mean,
    drop_and_rescale,
    elected_mean,
    fisher_saliency,
    graft_threshold,
    low_rank,
    rank_one,
)

Weights = Mapping[str, Tensor]
"""A state dict."""
EMBEDDINGS = ("embed", "wte", "wpe", "lm_head")
"""What embeddings and heads are called; published low-rank compression leaves them out."""


def capture_second_moments(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """Adam's second moments by parameter name, raw (no bias correction), in float32; parameters without one are left out.

    Raises:
        InputError: the optimiser holds no second moments for the model's parameters.
    """
    found = {}
    for name, parameter in model.named_parameters():
        held = optimizer.state.get(parameter, {}).get("exp_avg_sq")
        if held is not None:
            found[name] = held.detach().float().clone()
    if not found:
        raise InputError(
            f"{type(optimizer).__name__} holds no exp_avg_sq for this model's parameters; use an Adam optimiser after a step, "
            "or estimate_fisher_diagonal"
        )
    return found


def estimate_fisher_diagonal(
    model: nn.Module, batches: Iterable[Any], loss: Callable[[nn.Module, Any], Tensor]
) -> dict[str, Tensor]:
    """The mean squared gradient over batches, for an expert whose optimiser is gone.

    Args:
        model: the expert.
        batches: as small as can be: the square of a mean gradient over a large batch is not the Fisher diagonal.
        loss: the loss of the model on one batch.
    """
    found: dict[str, Tensor] = {}
    count = 0
    for batch in batches:
        model.zero_grad()
        loss(model, batch).backward()
        count += 1
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                square = parameter.grad.detach().float().square()
                found[name] = found[name] + square if name in found else square
    model.zero_grad()
    if count == 0:
        raise InputError("a Fisher diagonal needs at least one batch")
    return {name: total / count for name, total in found.items()}


def compress_rank_one(second: Weights) -> dict[str, Tensor]:
    """Every matrix by the product of its row and column sums; vectors stay as they are."""
    return {n: rank_one(_working(v)) if v.ndim == 2 else v for n, v in second.items()}


def compress_low_rank(second: Weights, rank: int) -> dict[str, Tensor]:
    """Every matrix that is no embedding by its best approximation of that rank, negative numbers set to 0."""
    return {
        name: low_rank(_working(v), rank)
        if v.ndim == 2 and not any(word in name for word in EMBEDDINGS)
        else v
        for name, v in second.items()
    }


def graft_threshold_of(base: Weights, expert: Weights, second: Weights, density: float) -> float:
    """The saliency from which on a graft of that density keeps edits: one number to store in place of the density.

    Raises:
        InputError: tensors that do not fit, or a density outside [0, 1].
    """
    names = _fitting(base, expert, second)
    return graft_threshold([_saliency(base, expert, second, name) for name in names], density)


def graft_masks(
    base: Weights, expert: Weights, second: Weights, density: float
) -> dict[str, Tensor]:
    """Which numbers of each tensor a graft of that density keeps."""
    names = _fitting(base, expert, second)
    saliency = {name: _saliency(base, expert, second, name) for name in names}
    threshold = graft_threshold(list(saliency.values()), density)
    return {name: found >= threshold for name, found in saliency.items()}


def fast_fisher_graft(
    base: Weights, expert: Weights, second: Weights, density: float
) -> dict[str, Tensor]:
    """The base with the expert's most salient edits, `density` of all its numbers.

    Raises:
        InputError: tensors that do not fit, or a density outside [0, 1].
    """
    masks = graft_masks(base, expert, second, density)
    masks |= {name: masks[twin] for name, twin in _twins(base, [expert], masks).items()}
    return {
        name: torch.where(masks[name], expert[name], tensor) if name in masks else tensor.clone()
        for name, tensor in base.items()
    }


def merge_ota(
    base: Weights,
    experts: Sequence[Weights],
    second_moments: Sequence[Weights],
    *,
    densities: Sequence[float] | None = None,
    thresholds: Sequence[float] | None = None,
    power: float = 0.5,
    epsilon: float = EPSILON,
    scale_free: bool = False,
) -> dict[str, Tensor]:
    """The experts' edits averaged with weights v^power, after a graft of each where densities or thresholds are given.

    Args:
        base: the model that all experts started from.
        experts: fine-tuned models.
        second_moments: of each expert, by parameter name (`capture_second_moments`, perhaps `compress_rank_one`).
        densities: share of edits that each expert keeps; None keeps all.
        thresholds: in place of densities, the least saliency that each expert keeps (`graft_threshold_of`).
        power: 1/2 as published; 1 without a graft is plain Fisher merging.
        epsilon: added to v^power.
        scale_free: divide each tensor's v^power by its mean.

    Raises:
        InputError: lists of different lengths, densities and thresholds both, tensors that do not fit, or edits that are
            not finite.
    """
    _same_length(experts, second_moments=second_moments, densities=densities, thresholds=thresholds)
    if densities is not None and thresholds is not None:
        raise InputError("give densities or thresholds, got both; leave one out")
    pairs = list(zip(experts, second_moments, strict=True))
    every = [_fitting(base, expert, second) for expert, second in pairs]
    names = every[0]
    for other in every[1:]:
        if odd := sorted(set(names) ^ set(other)):
            raise InputError(
                f"all experts must have second moments of the same tensors, they differ in {', '.join(odd[:3])}"
            )
    twins = _twins(base, experts, names)
    if densities is not None:
        thresholds = [
            graft_threshold_of(base, expert, second, density)
            for (expert, second), density in zip(pairs, densities, strict=True)
        ]
    change = {}
    for name in names:
        edits = torch.stack([_edit(base, expert, name) for expert in experts])
        seconds = torch.stack([_working(second[name]) for second in second_moments])
        masks = None
        if thresholds is not None:
            least = torch.tensor(thresholds, dtype=torch.float64).view(-1, *[1] * (edits.ndim - 1))
            masks = fisher_saliency(edits, seconds) >= least.to(edits)
        if scale_free:
            means = seconds.pow(power).flatten(1).mean(1).view(-1, *[1] * (seconds.ndim - 1))
            seconds = seconds / means.clamp_min(1e-38).pow(1 / power)
        change[name] = curvature_mean(edits, seconds, masks, power=power, epsilon=epsilon)
    return _changed(base, change, twins)


def merge_linear(
    base: Weights, experts: Sequence[Weights], *, scale: float = 1.0
) -> dict[str, Tensor]:
    """The base plus `scale` times the mean edit. Merge grafted experts for FFG + linear."""
    _same_length(experts)
    edits = [_edits(base, expert) for expert in experts]
    return _changed(base, {n: scale * torch.stack([e[n] for e in edits]).mean(0) for n in edits[0]})


def merge_ties(
    base: Weights,
    experts: Sequence[Weights],
    *,
    density: float | Sequence[float] = 0.2,
    scale: float = 1.0,
) -> dict[str, Tensor]:
    """TIES: each expert's largest edits (over all its tensors), the elected sign, the mean of those that agree.

    `density` is one share for all experts or one for each.
    """
    trimmed = []
    for expert, share in zip(experts, _shares(density, experts), strict=True):
        edits = _edits(base, expert)
        sizes = [edit.abs() for edit in edits.values()]
        least = graft_threshold(sizes, share)
        trimmed.append({n: edit * (edit.abs() >= least) for n, edit in edits.items()})
    return _changed(
        base, {n: scale * elected_mean(torch.stack([e[n] for e in trimmed])) for n in trimmed[0]}
    )


def merge_dare(
    base: Weights,
    experts: Sequence[Weights],
    *,
    density: float | Sequence[float] = 0.2,
    elect: bool = True,
    seed: int = 0,
) -> dict[str, Tensor]:
    """DARE: edits dropped at random and rescaled, then TIES's elected mean, or the plain mean without `elect`.

    `density` is one share for all experts or one for each.
    """
    generator = torch.Generator().manual_seed(seed)
    dropped = [
        {n: drop_and_rescale(edit, share, generator) for n, edit in _edits(base, e).items()}
        for e, share in zip(experts, _shares(density, experts), strict=True)
    ]
    change = {}
    for name in dropped[0]:
        stacked = torch.stack([edits[name] for edits in dropped])
        change[name] = elected_mean(stacked) if elect else stacked.mean(0)
    return _changed(base, change)


def _fitting(base: Weights, expert: Weights, second: Weights | None = None) -> list[str]:
    """The tensors that take part: those with a second moment, or all floating ones.

    Raises:
        InputError: names or shapes that do not fit.
    """
    if set(base) != set(expert):
        odd = sorted(set(base) ^ set(expert))[:3]
        raise InputError(
            f"base and expert must have the same tensors, they differ in {', '.join(odd)}"
        )
    if second is not None and (unknown := sorted(set(second) - set(base))):
        raise InputError(
            f"second moments must be named as the base's tensors, such as {min(base)}, got {', '.join(unknown[:3])}"
        )
    found = []
    for name in base:
        tensor, other = base[name], expert[name]
        if tensor.shape != other.shape:
            raise InputError(
                f"{name} must have one shape, got {tuple(tensor.shape)} in the base and {tuple(other.shape)} in the expert"
            )
        if not tensor.is_floating_point() or (second is not None and name not in second):
            continue
        if second is not None and second[name].shape != tensor.shape:
            raise InputError(
                f"the second moment of {name} must have shape {tuple(tensor.shape)}, got {tuple(second[name].shape)}"
            )
        found.append(name)
    return found


def _edit(base: Weights, expert: Weights, name: str) -> Tensor:
    """What an expert changed, in float32 or better."""
    found = _working(expert[name]) - _working(base[name])
    if not bool(found.isfinite().all()):
        raise InputError(f"{name} must be finite in base and expert, got {_odd(found)}")
    return found


def _saliency(base: Weights, expert: Weights, second: Weights, name: str) -> Tensor:
    found = fisher_saliency(_edit(base, expert, name), _working(second[name]))
    if not bool(found.isfinite().all()):
        raise InputError(f"the second moment of {name} must be finite, got {_odd(second[name])}")
    return found


def _odd(tensor: Tensor) -> str:
    return f"{int((~tensor.isfinite()).sum())} of {tensor.numel()} numbers that are not"


def _edits(base: Weights, expert: Weights) -> dict[str, Tensor]:
    return {name: _edit(base, expert, name) for name in _fitting(base, expert)}


def _twins(base: Weights, experts: Sequence[Weights], known: Iterable[str]) -> dict[str, str]:
    """For tensors that an expert changed but that have no second moment: the known one that they equal in every model.

    A head that is tied to the embedding is a parameter under one of its two names only.
    """
    found, known = {}, list(known)
    models = [base, *experts]
    for name, tensor in base.items():
        if name in known or all(torch.equal(tensor, expert[name]) for expert in experts):
            continue
        same = (
            other
            for other in known
            if all(torch.equal(model[name], model[other]) for model in models)
        )
        found[name] = next(same, "")
        if not found[name]:
            raise InputError(
                f"{name} was changed by an expert but has no second moment, and is not tied to a tensor that has one"
            )
    return found


def _changed(
    base: Weights, change: Weights, twins: Mapping[str, str] | None = None
) -> dict[str, Tensor]:
    found = {}
    for name, tensor in base.items():
        source = (twins or {}).get(name, name)
        held = change.get(source)
        found[name] = tensor.clone() if held is None else (_working(tensor) + held).to(tensor.dtype)
    return found


def _working(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _same_length(experts: Sequence[Weights], **others: Sequence[Any] | None) -> None:
    if not experts:
        raise InputError.of("experts", given=experts, expected="at least one")
    for name, values in others.items():
        if values is not None and len(values) != len(experts):
            raise InputError.of(
                name, given=len(values), expected=f"one for each of {len(experts)} experts"
            )


def _shares(density: float | Sequence[float], experts: Sequence[Weights]) -> list[float]:
    """One density for each expert."""
    each = [density] * len(experts) if isinstance(density, float | int) else density
    found = [float(share) for share in each]
    _same_length(experts, density=found)
    return found
