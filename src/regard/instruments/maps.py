"""Pooled attention maps: the picture of a head at any length, block-averaged on the way.

Cell (i, j) is the mean over the queries of bin i of the attention they give to all keys of bin j, so each row of the picture
sums to 1 like a row of the map. Memory O(heads x bins^2), whatever the text's length.
"""

from __future__ import annotations

import torch
from torch import Tensor

from regard._errors import InputError
from regard.engine import Block
from regard.instruments.base import Instrument


class PooledMaps(Instrument):
    """`[heads, bins, bins]` for each site, averaged over sequences; decode steps are not drawn.

    Cost: one column sum of each block.
    """

    states = {"sum": "sum", "rows": "sum"}

    def __init__(self, bins: int = 64) -> None:
        if bins < 2:
            raise InputError.of("bins", given=bins, expected="at least 2")
        super().__init__()
        self.bins = bins

    def weights(self, block: Block) -> None:
        call = block.call
        if call.queries < 2:
            return
        keys = call.keys
        edges = torch.arange(self.bins + 1, device=block.rows.device) * keys // self.bins
        inside = edges.clamp(block.window.lo, block.window.hi) - block.window.lo
        bins = (
            block.positions * self.bins // keys
            if block.site.kind == "self"
            else block.rows * self.bins // call.queries
        )
        firsts, counts = torch.unique_consecutive(bins, return_counts=True)
        picture = torch.zeros(
            call.heads, self.bins, self.bins, dtype=torch.float32, device=block.rows.device
        )
        rows = torch.zeros(self.bins, device=block.rows.device)
        start = 0
        several = len(firsts) > 1
        for index, count in zip(firsts.tolist(), counts.tolist(), strict=True):
            part = slice(start, start + count)
            sums = block.row_sum(part) if several else block.received()
            total = torch.nn.functional.pad(sums.sum(0).cumsum(-1), (1, 0))
            picture[:, index] += (total[:, inside[1:]] - total[:, inside[:-1]]).float()
            valid = (
                count * sums.shape[0] if block.valid is None else float(block.valid[:, part].sum())
            )
            rows[index] += valid
            start += count
        key = block.site.key
        held = self.state["sum"].get(key)
        if held is None:
            self.state["sum"][key], self.state["rows"][key] = picture, rows
        else:
            held += picture
            self.state["rows"][key] += rows

    def compute(self) -> dict[tuple[str, int], Tensor]:
        return {
            key: total / self.state["rows"][key].clamp_min(1)[:, None]
            for key, total in self.state["sum"].items()
        }
