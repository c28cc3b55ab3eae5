"""What instruments return: a number for each head, or a number for each token, named and ready to draw."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from regard._errors import InputError

if TYPE_CHECKING:
    import polars
    from matplotlib.axes import Axes

SiteKey = tuple[str, int]
"""`(stack, layer)`; the stack is "" for a model's main text stack."""


@dataclass(slots=True)
class HeadMeasure:
    """One number for every head.

    Attributes:
        name: short name, used as a column and in the report.
        unit: "nats", "tokens", "share", ...
        values: for each site, `[heads]` (NaN where nothing was seen).
        error: the standard error of the values when rows were sampled; empty when exact.
        definition: one sentence.
    """

    name: str
    unit: str
    values: dict[SiteKey, Tensor]
    error: dict[SiteKey, Tensor] = field(default_factory=dict)
    definition: str = ""

    def stacks(self) -> list[str]:
        return list(dict.fromkeys(stack for stack, _ in self.values))

    def matrix(self, stack: str = "", *, error: bool = False) -> Float[Tensor, "layers heads"]:
        """The values of one stack as a table, NaN where a layer has no such head.

        Raises:
            InputError: when the stack was not observed.
        """
        table = self.error if error else self.values
        layers = {layer: v for (name, layer), v in table.items() if name == stack}
        if not layers:
            if error and self.values:
                return torch.zeros_like(self.matrix(stack))
            raise InputError.of("stack", given=stack, expected=f"one of {self.stacks()}")
        heads = max(v.shape[-1] for v in layers.values())
        result = torch.full((max(layers) + 1, heads), float("nan"))
        for layer, value in layers.items():
            result[layer, : value.shape[-1]] = value.detach().float().cpu()
        return result

    def __getitem__(self, head: Any) -> float:
        """The value of one head: `measure["L5H3"]` or `measure[5, 3]`."""
        from regard.coordinates import Head

        found = (
            Head.parse(head)
            if isinstance(head, str)
            else Head(*head)
            if isinstance(head, tuple)
            else head
        )
        return float(self.values[found.stack, found.layer][found.head])

    def items(self) -> Iterator[tuple[Any, float]]:
        """`(Head, value)` in order of stack, layer, head."""
        from regard.coordinates import Head

        for (stack, layer), value in self.values.items():
            for head, number in enumerate(value.tolist()):
                yield Head(layer, head, stack), number

    def top(self, count: int = 10, *, largest: bool = True) -> list[tuple[Any, float]]:
        """The heads with the largest (or smallest) values."""
        known = [(head, number) for head, number in self.items() if number == number]
        return sorted(known, key=lambda pair: pair[1], reverse=largest)[:count]

    def to_frame(self) -> polars.DataFrame:
        """Columns `stack, layer, head, measure, value, error` (needs the `frames` extra)."""
        import polars

        rows = []
        for (stack, layer), value in self.values.items():
            errors = self.error.get((stack, layer), torch.zeros_like(value)).tolist()
            for head, number in enumerate(value.tolist()):
                rows.append((stack, layer, head, self.name, number, errors[head]))
        return polars.DataFrame(
            rows, schema=["stack", "layer", "head", "measure", "value", "error"], orient="row"
        )

    def plot(self, ax: Axes | None = None, *, stack: str = "") -> Axes:
        """A layer x head heat map (needs the `plot` extra)."""
        import matplotlib.pyplot as plt

        if ax is None:
            _, ax = plt.subplots(figsize=(5, 6), layout="constrained")
        picture = ax.imshow(self.matrix(stack).numpy(), aspect="auto", cmap="viridis")
        ax.set(xlabel="head", ylabel="layer", title=self.name)
        plt.colorbar(picture, ax=ax, label=self.unit)
        return ax


@dataclass(slots=True)
class TokenMeasure:
    """One number for every head and token, for each observed sequence.

    Attributes:
        values: for each site, a list with one `[batch, heads, tokens]` per sequence batch (NaN where not defined or not sampled).
    """

    name: str
    unit: str
    values: dict[SiteKey, list[Tensor]]
    definition: str = ""

    def tensor(
        self, stack: str = "", sequence: int = -1, batch: int = 0
    ) -> Float[Tensor, "layers heads tokens"]:
        """One sequence of one stack as a tensor; layers that were not observed are NaN."""
        layers = {
            layer: v[sequence][batch] for (name, layer), v in self.values.items() if name == stack
        }
        if not layers:
            known = list(dict.fromkeys(name for name, _ in self.values))
            raise InputError.of("stack", given=stack, expected=f"one of {known}")
        heads, tokens = (
            max(v.shape[0] for v in layers.values()),
            max(v.shape[1] for v in layers.values()),
        )
        result = torch.full((max(layers) + 1, heads, tokens), float("nan"))
        for layer, value in layers.items():
            result[layer, : value.shape[0], : value.shape[1]] = value.detach().float().cpu()
        return result

    def to_frame(self, stack: str = "", sequence: int = -1, batch: int = 0) -> polars.DataFrame:
        """Columns `layer, head, position, measure, value`."""
        import polars

        table = self.tensor(stack, sequence, batch)
        layers, heads, tokens = table.shape
        layer, head, position = torch.meshgrid(
            torch.arange(layers), torch.arange(heads), torch.arange(tokens), indexing="ij"
        )
        return polars.DataFrame(
            {
                "layer": layer.flatten().numpy(),
                "head": head.flatten().numpy(),
                "position": position.flatten().numpy(),
                "measure": [self.name] * table.numel(),
                "value": table.flatten().numpy(),
            }
        )

    def plot(
        self, ax: Axes | None = None, *, stack: str = "", sequence: int = -1, batch: int = 0
    ) -> Axes:
        """Layer x position, averaged over heads (needs the `plot` extra)."""
        import matplotlib.pyplot as plt

        if ax is None:
            _, ax = plt.subplots(figsize=(9, 4), layout="constrained")
        picture = ax.imshow(
            self.tensor(stack, sequence, batch).nanmean(1).numpy(), aspect="auto", cmap="viridis"
        )
        ax.set(xlabel="position", ylabel="layer", title=self.name)
        plt.colorbar(picture, ax=ax, label=self.unit)
        return ax


Results = Mapping[str, "HeadMeasure | TokenMeasure"]
