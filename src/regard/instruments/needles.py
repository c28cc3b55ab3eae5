"""What the needle task returns: the runs, and the retrieval report that is made of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from regard._errors import InputError
from regard.instruments.results import HeadMeasure, SiteKey

if TYPE_CHECKING:
    import polars

    from regard.coordinates import Head
    from regard.texts import NeedlePrompt


@dataclass(slots=True)
class RetrievalRun:
    """One prompt and what the model answered. `recall` is the share of the reference's words in the answer."""

    tokens: int
    depth: float
    question: str
    reference: str
    text: str
    recall: float

    @classmethod
    def of(cls, prompt: NeedlePrompt, text: str) -> RetrievalRun:
        needle = prompt.needle
        recall = prompt.recall(text)
        return cls(len(prompt.ids), prompt.depth, needle.question, needle.answer, text, recall)

    @property
    def answered(self) -> bool:
        """ROUGE-1 recall above 0.5."""
        return self.recall > 0.5


@dataclass(slots=True)
class RetrievalReport:
    """Retrieval scores of all heads and the runs they come from.

    Attributes:
        scores: share of the answer that a head copied, mean over answered runs.
        activation: share of answered runs in which it copied anything.
        soft: attention on the answer token being generated (another quantity, never mixed with the score).
        chance: the score against rotated answers, what a head gets for looking there without minding the token.
        runs: every prompt, in the order given.
        per_run: `[answered runs, heads]` scores for each site, in the order in which runs were decoded.
        count: "set" or "events".
    """

    scores: HeadMeasure
    activation: HeadMeasure
    soft: HeadMeasure
    chance: HeadMeasure
    runs: list[RetrievalRun]
    per_run: dict[SiteKey, Tensor] = field(default_factory=dict)
    count: str = "set"

    @property
    def answered(self) -> int:
        return sum(run.answered for run in self.runs)

    def heads(self, threshold: float = 0.1) -> list[tuple[Head, float]]:
        """The heads that score at least `threshold`, best first."""
        return [pair for pair in self.scores.top(len(self)) if pair[1] >= threshold]

    def share(self, threshold: float = 0.1) -> float:
        """The share of all heads that score at least `threshold`; NaN when no run was answered."""
        return len(self.heads(threshold)) / len(self) if self.answered else float("nan")

    def __len__(self) -> int:
        return sum(value.shape[-1] for value in self.scores.values.values())

    def sentence(self, threshold: float = 0.1) -> str:
        """The finding in one or two plain sentences."""
        asked = f"{self.answered} of {len(self.runs)} needle questions answered"
        if not self.answered:
            return f"No head can be scored: {asked}."
        found = self.heads(threshold)
        first = ", ".join(f"{head} {score:.2f}" for head, score in found[:3])
        share = f"{len(found)} of {len(self)} heads ({100 * self.share(threshold):.1f} %)"
        highest = max(float(value.max()) for value in self.chance.values.values())
        return (
            f"{share} copy at least {threshold:g} of a needle's tokens while the model answers ({asked}). "
            + (f"Strongest: {first}. " if first else "")
            + f"With the answer's tokens exchanged no head scores above {highest:.2f}."
        )

    def to_frame(self) -> polars.DataFrame:
        """One row for each head: `stack, layer, head, score, activation, soft, chance` (needs the `frames` extra)."""
        import polars

        rows = [
            (head.stack, head.layer, head.head, score, *(m[head] for m in self._others()))
            for head, score in self.scores.items()
        ]
        columns = ["stack", "layer", "head", "score", "activation", "soft", "chance"]
        return polars.DataFrame(rows, schema=columns, orient="row")

    def runs_frame(self) -> polars.DataFrame:
        """One row for each prompt: `tokens, depth, question, reference, text, recall, answered`."""
        import polars

        names = ("tokens", "depth", "question", "reference", "text", "recall", "answered")
        return polars.DataFrame([{name: getattr(run, name) for name in names} for run in self.runs])

    def _others(self) -> tuple[HeadMeasure, HeadMeasure, HeadMeasure]:
        return self.activation, self.soft, self.chance

    def plot(self, *, stack: str = "", threshold: float = 0.1) -> Any:
        """Scores by layer and head, and sorted against the chance baseline (needs the `plot` extra)."""
        import matplotlib.pyplot as plt

        if not self.answered:
            raise InputError("no needle question was answered, so there is no score to plot")
        figure, (left, right) = plt.subplots(1, 2, figsize=(10, 5), layout="constrained")
        self.scores.plot(left, stack=stack)
        for measure, label in ((self.scores, "score"), (self.chance, "rotated needle (chance)")):
            values = sorted((number for _, number in measure.items()), reverse=True)
            right.plot(range(1, len(values) + 1), values, label=label, lw=2)
        right.axhline(threshold, color="grey", ls=":", label=f"threshold {threshold:g}")
        right.set(
            xscale="log", xlabel="head, sorted by score", ylabel="share of needle tokens copied"
        )
        right.set_title(
            f"{len(self.heads(threshold))} of {len(self)} heads at or above {threshold:g}"
        )
        right.legend(frameon=False)
        return figure
