"""The one shape of a laboratory: settings with admissible ranges, a run, and measurements beside predictions.

A laboratory is a solvable model of how attention learns. Its file holds the model, the theorem's predictions as functions, and
one frozen dataclass of settings::

    lab = LinearICL(examples=20, seeds=8)      # or open("linear-icl", {"examples": "20"}), from texts
    result = lab.run()
    print(result)                              # what was predicted, what was measured, whether they agree
    result.plot(); result.to_frame(); result.write("out")

Theory is a line in every picture, experiment is points with bars (95 % of the mean). A `Check` compares one number with one
prediction: it holds within a tolerance that the check must justify, and it is undecided while the bar is wider than that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from regard._errors import InputError
from regard.labs.settings import Lab


@dataclass(frozen=True, slots=True)
class Listed:
    """A laboratory of the catalogue: one line about it, and where its settings are."""

    line: str
    where: str

    @property
    def config(self) -> type[Lab]:
        """The class of its settings, imported when asked for."""
        module, name = self.where.split(":")
        return getattr(import_module(f"regard.labs.{module}"), name)


LABS: dict[str, Listed] = {
    "linear-icl": Listed(
        "linear attention learns linear regression in context: gradient flow, its limit, risk under shifts",
        "linear_icl:LinearICL",
    ),
    "scan-and-snap": Listed(
        "a one-layer transformer scans for distinct tokens, then snaps: token fates, growth, two regimes",
        "scan_and_snap:ScanAndSnap",
    ),
    "softmax-icl": Listed(
        "multi-head softmax attention on regression prompts: heads of opposite sign make a step of debiased descent",
        "softmax_icl:SoftmaxICL",
    ),
    "mesa-optimization": Listed(
        "linear causal attention on linear sequences: next-token prediction learns a step of descent, and what it can do",
        "mesa_optimization:MesaOptimization",
    ),
    "filtering-storing": Listed(
        "a one-layer transformer stores facts in its MLP: which of them questions about others make extractable",
        "filtering_storing:FilteringStoring",
    ),
    "bigram-backcopy": Listed(
        "how an attention sink, a drained value and a residual peak form together: heads that are active only at triggers",
        "bigram_backcopy:BigramBackcopy",
    ),
    "brain-basis": Listed(
        "mechanisms that a perspective on brains names: latching states, phase gates and codes, sparse networks, gated learning",
        "brain_basis:BrainBasis",
    ),
    "sink-emergence": Listed(
        "small language models trained on text, one factor changed at a time: which of them make an attention sink, and where",
        "sink_emergence:SinkEmergence",
    ),
    "embedding-walk": Listed(
        "decoding as a walk of vectors: steps that know nothing of each other, summed concepts, attention as a running mean",
        "embedding_walk:EmbeddingWalk",
    ),
    "pavlovian": Listed(
        "attention as conditioning: how many associations a memory holds, and which rules block, shadow and forget",
        "pavlovian:Pavlovian",
    ),
}


def open(name: str, settings: Mapping[str, Any] | None = None) -> Lab:
    """The laboratory `name` with `settings`, whose values may be texts as typed on a command line.

    Raises:
        InputError: a name or key that does not exist, a value outside of its range, values impossible together.

    >>> open("linear-icl", {"examples": "40", "spectrum": "2,1,0.5"}).examples
    40
    """
    key = name.strip().lower().replace("_", "-")
    if key not in LABS:
        raise InputError.unknown("laboratory", given=name, known=LABS)
    config, settings = LABS[key].config, dict(settings or {})
    known = [row.key for row in config.settings()]
    for given in settings:
        if given not in known:
            raise InputError.unknown(f"setting of {key}", given=given, known=known)
    return config(**config.admit(settings))
