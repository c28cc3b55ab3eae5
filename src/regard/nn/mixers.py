"""The mixers that a language model can be made of, by name."""

from __future__ import annotations

from collections.abc import Callable

from regard._errors import InputError
from regard.nn.aaren import Aaren
from regard.nn.chunk_moe import ChunkMoE
from regard.nn.deconstructed import (
    FixedTextQKAttention,
    NoMixing,
    RandomQKAttention,
    SelfGatedAttention,
    StaticQKAttention,
    TaylorAttention,
)
from regard.nn.delta_rule import DeltaRule
from regard.nn.dynamic_mask_attention import DynamicMaskAttention, LinearDynamicMaskAttention
from regard.nn.flow_attention import FlowAttention
from regard.nn.graph_isomorphic import GINAttention, PNAAttention
from regard.nn.hydra import Hydra
from regard.nn.linear_attention import LinearAttention
from regard.nn.mamba import Mamba
from regard.nn.mixer import Mixer
from regard.nn.mixture_of_heads import MixtureOfHeads
from regard.nn.neural_memory import NeuralMemory
from regard.nn.normalised_attention import NormalisedAttention
from regard.nn.product_key_memory import ProductKeyMemory
from regard.nn.qlstm import QLSTM, ReversedQLSTM
from regard.nn.routing_attention import RoutingAttention
from regard.nn.selective_state_space import S6, SSD
from regard.nn.softmax_attention import SlidingWindowAttention, SoftmaxAttention
from regard.nn.softmax_only import TemperatureAttention
from regard.nn.sparse_global_attention import SparseGlobalAttention
from regard.nn.titans import MemoryAsContext, MemoryAsGate, MemoryAsLayer
from regard.nn.workspace_memory import WorkspaceMemory

MIXERS: dict[str, Callable[..., Mixer]] = {
    "aaren": Aaren,
    "chunk_moe": ChunkMoE,
    "delta": DeltaRule,
    "dma": DynamicMaskAttention,
    "dma-linear": LinearDynamicMaskAttention,
    "fixed_text_qk": FixedTextQKAttention,
    "flow": FlowAttention,
    "gin": GINAttention,
    "hydra": Hydra,
    "linear": LinearAttention,
    "mamba": Mamba,
    "memory": NeuralMemory,
    "memory_as_context": MemoryAsContext,
    "memory_as_gate": MemoryAsGate,
    "memory_as_layer": MemoryAsLayer,
    "moh": MixtureOfHeads,
    "no_mixing": NoMixing,
    "normalised": NormalisedAttention,
    "pna": PNAAttention,
    "product_keys": ProductKeyMemory,
    "qlstm": QLSTM,
    "qlstm_reversed": ReversedQLSTM,
    "random_qk": RandomQKAttention,
    "routing": RoutingAttention,
    "s6": S6,
    "self_gated": SelfGatedAttention,
    "sliding": SlidingWindowAttention,
    "softmax": SoftmaxAttention,
    "sparse_global": SparseGlobalAttention,
    "ssd": SSD,
    "static_qk": StaticQKAttention,
    "taylor": TaylorAttention,
    "temperature": TemperatureAttention,
    "workspace": WorkspaceMemory,
}
"""Each makes a mixer from `(width, heads, **options)`."""


def make_mixer(name: str, width: int, heads: int, **options: object) -> Mixer:
    """A mixer by name: `make_mixer("sliding", 128, 4, window=32)`.

    Raises:
        InputError: an unknown name, or an option that this mixer does not take.
    """
    if name not in MIXERS:
        raise InputError.unknown("mixer", given=name, known=sorted(MIXERS))
    try:
        return MIXERS[name](width, heads, **options)
    except TypeError as error:
        raise InputError(f"mixer {name!r}: {error}") from error
