"""One attention call, its hooks, and the backends that run it."""

from regard.engine.attend import attend, sample_rows
from regard.engine.block import Block
from regard.engine.block_sparse import BlockSparseMask
from regard.engine.blockwise import Workspace
from regard.engine.call import AttentionCall, Site
from regard.engine.late import LateReader
from regard.engine.masks import CausalMask, DeferredMask, FullMask, Mask, TensorMask, as_mask
from regard.engine.method import Method, Pipeline, State, overrides
from regard.engine.split import Both, Part, SplitMask

__all__ = [
    "AttentionCall",
    "Block",
    "BlockSparseMask",
    "Both",
    "CausalMask",
    "DeferredMask",
    "FullMask",
    "LateReader",
    "Mask",
    "Method",
    "Part",
    "Pipeline",
    "Site",
    "SplitMask",
    "State",
    "TensorMask",
    "Workspace",
    "as_mask",
    "attend",
    "overrides",
    "sample_rows",
]
