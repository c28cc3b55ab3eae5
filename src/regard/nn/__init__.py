"""Learnable modules built on `regard.ops` and `regard.engine`."""

from __future__ import annotations

from regard.nn.aaren import Aaren
from regard.nn.atconv import ATConv2d, ATConvTokenMixer, routing_kernels
from regard.nn.attnet import ATTNETS, AttNet, AttNetBlock, AttNetSize
from regard.nn.boundary_predictor import BoundaryPredictor
from regard.nn.chunk_moe import ChunkMoE, WholeChunkMoE
from regard.nn.deconstructed import (
    FixedTextQKAttention,
    NoMixing,
    RandomQKAttention,
    SelfGatedAttention,
    StaticQKAttention,
    TaylorAttention,
)
from regard.nn.deconstructed_model import (
    DeconstructedLanguageModel,
    replaced,
    without_layers,
)
from regard.nn.delta_rule import DeltaRule
from regard.nn.dynamic_mask_attention import DynamicMaskAttention, LinearDynamicMaskAttention
from regard.nn.dynamical_system import as_dynamical_system, softmax_system
from regard.nn.flow_attention import BidirectionalFlowAttention, FlowAttention
from regard.nn.graph_isomorphic import GINAttention, PNAAttention
from regard.nn.hydra import Hydra, hydra_mixers
from regard.nn.hydra_model import HydraLanguageModel
from regard.nn.language_model import LanguageModel, LanguageModelConfig
from regard.nn.linear_attention import LinearAttention
from regard.nn.mamba import Mamba
from regard.nn.mixer import Mixer
from regard.nn.mixers import MIXERS, make_mixer
from regard.nn.mixture_of_heads import MixtureOfHeads
from regard.nn.neural_memory import NeuralMemory
from regard.nn.normalised_attention import NormalisedAttention
from regard.nn.product_key_memory import ProductKeyMemory
from regard.nn.qlstm import QLSTM, ReversedQLSTM
from regard.nn.routing_attention import RoutingAttention, WholeTextRoutingAttention
from regard.nn.selective_state_space import S6, SSD
from regard.nn.sigma_reparam import SigmaReparamConv2d, SigmaReparamLinear
from regard.nn.softmax_attention import SlidingWindowAttention, SoftmaxAttention
from regard.nn.softmax_only import (
    EntropyRegularizer,
    RowEntropyRegularizer,
    ScaledFusedFFN,
    SoftmaxOnlyBlock,
    TemperatureAttention,
)
from regard.nn.sparse_global_attention import SparseGlobalAttention
from regard.nn.temporal_heads import TemporalHeads, VideoClassifier, shift_heads
from regard.nn.titans import MemoryAsContext, MemoryAsGate, MemoryAsLayer
from regard.nn.workspace_memory import WorkspaceMemory

__all__ = [
    "ATTNETS",
    "MIXERS",
    "QLSTM",
    "S6",
    "SSD",
    "ATConv2d",
    "ATConvTokenMixer",
    "Aaren",
    "AttNet",
    "AttNetBlock",
    "AttNetSize",
    "BidirectionalFlowAttention",
    "BoundaryPredictor",
    "ChunkMoE",
    "DeconstructedLanguageModel",
    "DeltaRule",
    "DynamicMaskAttention",
    "EntropyRegularizer",
    "FixedTextQKAttention",
    "FlowAttention",
    "GINAttention",
    "Hydra",
    "HydraLanguageModel",
    "LanguageModel",
    "LanguageModelConfig",
    "LinearAttention",
    "LinearDynamicMaskAttention",
    "Mamba",
    "MemoryAsContext",
    "MemoryAsGate",
    "MemoryAsLayer",
    "Mixer",
    "MixtureOfHeads",
    "NeuralMemory",
    "NoMixing",
    "NormalisedAttention",
    "PNAAttention",
    "ProductKeyMemory",
    "RandomQKAttention",
    "ReversedQLSTM",
    "RoutingAttention",
    "RowEntropyRegularizer",
    "ScaledFusedFFN",
    "SelfGatedAttention",
    "SigmaReparamConv2d",
    "SigmaReparamLinear",
    "SlidingWindowAttention",
    "SoftmaxAttention",
    "SoftmaxOnlyBlock",
    "SparseGlobalAttention",
    "StaticQKAttention",
    "TaylorAttention",
    "TemperatureAttention",
    "TemporalHeads",
    "VideoClassifier",
    "WholeChunkMoE",
    "WholeTextRoutingAttention",
    "WorkspaceMemory",
    "as_dynamical_system",
    "hydra_mixers",
    "make_mixer",
    "replaced",
    "routing_kernels",
    "shift_heads",
    "softmax_system",
    "without_layers",
]
