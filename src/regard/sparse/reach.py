"""Reach: which blocks (or tokens) can influence which after a number of layers.

One layer moves information from every key a query sees to that query, and the residual stream keeps what is there, so

    hops(q, q) = 0,   hops(q, k) = fewest layers in which a path  q -> ... -> k  of seen keys exists,

and after l layers q can know of k when hops(q, k) <= l. Exact: propagation of sets along the lists. Where a pattern names
whole blocks this holds for tokens as well: an earlier block that is reached is reached with all its tokens. Patterns that
hide single tokens, and patterns of single tokens (block = 1), are propagated token by token. Heads that differ are joined,
since the residual stream joins them.

    Power (window 1, no sinks), N = 2^m blocks:   sum_{i <= l} C(m, i) blocks reach the last one after l layers
    Sliding (window n, no sinks):                 n + (l - 1)(n - 1)

Cost: layers x named pairs x N / block bits of work, memory (N / block)^2 bytes (N^2 for token patterns).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from regard._errors import InputError
from regard.sparse.pattern import Pattern

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FAR = 127
"""What `hops` holds where no path was found."""


@dataclass(frozen=True)
class Reach:
    """Who can know of whom.

    Attributes:
        hops: `[units, units]`: fewest layers from key unit (column) to query unit (row), `FAR` where it takes more than
            `layers` or is impossible.
        unit: tokens in a unit.
        layers: how many layers were followed.
    """

    hops: Int[Tensor, "units units"]
    unit: int
    layers: int

    def counts(self, query: int = -1) -> list[int]:
        """How many units the query unit can know of after 1, 2, ... layers."""
        row = self.hops[query]
        return [int((row <= layer).sum()) for layer in range(1, self.layers + 1)]

    def holes(self, query: int = -1) -> list[int]:
        """Earlier units that the query unit cannot know of within the layers followed."""
        here = len(self.hops) + query if query < 0 else query
        return (self.hops[here, : here + 1] == FAR).nonzero()[:, 0].tolist()

    def plot(self) -> Figure:
        """The hops of every pair, and how far the last unit sees by layer."""
        import matplotlib.pyplot as plt

        figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
        shown = np.ma.masked_equal(self.hops.numpy(), FAR)
        image = left.imshow(shown, cmap="viridis_r", interpolation="nearest")
        figure.colorbar(image, ax=left, label="layers needed")
        left.set(xlabel="influences (key)", ylabel="influenced (query)", title="fewest layers")
        right.plot(range(1, self.layers + 1), self.counts(), marker="o")
        right.axhline(len(self.hops), color="0.6", lw=0.8)
        right.set(xlabel="layers", ylabel="known to the last query", ylim=(0, None))
        return figure


def reach(pattern: Pattern, tokens: int, layers: int, *, heads: int = 1) -> Reach:
    """Follows a static pattern over `layers` layers of `heads` query heads.

    >>> from regard.sparse import Power
    >>> reach(Power(window=1, sinks=0, block=4), 32, 3).counts()  # 8 blocks: 1 + 3, + 3, + 1
    [4, 7, 8]
    """
    if not pattern.static:
        raise InputError(
            f"{type(pattern).__name__} chooses its blocks by the queries, so its reach depends on the text; "
            "reach() follows patterns that depend on positions only"
        )
    if tokens < 1 or not 0 < layers < FAR:
        raise InputError(
            f"reach needs 1 token or more and 1..{FAR - 1} layers, got {tokens} and {layers}"
        )
    unit, seen = _seen(pattern, tokens, heads)
    count = len(seen)
    known = torch.eye(count, dtype=torch.bool)
    hops = torch.full((count, count), FAR, dtype=torch.int8)
    hops[known] = 0
    for layer in range(1, layers + 1):
        known = torch.stack([known[keys].any(0) for keys in seen]) | known
        hops[known & (hops == FAR)] = layer
    return Reach(hops, unit, layers)


def _seen(pattern: Pattern, tokens: int, heads: int) -> tuple[int, list[Tensor]]:
    """The units that each unit sees in one layer, over all heads; units are blocks where blocks are seen whole."""
    kinds = list({id(p): p for p in (pattern.of_head(h, heads) for h in range(heads))}.values())
    probe = torch.zeros(1, dtype=torch.long)
    if all(kind.visible(probe, probe) is None for kind in kinds):
        lists = [kind.lists(tokens, tokens) for kind in kinds]
        joined = [sorted(set().union(*named)) for named in zip(*lists, strict=True)]
        return pattern.block, [torch.tensor(named) for named in joined]
    visible = torch.zeros(tokens, tokens, dtype=torch.bool)
    rows = torch.arange(tokens)
    for kind in kinds:
        window = kind.mask(tokens, tokens).window(rows)
        shown = window.visible(tokens, rows.device)
        assert shown is not None
        visible[:, window.lo : window.hi] |= shown[0, 0]
    return 1, [row.nonzero()[:, 0] for row in visible]
