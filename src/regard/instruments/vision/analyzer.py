"""Three linked views of a vision transformer's heads: importance, strength, patterns; and a page that shows them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from regard._errors import InputError
from regard.attach import attach
from regard.coordinates import Head
from regard.instruments.results import HeadMeasure, SiteKey
from regard.instruments.vision.importance import Importance, head_importance
from regard.instruments.vision.maps import GridAttention
from regard.instruments.vision.patterns import Clusters, Patterns, cluster, fit_patterns
from regard.instruments.vision.strength import Grid, Hops

if TYPE_CHECKING:
    import polars


@dataclass
class PatternView:
    """The pattern analysis: one entry for each head and image, images first, then heads.

    Attributes:
        fit: the autoencoder.
        codes: `[heads * images, code]`.
        clusters: the group of every entry.
        head: the head index of every entry, into `heads`.
        heads: the heads.
        names: the rule-based name of each head.
    """

    fit: Patterns
    codes: Float[Tensor, "entries code"]
    clusters: Clusters
    head: Int[Tensor, " entries"]
    heads: list[Head]
    names: list[str]

    def group(self) -> list[int]:
        """The most frequent cluster of each head."""
        labels = self.clusters.label
        return [int(labels[self.head == i].mode().values) for i in range(len(self.heads))]


@dataclass
class ViTAnalyzer:
    """Analyses the heads of an image classifier.

    Args:
        model: an image classifier of transformers with attention over a grid of patches (ViT, DeiT, ...).
        images: `[images, channels, height, width]`.
        labels: the right classes.
        grid: rows and columns of patches; by default a square.
        special: tokens in front of the patches (1 for CLS, 2 with a distillation token).

    The views are computed when first asked for. Cost: `importance` one forward pass over the images for each head,
    `strength` one in all, `patterns` the same and the training of a small autoencoder.
    """

    model: Any
    images: Tensor
    labels: Tensor
    grid: Grid | None = None
    special: int = 1
    _views: dict[str, Any] = field(default_factory=dict, repr=False)

    def attention(self) -> GridAttention:
        """The maps of all images, reduced (see `GridAttention`)."""
        if "attention" not in self._views:
            grid = self.grid or self._square()
            gathered = GridAttention(grid, special=self.special)
            with torch.no_grad(), attach(self.model, gathered):
                for part in self.images.split(64):
                    self.model(pixel_values=part)
            self.grid, self._views["attention"] = grid, gathered
        return self._views["attention"]

    def _square(self) -> Grid:
        config = self.model.config
        size, patch = getattr(config, "image_size", None), getattr(config, "patch_size", None)
        if not (isinstance(size, int) and isinstance(patch, int)):
            raise InputError(
                f"the patch grid of {type(self.model).__name__} is not known; give grid=(rows, columns)"
            )
        return size // patch, size // patch

    def importance(self, *, mean: bool = False) -> Importance:
        """What pruning each head changes; `mean` for mean-ablation instead of zero."""
        name = "importance by mean" if mean else "importance"
        if name not in self._views:
            self._views[name] = head_importance(self.model, self.images, self.labels, mean=mean)
        return self._views[name]

    def strength(self) -> dict[str, HeadMeasure]:
        """Mean hop, S_0, CLS share, attention from CLS, and content dependence of every head."""
        return self.attention().compute()

    def hops(self) -> dict[SiteKey, Hops]:
        """The hop profile of every head."""
        gathered = self.attention()
        return {key: gathered.hops(key) for key in gathered.state["map"]}

    def heads(self) -> list[Head]:
        measure = next(iter(self.strength().values()))
        return [head for head, _ in measure.items()]

    def names(self) -> list[str]:
        """The pattern name of every head, in the order of `heads()`."""
        gathered = self.attention()
        return [name for key in gathered.state["map"] for name in gathered.names(key)]

    def relative(self) -> Float[Tensor, "heads images down across"]:
        """The relative map of every head for every image."""
        gathered = self.attention()
        parts = [gathered.relative(key) for key in gathered.state["map"]]
        return torch.cat(parts, 1).transpose(0, 1)

    def patterns(
        self,
        *,
        images: int | None = 64,
        epochs: int = 50,
        groups: range = range(6, 13),
        seed: int = 0,
    ) -> PatternView:
        """Autoencoder codes and clusters of the relative maps of the first `images` images."""
        maps = self.relative()[:, :images]
        heads, count = maps.shape[:2]
        flat = maps.flatten(0, 1)
        fit = fit_patterns(flat, epochs=epochs, seed=seed)
        codes = fit.codes(flat)
        index = torch.arange(heads).repeat_interleave(count)
        found = cluster(codes, groups=groups, seed=seed)
        return PatternView(fit, codes, found, index, self.heads(), self.names())

    def to_frame(self, *, importance: bool = True) -> polars.DataFrame:
        """One row for each head: name, strength, and importance by every metric (needs the `frames` extra)."""
        import polars

        measures = {**self.strength(), **(self.importance().measures() if importance else {})}
        rows = [
            {"stack": h.stack, "layer": h.layer, "head": h.head, "pattern": name}
            | {key: measure[h] for key, measure in measures.items()}
            for h, name in zip(self.heads(), self.names(), strict=True)
        ]
        return polars.DataFrame(rows)

    def report(
        self,
        path: str | Path,
        *,
        patterns: PatternView | None = None,
        examples: Sequence[int] = (0, 1, 2, 3),
    ) -> Path:
        """Writes the three views as one HTML page (inline SVG, no network) and returns its path.

        Raises:
            OutputError: `path` cannot be written.
        """
        from regard.instruments.vision.page import write_page

        return write_page(self, patterns or self.patterns(), Path(path), list(examples))
