"""Is the association bias of attention needed? Its weights, replaced by weights that do not look at the tokens.

    A' = (1 - e) A + e R

| class | R |
|---|---|
| `UniformWeights` | 1 / i at each of the i visible keys: the running mean of values |
| `SelfWeights` | 1 at the token itself: no aggregation |
| `DistanceWeights` | the mean of A over a corpus, for each head by distance only |

`e` may be a tensor that wants a gradient: d loss / d e at e = 0 says to first order what a little of R costs.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from regard._errors import InputError
from regard.attach import attach
from regard.engine import Block, Method

Mix = Tensor | float | int


class ReplacedWeights(Method):
    """Base: mixes the weights of chosen layers with `replacement`.

    Args:
        layers: which; None for all.
        mix: e; a number or a scalar tensor.
    """

    def __init__(self, layers: Collection[int] | None = None, mix: Mix = 1.0) -> None:
        self.layers = None if layers is None else frozenset(layers)
        self.mix = mix

    def replacement(self, block: Block) -> Float[Tensor, "batch heads rows keys"]:
        """R for a block, of any shape that broadcasts."""
        raise NotImplementedError

    def weights(self, block: Block) -> Tensor | None:
        if self.layers is not None and block.site.layer not in self.layers:
            return None
        return (1 - self.mix) * block.weights + self.mix * self.replacement(block)


class UniformWeights(ReplacedWeights):
    """Every visible key alike.

    >>> from regard.engine import AttentionCall, Pipeline, attend
    >>> query, value = torch.randn(1, 1, 3, 4), torch.tensor([3.0, 5.0, 10.0]).view(1, 1, 3, 1)
    >>> attend(AttentionCall.make(query, query, value), Pipeline([UniformWeights()])).flatten()
    tensor([3., 4., 6.])
    """

    def replacement(self, block: Block) -> Tensor:
        seen = visible(block)
        return seen / seen.sum(-1, keepdim=True).clamp_min(1)


class SelfWeights(ReplacedWeights):
    """The token itself and nothing else."""

    def replacement(self, block: Block) -> Tensor:
        return (distances(block) == 0).to(block.weights.dtype)[None, None]


class DistanceWeights(ReplacedWeights):
    """A table by layer of mean weights by head and distance, `[heads, distances]`; rows are scaled to sum to 1."""

    def __init__(
        self,
        tables: Mapping[int, Float[Tensor, "heads distances"]],
        layers: Collection[int] | None = None,
        mix: Mix = 1.0,
    ) -> None:
        super().__init__(layers, mix)
        self.tables = dict(tables)

    def replacement(self, block: Block) -> Tensor:
        table, far = self.tables[block.site.layer], distances(block)
        if int(far.max()) >= table.shape[1]:
            raise InputError.of(
                "tokens",
                given=int(far.max()) + 1,
                expected=f"at most {table.shape[1]}, as in the table",
            )
        chosen = table[:, far.clamp_min(0)].to(block.weights.dtype)[None] * visible(block)
        return chosen / chosen.sum(-1, keepdim=True).clamp_min(1e-30)


class DistanceMeans(Method):
    """Sums what `DistanceWeights` needs, over all queries that have a key at a distance."""

    reads_only = True

    def __init__(self) -> None:
        self.sums: dict[int, Tensor] = {}
        self.counts: dict[int, Tensor] = {}

    def weights(self, block: Block) -> None:
        layer, far = block.site.layer, distances(block)
        inside = far >= 0
        size = block.call.key.shape[2]
        if layer not in self.sums:
            heads = block.weights.shape[1]
            self.sums[layer] = block.weights.new_zeros(heads, size)
            self.counts[layer] = block.weights.new_zeros(size)
        flat = block.weights.sum(0)[:, inside]
        self.sums[layer].index_add_(1, far[inside], flat)
        ones = torch.full_like(far[inside], len(block.weights), dtype=flat.dtype)
        self.counts[layer].index_add_(0, far[inside], ones)

    def tables(self) -> dict[int, Float[Tensor, "heads distances"]]:
        """Mean weight by layer, head and distance."""
        return {
            layer: total / self.counts[layer].clamp_min(1) for layer, total in self.sums.items()
        }


@torch.no_grad()
def mean_by_distance(
    model: nn.Module, ids: Int[Tensor, "batch tokens"]
) -> dict[int, Float[Tensor, "heads distances"]]:
    """The tables of a model on some text without padding."""
    means = DistanceMeans()
    with attach(model, means):
        model(ids)
    return means.tables()


def distances(block: Block) -> Int[Tensor, "rows keys"]:
    """How many tokens before its query each key is; below 0 for later ones."""
    keys = torch.arange(block.keys.start, block.keys.stop, device=block.weights.device)
    return block.positions[:, None] - keys


def visible(block: Block) -> Float[Tensor, "batch heads rows keys"]:
    """1 at keys that a query sees."""
    seen = block.visible
    if seen is None:
        return torch.ones_like(block.weights[:1, :1])
    return seen.to(block.weights.dtype)
