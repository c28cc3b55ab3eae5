"""Where a text breaks: how abruptly the attention that later tokens pay changes between two neighbouring tokens.

For the gap i, between tokens i and i + 1, with a window of w tokens on either side and the query rows r = i+w .. L-1:

    past_i   = sum_r sum_{j=i-w+1..i} A[r, j]
    future_i = sum_r sum_{j=i+1..i+w} A[r, j]
    R_i      = (max(past_i, future_i) + 1e-6) / (min(past_i, future_i) + 1e-6)

R is 1 where both sides matter alike to what follows and large at a boundary. Source: Xiong et al. 2025, "Long-Context
Modeling with Dynamic Hierarchical Sparse Attention for On-Device LLMs" (arXiv 2510.24606), the teacher of its boundary
predictor. The sums run over rows, so a map is read in blocks of rows and never held whole.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from regard._errors import InputError

EPSILON = 1e-6


def boundary_mass(
    weights: Float[Tensor, "rows keys"], first: int, window: int = 4, reach: int | None = None
) -> tuple[Float64[Tensor, " keys"], Float64[Tensor, " keys"]]:
    """What a block of query rows adds to `past` and `future` of every gap.

    Args:
        weights: attention of the rows `first .. first + rows - 1` to the keys 0 .. keys - 1.
        first: position of the first row.
        window: w.
        reach: the most rows that count for one gap (a layer's sliding window); None for all.

    Returns:
        past and future of the gaps 0 .. keys - 1; 0 where a side has fewer than w tokens.

    Cost: a running sum over the block, O(rows x keys) time and float64 memory; the sums of all blocks are O(keys).
    """
    rows, keys = weights.shape
    past, future = weights.new_zeros(2, keys, dtype=torch.float64)
    gaps = keys - 2 * window + 1
    if gaps < 1:
        return past, future
    running = torch.nn.functional.pad(weights.double().cumsum(-1), (1, 0))
    sums = running[:, window:] - running[:, :-window]  # sums[:, s] covers keys s .. s + w - 1
    gap = torch.arange(gaps, device=weights.device) + window - 1
    row = torch.arange(first, first + rows, device=weights.device)[:, None]
    counted = row >= gap + window
    if reach is not None:
        counted &= row < gap + window + reach
    past[window - 1 : window - 1 + gaps] = sums[:, :gaps].masked_fill(~counted, 0).sum(0)
    future[window - 1 : window - 1 + gaps] = (
        sums[:, window : window + gaps].masked_fill(~counted, 0).sum(0)
    )
    return past, future


def mass_ratio(
    past: Float64[Tensor, " length"], future: Float64[Tensor, " length"], window: int = 4
) -> Float64[Tensor, " length"]:
    """R of every gap from its two sums; 0 within 2w of either end, where there is too little to compare."""
    length = past.shape[0]
    ratio = (torch.maximum(past, future) + EPSILON) / (torch.minimum(past, future) + EPSILON)
    gap = torch.arange(length, device=past.device)
    return ratio.masked_fill((gap < 2 * window - 1) | (gap >= length - 2 * window), 0)


def boundary_ratio(
    attention: Float[Tensor, "length length"],
    window: int = 4,
    *,
    reach: int | None = None,
    rows: int = 256,
) -> Float64[Tensor, " length"]:
    """R of every gap from one whole head-averaged causal map, read `rows` rows at a time.

    Eight tokens of which the second half is never looked at again: the break is after the fourth.

    >>> import torch
    >>> attention = torch.zeros(12, 12)
    >>> attention[8:, :4] = 0.25
    >>> boundary_ratio(attention, window=2)[3] > 1000, boundary_ratio(attention, window=2)[4] > 1000
    (tensor(True), tensor(True))

    Raises:
        InputError: window below 1.

    Cost: O(length^2) time, O(rows x length) memory beyond the map.
    """
    if window < 1:
        raise InputError.of("window", given=window, expected="at least 1")
    past, future = attention.new_zeros(2, attention.shape[0], dtype=torch.float64)
    for first in range(0, len(attention), rows):
        one, other = boundary_mass(attention[first : first + rows], first, window, reach)
        past, future = past + one, future + other
    return mass_ratio(past, future, window)
