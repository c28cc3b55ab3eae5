"""Attention on a patch grid, gathered image by image: mean maps, hop profiles and relative maps.

A vision transformer's maps are small (65 x 65 for an 8 x 8 grid), but there is one for each image and head. This instrument
keeps what the analysis needs: the mean map of a head, the mean of its squared norm, its mean row entropy, and for each image
the hop profile and the relative map. Memory O(heads x tokens^2 + images x heads x patches).
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from regard.engine import AttentionCall, Block
from regard.instruments.base import HeadMeasure, Instrument, SiteKey
from regard.instruments.vision.naming import dependence, name_head, row_entropy
from regard.instruments.vision.patterns import relative_map
from regard.instruments.vision.strength import Grid, Hops, check_grid, hop_profile


class GridAttention(Instrument):
    """Gathers the attention of every head over the patches of images.

    Args:
        grid: rows and columns of patches.
        special: tokens in front of the patches (1 for CLS).
        keep: also keep the relative map of every image, for the pattern analysis.
    """

    states: ClassVar[dict[str, str]] = {
        **dict.fromkeys(("map", "square", "entropy", "images"), "sum"),
        **dict.fromkeys(("share", "relative"), "list"),
    }

    def __init__(self, grid: Grid, *, special: int = 1, keep: bool = True) -> None:
        super().__init__()
        self.grid, self.special, self.keep = grid, special, keep
        self._rows: list[Tensor] = []

    def weights(self, block: Block) -> None:
        if block.site.kind == "self":
            check_grid(block.call.keys, self.grid, self.special)
            self._rows.append(block.weights.clone())

    def after(self, call: AttentionCall) -> None:
        if not self._rows:
            return
        maps = torch.cat(self._rows, -2)  # [images, heads, tokens, tokens]
        self._rows = []
        key, grid, special = call.site.key, self.grid, self.special
        self.accumulate("map", key, maps.double().sum(0))
        self.accumulate("square", key, maps.double().square().sum((0, 2, 3)))
        self.accumulate("entropy", key, row_entropy(maps, special=special).double().sum(0))
        self.accumulate("images", key, torch.tensor(float(len(maps))))
        self.accumulate("share", key, [hop_profile(maps, grid, special=special).share])
        if self.keep:
            self.accumulate("relative", key, [relative_map(maps, grid, special=special)])

    def mean_map(self, key: SiteKey) -> Float[Tensor, "heads tokens tokens"]:
        """The mean over images of each head's map in one layer."""
        return (self.state["map"][key] / self.state["images"][key]).float()

    def hops(self, key: SiteKey) -> Hops:
        """The hop profile of each head in one layer, mean over images."""
        return hop_profile(self.mean_map(key), self.grid, special=self.special)

    def content(self, key: SiteKey) -> Float[Tensor, " heads"]:
        """Content dependence of each head in one layer."""
        count = self.state["images"][key]
        mean, square = self.state["map"][key] / count, self.state["square"][key] / count
        return dependence(mean, square).float()

    def relative(self, key: SiteKey) -> Float[Tensor, "images heads down across"]:
        """The relative maps of all images in one layer."""
        return torch.cat(self.state["relative"][key])

    def names(self, key: SiteKey) -> list[str]:
        """The pattern names of the heads of one layer."""
        entropy = self.state["entropy"][key] / self.state["images"][key]
        rows: Any = zip(self.mean_map(key), self.content(key), entropy, strict=True)
        return [
            name_head(mean, self.grid, content=float(c), entropy=float(e), special=self.special)
            for mean, c, e in rows
        ]

    def compute(self) -> dict[str, HeadMeasure]:
        """`mean_hop`, `self_share` (S_0), `cls_share`, `from_cls` and `content_dependence` of every head."""
        definitions = {
            "mean_hop": ("patches", "sum k S_k / sum S_k, S_k the attention at hop k"),
            "self_share": ("share", "S_0, the attention of patches on themselves"),
            "cls_share": ("share", "mean attention of patches on special tokens"),
            "from_cls": ("share", "attention of the CLS token on patches"),
            "content_dependence": ("share", "E|A(x) - mean A|^2 / E|A(x) - uniform|^2 over images"),
        }
        found = {
            name: HeadMeasure(name, unit, {}, {}, d) for name, (unit, d) in definitions.items()
        }
        for key in self.state["map"]:
            hops = self.hops(key)
            values = (hops.mean_hop, hops.share[..., 0], hops.special, hops.back, self.content(key))
            for measure, value in zip(found.values(), values, strict=True):
                measure.values[key] = value
        return found
