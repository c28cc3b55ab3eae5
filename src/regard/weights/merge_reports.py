"""What grafts and moments look like: which layers and roles keep their edits, how the masks are built, whose curvature is alike.

    masks = graft_masks(base, expert, moments, density=0.4)
    mask_density(masks)                    share kept by role: query, key, value, output, feed-forward, embedding, norm
    mask_density_by_layer(masks)           the same by layer and role
    mask_structure(mask)                   effective rank and empty rows and columns of one matrix, beside chance
    curvature_similarity(first, second)    cosine of the square roots of two experts' moments

Source: Mahdavinia et al. 2025, arXiv 2509.11167.

Cost: one pass over masks or moments; `mask_structure` adds two singular value decompositions, `curvature_rank_correlation` sorts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor

from regard._errors import InputError

Weights = Mapping[str, Tensor]

ROLES = {
    "query": r"(^|\.)(q_proj|query|wq)\.",
    "key": r"(^|\.)(k_proj|key|wk)\.",
    "value": r"(^|\.)(v_proj|value|wv)\.",
    "output": r"(^|\.)(o_proj|out_proj|wo)\.",
    "feed-forward": r"(^|\.)(gate_proj|up_proj|down_proj|fc1|fc2|mlp|ffn)\b",
    "embedding": r"(embed|wte|lm_head)",
    "norm": r"norm",
}
"""What the parameters of a role are called."""


_LAYER = re.compile(r"(?:^|\.)(?:layers?|h|blocks?)\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class MaskStructure:
    """How the ones of a mask stand, beside masks of the same density without any structure.

    Attributes:
        effective_rank: exp of the entropy of the normalised singular values.
        chance_rank: the same for the mask's numbers shuffled.
        empty: share of rows and columns, counted together, that keep nothing.
        chance_empty: its expectation for shuffled numbers, `(1 - density)^length` for a line of that length.
    """

    effective_rank: float
    chance_rank: float
    empty: float
    chance_empty: float


def mask_density(masks: Weights) -> dict[str, float]:
    """The share of numbers that a graft keeps, by role of the parameter; roles that the model lacks are left out.

    >>> mask_density({"layers.0.self_attn.q_proj.weight": torch.tensor([[True, False]])})
    {'query': 0.5}
    """
    kept: dict[str, tuple[int, int]] = {}
    for name, mask in masks.items():
        _add(kept, role_of(name), mask)
    return {role: count / total for role, (count, total) in kept.items()}


def mask_density_by_layer(masks: Weights) -> dict[tuple[int, str], float]:
    """The share kept by layer and role; parameters outside all layers are left out.

    >>> mask_density_by_layer({"layers.3.mlp.up_proj.weight": torch.tensor([[True, False]])})
    {(3, 'feed-forward'): 0.5}
    """
    kept: dict[tuple[int, str], tuple[int, int]] = {}
    for name, mask in masks.items():
        if found := _LAYER.search(name):
            _add(kept, (int(found[1]), role_of(name)), mask)
    return {place: count / total for place, (count, total) in kept.items()}


def role_of(name: str) -> str:
    """The role of a parameter by its name, "other" when none fits."""
    return next((role for role, pattern in ROLES.items() if re.search(pattern, name)), "other")


def mask_structure(mask: Bool[Tensor, "rows columns"], seed: int = 0) -> MaskStructure:
    """Whether a mask keeps whole rows and columns: rank and empty lines, beside chance.

    >>> half = torch.zeros(8, 8, dtype=torch.bool)
    >>> half[:4] = True
    >>> found = mask_structure(half)
    >>> round(found.effective_rank, 3), found.empty, round(found.chance_empty, 4)
    (1.0, 0.25, 0.0039)
    """
    rows, columns = mask.shape
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(mask.numel(), generator=generator).to(mask.device)
    shuffled = mask.flatten()[order].view(rows, columns)
    density = float(mask.double().mean())
    lines = rows + columns
    empty = int((~mask.any(1)).sum()) + int((~mask.any(0)).sum())
    chance = rows * (1 - density) ** columns + columns * (1 - density) ** rows
    return MaskStructure(_rank(mask), _rank(shuffled), empty / lines, chance / lines)


def _rank(mask: Tensor) -> float:
    sizes = torch.linalg.svdvals(mask.double())
    total = float(sizes.sum())
    return 0.0 if total == 0 else float(torch.special.entr(sizes / total).sum().exp())


def _add(kept: dict, place: object, mask: Tensor) -> None:
    count, total = kept.get(place, (0, 0))
    kept[place] = count + int(mask.sum()), total + mask.numel()


def curvature_similarity(first: Weights, second: Weights) -> float:
    """The cosine of the square roots of two experts' second moments, over all parameters that both have."""
    left, right = (moments.sqrt() for moments in _shared(first, second))
    return float(torch.nn.functional.cosine_similarity(left, right, dim=0))


def curvature_rank_correlation(first: Weights, second: Weights) -> float:
    """Spearman's correlation of two experts' second moments: alike in order, whatever their scale.

    Numbers that are equal take their order of place: meant for moments, whose numbers differ.
    """
    ranks = [moments.argsort(stable=True).argsort().double() for moments in _shared(first, second)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


def _shared(first: Weights, second: Weights) -> list[Tensor]:
    names = [name for name in first if name in second]
    if not names:
        raise InputError("the two models share no parameter names")
    for name in names:
        if first[name].shape != second[name].shape:
            raise InputError(
                f"the moments of {name} must have one shape, got {tuple(first[name].shape)} and {tuple(second[name].shape)}"
            )
    return [torch.cat([v[name].float().flatten() for name in names]) for v in (first, second)]
