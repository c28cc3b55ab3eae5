"""Non-maximum suppression on a line: the highest scores, none of them near a higher one."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from regard._errors import InputError


def nms1d(
    scores: Float[Tensor, " length"],
    distance: int,
    *,
    most: int | None = None,
    forced: Iterable[int] = (),
) -> Int[Tensor, " kept"]:
    """Positions in order of falling score, each kept if it is farther than `distance` from every kept one.

    Args:
        scores: one score for each position; `-inf` (or NaN) takes a position out. Among equal scores the earlier one goes first.
        distance: 0 suppresses nothing.
        most: stop at this many positions, the forced ones among them.
        forced: positions that are kept whatever their score, and suppress others.

    Returns:
        The kept positions, ascending.

    Raises:
        InputError: a negative distance, or a forced position outside the line.

    Cost: one sort and O(kept x distance) steps.

    >>> import torch
    >>> nms1d(torch.tensor([0.0, 3.0, 2.0, 1.0, 2.5]), distance=1).tolist()
    [1, 4]
    """
    if distance < 0:
        raise InputError.of("distance", given=distance, expected="at least 0")
    length = len(scores)
    kept: list[int] = []
    near = bytearray(length)

    def keep(position: int) -> None:
        kept.append(position)
        lo, hi = max(0, position - distance), min(length, position + distance + 1)
        near[lo:hi] = b"\x01" * (hi - lo)

    for position in dict.fromkeys(forced):
        if not 0 <= position < length:
            raise InputError.of("forced", given=position, expected=f"positions in 0..{length - 1}")
        keep(position)
    order = torch.argsort(scores.nan_to_num(nan=-torch.inf), descending=True, stable=True)
    candidates = order[: int((scores > -torch.inf).sum())]
    for position in candidates.tolist():
        if most is not None and len(kept) >= most:
            break
        if not near[position]:
            keep(position)
    return torch.tensor(sorted(kept), dtype=torch.long, device=scores.device)
