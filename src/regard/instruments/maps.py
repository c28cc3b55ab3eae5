"""Pooled attention maps: the picture of a head at any length, block-averaged on the way.

Cell (i, j) is the mean over the queries of bin i of the attention they give to all keys of bin j, so each row of the picture
sums to 1 like a row of the map. Memory O(heads x bins^2), whatever the text's length.
"""

from __future__ import annotations

from collections import Counter
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from regard._errors import InputError
from regard.engine import Block
from regard.instruments.base import Instrument

if TYPE_CHECKING:
    from collections.abc import Sequence

    import polars
    from matplotlib.figure import Figure

    from regard.coordinates import Head


@lru_cache(maxsize=16)
def _edges(bins: int, keys: int, device: torch.device) -> Tensor:
    """`[bins + 1]`: where each bin of keys begins; key k lies in bin `k * bins // keys`."""
    return (torch.arange(bins + 1, device=device) * keys + bins - 1) // bins


class PooledMaps(Instrument):
    """`[heads, bins, bins]` for each site, averaged over sequences; decode steps are not drawn.

    A padded sequence is drawn in its slots: pad on the right, or draw one text at a time.

    Cost: one column sum of each block (shared with the sinks where a block lies in one bin).

    >>> import torch
    >>> from regard.engine import AttentionCall, Pipeline, attend
    >>> maps, zeros = PooledMaps(bins=2), torch.zeros(1, 1, 4, 8)
    >>> _ = attend(AttentionCall.make(zeros, zeros, zeros), Pipeline([maps]))  # rows 1 1/2 1/3 1/4
    >>> maps.compute()["", 0][0]
    tensor([[1.0000, 0.0000],
            [0.5833, 0.4167]])
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
        keys = call.keys  # of a preallocated cache, only the slots in use
        if block.site.causal and block.site.kind == "self":
            keys = min(keys, call.queries + call.query_offset)
        edges = _edges(self.bins, keys, block.rows.device)
        inside = edges.clamp(block.window.lo, block.window.hi) - block.window.lo
        bins = (
            block.positions * self.bins // keys
            if block.site.kind == "self"
            else block.rows * self.bins // call.queries
        ).tolist()
        runs = Counter(bins)  # ascending, as the rows are
        sums = block.received_by_part(list(runs.values()))
        sums = sums.sum(1) if sums.shape[1] > 1 else sums[:, 0]  # [parts, heads, keys]
        total = sums.new_zeros(*sums.shape[:-1], sums.shape[-1] + 1)
        torch.cumsum(sums, -1, out=total[..., 1:])
        shares = total[..., inside].diff(dim=-1)
        picture, rows = self._picture(block)
        picture[:, list(runs)] += shares.transpose(0, 1)
        if block.valid is None:
            counts = rows.new_tensor(list(runs.values())) * block.weights.shape[0]
        else:
            parts = block.valid.sum(0).float().split(list(runs.values()))
            counts = torch.stack([part.sum() for part in parts])
        rows[list(runs)] += counts

    def _picture(self, block: Block) -> tuple[Tensor, Tensor]:
        """The running sums of a site: `[heads, bins, bins]` and `[bins]`."""
        key, sums, rows = block.site.key, self.state["sum"], self.state["rows"]
        if key not in sums:
            shape, device = (block.call.heads, self.bins, self.bins), block.rows.device
            sums[key] = torch.zeros(shape, device=device)
            rows[key] = torch.zeros(self.bins, device=device)
        elif sums[key].is_inference() and not torch.is_inference_mode_enabled():
            sums[key], rows[key] = sums[key].clone(), rows[key].clone()
        return sums[key], rows[key]

    def compute(self) -> dict[tuple[str, int], Tensor]:
        return {
            key: total / self.state["rows"][key].clamp_min(1)[:, None]
            for key, total in self.state["sum"].items()
        }

    def to_frame(self) -> polars.DataFrame:
        """Columns `stack, layer, head, query_bin, key_bin, value` (needs the `frames` extra)."""
        import polars

        frames = []
        for (stack, layer), maps in self.compute().items():
            grid = torch.meshgrid(*[torch.arange(size) for size in maps.shape], indexing="ij")
            names = ("head", "query_bin", "key_bin")
            columns = {name: axis.flatten().numpy() for name, axis in zip(names, grid, strict=True)}
            frames.append(
                polars.DataFrame(columns).select(
                    polars.lit(stack).alias("stack"),
                    polars.lit(layer).alias("layer"),
                    *names,
                    polars.Series("value", maps.flatten().cpu().numpy()),
                )
            )
        if not frames:
            raise InputError("PooledMaps has not observed any text yet")
        return polars.concat(frames)

    def plot(self, *, heads: Sequence[str | Head] | None = None, columns: int = 6) -> Figure:
        """A grid of thumbnails, the first 24 heads or `heads` ("L5H3"); darker is more (needs the `plot` extra).

        The colour follows the square root of the attention, scaled for each head. Bins that no query fell into are left out.
        """
        import matplotlib.pyplot as plt

        from regard.coordinates import Head

        maps = self.compute()
        if not maps:
            raise InputError("PooledMaps has not observed any text yet")
        chosen = [Head.parse(head) if isinstance(head, str) else head for head in heads or ()]
        if heads is None:
            chosen = [
                Head(layer, head, stack)
                for (stack, layer), m in maps.items()
                for head in range(len(m))
            ][:24]
        down = -(-len(chosen) // columns)
        size = (1.4 * min(columns, len(chosen)), 1.55 * down)
        figure, axes = plt.subplots(
            down, min(columns, len(chosen)), figsize=size, squeeze=False, layout="constrained"
        )
        for ax in axes.flat:
            ax.set_axis_off()
        for ax, head in zip(axes.flat, chosen, strict=False):
            key = (head.stack, head.layer)
            if key not in maps or head.head >= len(maps[key]):
                raise InputError.of("head", given=str(head), expected="one that was observed")
            used = (self.state["rows"][key] > 0).cpu()
            picture = maps[key][head.head].cpu()[used]
            picture = picture if "cross" in head.stack else picture[:, used]
            ax.imshow(picture.sqrt().numpy(), cmap="Greys", vmin=0, aspect="auto")
            ax.set_title(str(head), fontsize=8)
        return figure
