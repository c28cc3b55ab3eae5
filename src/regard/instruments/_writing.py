"""The decomposition that `Writers` computes: one residual dimension at one token, as a sum of named parts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from regard.coordinates import Head, Neuron

if TYPE_CHECKING:
    import polars
    from matplotlib.axes import Axes


@dataclass(frozen=True, slots=True)
class Write:
    """What one part adds to the dimension: `site` is a `Head`, a `Neuron`, or "L5.attention", "L5.mlp", "embedding".

    `share` is signed and relative to the peak: > 0 writes it, < 0 erases it.
    """

    site: Head | Neuron | str
    layer: int
    amount: float
    share: float


@dataclass(slots=True)
class Writing:
    """The decomposition of one dimension at one token, averaged over sequences; L layers, H heads.

    Attributes:
        token: position from the first real token; dimension: the residual dimension.
        embedding: the value that enters block 0.
        stream: the value after each block; attention, mlp, cross: what each sub-layer adds (cross 0 where there is none).
        heads: what each head adds (NaN where a layer's attention cannot be split).
        neurons: for each layer, what each neuron adds (None where the MLP has no single down projection).
        peak: the value of `stream` of largest size.
    """

    token: int
    dimension: int
    embedding: float
    stream: Float[Tensor, " layers"]
    attention: Float[Tensor, " layers"]
    mlp: Float[Tensor, " layers"]
    cross: Float[Tensor, " layers"]
    heads: Float[Tensor, "layers heads"]
    neurons: list[Tensor | None]
    stack: str = ""

    @property
    def peak(self) -> float:
        return float(self.stream[self.stream.abs().argmax()])

    def sublayers(self) -> list[Write]:
        """The embedding and every sub-layer's write in the order in which they happen."""
        found = [Write("embedding", -1, self.embedding, self.embedding / self.peak)]
        prefix = f"{self.stack}." if self.stack else ""
        added = {"attention": self.attention, "cross": self.cross, "mlp": self.mlp}
        for layer in range(len(self.stream)):
            for part, amounts in added.items():
                amount = float(amounts[layer])
                if part != "cross" or amount:
                    name = f"{prefix}L{layer}.{part}"
                    found.append(Write(name, layer, amount, amount / self.peak))
        return found

    def parts(self) -> list[Write]:
        """Every head and neuron; a layer of neurons gives its 32 largest of either sign."""
        found = []
        for layer, row in enumerate(self.heads.tolist()):
            for head, amount in enumerate(row):
                if amount == amount:
                    site = Head(layer, head, self.stack)
                    found.append(Write(site, layer, amount, amount / self.peak))
        for layer, amounts in enumerate(self.neurons):
            if amounts is not None:
                top = amounts.abs().argsort(descending=True)[:32]
                for index, amount in zip(top.tolist(), amounts[top].tolist(), strict=True):
                    site = Neuron(layer, index, self.stack)
                    found.append(Write(site, layer, amount, amount / self.peak))
        return found

    def writers(self, count: int = 10, *, sublayers: bool = False) -> list[Write]:
        """The heads and neurons (or the sub-layers) that add most to the peak."""
        table = self.sublayers() if sublayers else self.parts()
        found = sorted(table, key=lambda write: -write.share)[:count]
        return [write for write in found if write.share > 0]

    def erasers(self, count: int = 10, *, sublayers: bool = False) -> list[Write]:
        """Those that take most away from it."""
        table = self.sublayers() if sublayers else self.parts()
        found = sorted(table, key=lambda write: write.share)[:count]
        return [write for write in found if write.share < 0]

    def to_frame(self) -> polars.DataFrame:
        """Columns `site, layer, kind, amount, share` of sub-layers, heads and leading neurons."""
        import polars

        rows = [(str(w.site), w.layer, "sub-layer", w.amount, w.share) for w in self.sublayers()]
        rows += [
            (str(w.site), w.layer, type(w.site).__name__.lower(), w.amount, w.share)
            for w in self.parts()
        ]
        return polars.DataFrame(
            rows, schema=["site", "layer", "kind", "amount", "share"], orient="row"
        )

    def plot(self, ax: Axes | None = None) -> Axes:
        """The stream's value by layer, and what attention and MLP add (needs the `plot` extra)."""
        import matplotlib.pyplot as plt

        if ax is None:
            _, ax = plt.subplots(figsize=(7, 3.2), layout="constrained")
        layers = torch.arange(len(self.stream))
        ax.bar(layers - 0.2, self.attention.numpy(), 0.4, label="attention adds")
        ax.bar(layers + 0.2, self.mlp.numpy(), 0.4, label="MLP adds")
        ax.plot(layers, self.stream.numpy(), color="black", linewidth=1, label="stream after block")
        ax.set(xlabel="layer", ylabel=f"dimension {self.dimension}, token {self.token}")
        ax.legend()
        return ax
