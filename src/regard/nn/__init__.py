"""Learnable modules built on `regard.ops` and `regard.engine`."""

from __future__ import annotations

from regard.nn.aaren import Aaren
from regard.nn.boundary_predictor import BoundaryPredictor
from regard.nn.delta_rule import DeltaRule
from regard.nn.flow_attention import BidirectionalFlowAttention, FlowAttention
from regard.nn.language_model import LanguageModel, LanguageModelConfig
from regard.nn.linear_attention import LinearAttention
from regard.nn.mixer import Mixer
from regard.nn.mixers import MIXERS, make_mixer
from regard.nn.neural_memory import NeuralMemory
from regard.nn.softmax_attention import SlidingWindowAttention, SoftmaxAttention
from regard.nn.titans import MemoryAsContext, MemoryAsGate, MemoryAsLayer

__all__ = [
    "MIXERS",
    "Aaren",
    "BidirectionalFlowAttention",
    "BoundaryPredictor",
    "FlowAttention",
    "DeltaRule",
    "LanguageModel",
    "LanguageModelConfig",
    "LinearAttention",
    "MemoryAsContext",
    "MemoryAsGate",
    "MemoryAsLayer",
    "Mixer",
    "NeuralMemory",
    "SlidingWindowAttention",
    "SoftmaxAttention",
    "make_mixer",
]
