"""Sparse attention: patterns that name the key blocks each query block sees, for prefill and decode of any model."""

from regard.sparse.dhsa import DHSA
from regard.sparse.dilated import Dilated
from regard.sparse.hierarchical import FixedChunks, HierarchicalSparse
from regard.sparse.longnet import LongNet
from regard.sparse.pattern import Pattern
from regard.sparse.power import Power
from regard.sparse.reach import Reach, reach
from regard.sparse.shifted import S2Attention, SFAttention
from regard.sparse.sliding import Sliding, SlidingTokens
from regard.sparse.strided import Strided
from regard.sparse.top_k_blocks import TopKBlocks

__all__ = [
    "DHSA",
    "Dilated",
    "FixedChunks",
    "HierarchicalSparse",
    "LongNet",
    "Pattern",
    "Power",
    "Reach",
    "S2Attention",
    "SFAttention",
    "Sliding",
    "SlidingTokens",
    "Strided",
    "TopKBlocks",
    "reach",
]
