"""What rewrites attention in a pretrained model: silenced heads and neurons, capped activations."""

from __future__ import annotations

from regard.interventions._ablate import MODES, ablate
from regard.interventions._places import find_heads, find_neurons
from regard.interventions.activations import CapActivations, CapRatio, ZeroNeurons
from regard.interventions.heads import HeadMethod, MeanHeads, ParkOnSink, UniformHeads, ZeroHeads

__all__ = [
    "ablate",
    "MODES",
    "HeadMethod",
    "ZeroHeads",
    "MeanHeads",
    "UniformHeads",
    "ParkOnSink",
    "ZeroNeurons",
    "CapActivations",
    "CapRatio",
    "find_heads",
    "find_neurons",
]
