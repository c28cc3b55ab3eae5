"""Four ideas of how brains compute, as small models with a number each (after arXiv 2105.07284).

The paper is a perspective: it has no equations and no experiments. It argues that intelligence rests on dynamics that present
networks lack. Its mechanisms are made runnable here; every equation and number is this library's choice, and
nothing measured here is a result of the paper.

| mechanism | here | told by |
|---|---|---|
| states that hold themselves, tire and give way | `latching_attention` | keys visited, dwell, successors |
| rhythms that open and close channels, nested | `phase_gated_attention`, `nested_attention` | leak exp(-2 kappa), sender |
| level told by phase | `simulate` | first-spike phase beside rate |
| sparse, skewed, small-world networks with a rich club | `sparse_brain_graph` | ratios over degree-preserving shuffles |
| learning gated by sparse events | `event_gated_learning` | error beside number of updates |

The first two touch attention itself: with fatigue 0 latching attention is softmax retrieval (one update of a modern Hopfield
network), and with kappa 0 the phase gate is attention.

Source: Monaco, Rajan, Hwang 2021, "A brain basis of dynamical intelligence for AI and computational neuroscience".
"""

from __future__ import annotations

from regard.labs.brain_basis.gating import (
    Learning,
    Stream,
    event_gated_learning,
    learn_always,
    learn_at_random,
    make_stream,
)
from regard.labs.brain_basis.graphs import (
    GraphMeasures,
    clustering,
    gini,
    graph_measures,
    path_length,
    random_graph,
    rich_club,
    shuffled,
    sparse_brain_graph,
    undirected,
)
from regard.labs.brain_basis.laboratory import BrainBasis
from regard.labs.brain_basis.latching import (
    Walk,
    grouped_keys,
    latching_attention,
    retrieval_energy,
    walk,
)
from regard.labs.brain_basis.phases import (
    band_frequency,
    nested_amplitude,
    nested_attention,
    phase_gated_attention,
    phase_leak,
    switch_sender,
)
from regard.labs.brain_basis.spikes import Spikes, decode, lif_rate, simulate

__all__ = [
    "BrainBasis",
    "GraphMeasures",
    "Learning",
    "Spikes",
    "Stream",
    "Walk",
    "band_frequency",
    "clustering",
    "decode",
    "event_gated_learning",
    "gini",
    "graph_measures",
    "grouped_keys",
    "latching_attention",
    "learn_always",
    "learn_at_random",
    "lif_rate",
    "make_stream",
    "nested_amplitude",
    "nested_attention",
    "path_length",
    "phase_gated_attention",
    "phase_leak",
    "random_graph",
    "retrieval_energy",
    "rich_club",
    "shuffled",
    "simulate",
    "sparse_brain_graph",
    "switch_sender",
    "undirected",
    "walk",
]
