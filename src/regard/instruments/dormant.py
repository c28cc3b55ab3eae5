"""Dormant heads by several definitions side by side, and how much these disagree.

| definition | a head is dormant when | source |
|---|---|---|
| sink | its mean attention on the first key, over queries from the ninth on, exceeds 0.8 | Guo et al. 2024, arXiv 2410.13835 |
| output | it adds less than half as much to the residual stream as the median head of its layer | norm of W_h o_h |
| ablation | silencing it changes the loss by less than 0.005 nats per token | Michel et al. 2019, arXiv 1905.10650 |

The three ask different things: where the head looks, how much it writes, and whether the model notices. A head can park on
the sink on most tokens and carry retrieval on a few.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from regard.attach import Session
from regard.coordinates import Head
from regard.instruments._losses import evaluation_inputs
from regard.instruments.importance import HeadImportance, head_importance, held_out
from regard.instruments.norms import HeadOutputNorms
from regard.instruments.results import HeadMeasure
from regard.instruments.sinks import SinkMass

if TYPE_CHECKING:
    import polars
    from matplotlib.axes import Axes


@dataclass(frozen=True, slots=True)
class DormantHeads:
    """The heads that each definition calls dormant.

    Attributes:
        measures: for each definition ("sink", "output", "ablation") the number it looks at; NaN where it was not measured.
        thresholds: for each definition, where dormant begins.
    """

    measures: dict[str, HeadMeasure]
    thresholds: dict[str, float]

    def heads(self, definition: str) -> frozenset[Head]:
        """The heads that are dormant by one definition."""
        edge = self.thresholds[definition]
        return frozenset(
            head
            for head, value in self.measures[definition].items()
            if (value > edge if definition == "sink" else abs(value) < edge)
        )

    def jaccard(self, one: str, other: str) -> float:
        """Shared heads over heads in either set; NaN when both are empty."""
        a, b = self.heads(one), self.heads(other)
        return len(a & b) / len(a | b) if a | b else float("nan")

    def agreed(self) -> frozenset[Head]:
        """The heads that are dormant by every definition."""
        return frozenset.intersection(*(self.heads(name) for name in self.measures))

    def disagreement(self) -> dict[tuple[str, str], tuple[int, int, int, float]]:
        """For each pair of definitions: heads of the first only, of both, of the second only, and the Jaccard index."""
        table = {}
        for one, other in combinations(self.measures, 2):
            a, b = self.heads(one), self.heads(other)
            table[one, other] = (len(a - b), len(a & b), len(b - a), self.jaccard(one, other))
        return table

    def sentence(self) -> str:
        """The finding in one line."""
        total = sum(len(v) for v in next(iter(self.measures.values())).values.values())
        counts = ", ".join(f"{len(self.heads(name))} by {name}" for name in self.measures)
        return f"Of {total} heads, dormant are {counts}; {len(self.agreed())} by every definition."

    def to_frame(self) -> polars.DataFrame:
        """Columns `stack, layer, head`, and for each definition its number and whether the head is dormant by it."""
        import polars

        values = {name: dict(measure.items()) for name, measure in self.measures.items()}
        sets = {name: self.heads(name) for name in self.measures}
        rows = [
            {
                "stack": head.stack,
                "layer": head.layer,
                "head": head.head,
                **{name: values[name].get(head, float("nan")) for name in values},
                **{f"dormant_{name}": head in sets[name] for name in sets},
            }
            for head in next(iter(values.values()))
        ]
        return polars.DataFrame(rows)

    def plot(self) -> Any:
        """One layer x head map for each definition, dormant heads marked (needs the `plot` extra)."""
        import matplotlib.pyplot as plt

        figure, axes = plt.subplots(
            1,
            len(self.measures),
            figsize=(4.2 * len(self.measures), 5),
            squeeze=False,
            layout="constrained",
        )
        for ax, (name, measure) in zip(axes[0], self.measures.items(), strict=True):
            self._map(ax, name, measure)
        return figure

    def _map(self, ax: Axes, name: str, measure: HeadMeasure) -> None:
        stack = measure.stacks()[0]
        measure.plot(ax, stack=stack)
        chosen = [head for head in self.heads(name) if head.stack == stack]
        ax.plot([h.head for h in chosen], [h.layer for h in chosen], "x", color="white", ms=4)
        ax.set_title(f"{name}: {len(chosen)} dormant")

    def __repr__(self) -> str:
        return f"DormantHeads: {self.sentence()}"


def dormant_heads(
    model: nn.Module,
    text: Any = None,
    *,
    sink: float = 0.8,
    output: float = 0.5,
    ablation: float = 0.005,
    importance: HeadImportance | None = None,
    mode: str = "zero",
    window: int = 256,
) -> DormantHeads:
    """Which heads are dormant, by sink mass, by output norm and by ablation.

    Args:
        text: the corpus: a text (cut into windows), several texts, token ids or a dict of inputs; 256 tokens of English
            when None.
        sink, output, ablation: the thresholds of the three definitions.
        importance: the measured importance of the heads, when it is known already (on the same kind of text).
        mode: how heads are silenced, as in `regard.ablate`.

    Cost: one forward pass with attention in blocks, and `head_importance` (about half a forward pass for each head) unless given.
    """
    text = held_out(model, window) if text is None else text
    inputs = evaluation_inputs(model, text, window)
    mass, norms = SinkMass(), HeadOutputNorms()
    with torch.inference_mode(), Session(model, mass, norms):
        model(**inputs)
    if importance is None:
        importance = head_importance(model, inputs, mode=mode)
    measures = {
        "sink": mass.compute()["sink mass"],
        "output": norms.compute()["relative write norm"],
        "ablation": importance.change,
    }
    return DormantHeads(measures, {"sink": sink, "output": output, "ablation": ablation})
