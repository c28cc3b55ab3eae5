"""How a number of cache slots is shared out over layers, in whole slots.

Sources: CAKE's preferences (arXiv 2503.12491), PyramidKV's arithmetic (arXiv 2406.02069).
Cost: microseconds; everything is linear in the number of layers.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from regard._errors import InputError


def allocate_layer_budgets(
    preference: Float[Tensor, " layers"], total: int, cap: int | Int[Tensor, " layers"]
) -> Int[Tensor, " layers"]:
    """Slots in proportion to the layers' preferences: whole numbers, at most `cap` each, `total` in all.

    A layer gets `min(cap, round(preference / price))` slots at the price that spends `total` (Webster's rule). It is within a
    slot or so of CAKE's `total * preference / sum`, and it has the property on which CAKE's cascade rests: when a layer is
    added, no other layer gains a slot. The released code cuts fractions off, hands what is left or above the cap to the layers
    in equal parts, and so may give an early layer more than it had, which a cascade cannot give back.

    Args:
        preference: not negative; layers of preference 0 get slots only when all others are full.
        total: slots to give; no more than the caps allow are given.
        cap: the most that a layer can use.

    >>> allocate_layer_budgets(torch.tensor([1.0, 2.0, 5.0]), 16, cap=8)
    tensor([3, 5, 8])
    """
    weights = preference.double()
    if total < 0:
        raise InputError.of("total", given=total, expected="at least 0")
    if not bool((weights >= 0).all()) or not bool(torch.isfinite(weights).all()):
        raise InputError.of(
            "preference", given=preference.tolist(), expected="finite numbers, at least 0"
        )
    caps = torch.as_tensor(cap).expand(len(weights)).long()
    total = min(total, int(caps.sum()))
    least = weights.max().clamp_min(1e-300) * 1e-15
    weights = torch.maximum(weights, least)  # equal shares where nothing is preferred

    def seats(price: float) -> Tensor:
        return torch.minimum(caps, torch.floor(weights / price + 0.5).clamp_max(2**53).long())

    dear = float(weights.max()) * 4
    cheap = dear
    while int(seats(cheap).sum()) < total:
        cheap /= 2
    for _ in range(80):
        middle = (dear * cheap) ** 0.5
        if int(seats(middle).sum()) <= total:
            dear = middle
        else:
            cheap = middle
    given = seats(dear)
    for _ in range(total - int(given.sum())):  # ties at the price
        claim = torch.where(given < caps, weights / (given + 0.5), -1.0)
        given[claim.argmax()] += 1
    return given


def pyramid_budgets(
    layers: int, mean: float | int, longest: int, beta: float | int = 20.0
) -> Float[Tensor, " layers"]:
    """PyramidKV's slots beside the window, falling linearly from the first layer to the last; their mean is `mean`.

        least = mean / beta,  most = 2 mean - least,  layer l gets most - l (most - least) / (layers - 1),

    and where `most` exceeds what there is to keep, `most = longest` and `least = 2 mean - most`.

    >>> pyramid_budgets(3, 20.0, 100)
    tensor([39., 20.,  1.], dtype=torch.float64)
    """
    if beta < 1:
        raise InputError.of("beta", given=beta, expected="at least 1")
    least = mean / beta
    most = 2 * mean - least
    if most > longest:
        most = float(longest)
        least = 2 * mean - most
    return torch.linspace(most, least, layers, dtype=torch.float64).clamp(0, longest)
