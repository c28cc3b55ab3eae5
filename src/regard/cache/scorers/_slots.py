"""What scorers ask of a call and a layer: positions with padding marked, and the attention of the call's queries."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from regard.cache.layer import Layer
from regard.engine import AttentionCall


def key_positions(layer: Layer) -> Int[Tensor, "batch kv_heads held"]:
    """Columns of the held tokens, -1 at padding and where a head holds less than others."""
    return layer.positions.long().masked_fill(~layer.valid, -1)


def query_positions(call: AttentionCall, layer: Layer) -> Int[Tensor, "batch queries"]:
    """Columns of the call's queries, -1 at padding."""
    now = torch.arange(layer.seen - call.queries, layer.seen, device=call.query.device)
    now = now.expand(len(call.query), -1)
    return now if call.valid is None else now.masked_fill(~call.valid, -1)


def reach(call: AttentionCall, layer: Layer) -> dict[str, Any]:
    """The arguments by which `regard.ops.attention_statistics` computes this call's attention.

    Learned sinks and additive position biases are left out: the first scales a whole row, the second is a function of distance.
    """
    return {"scaling": call.scaling, "softcap": call.softcap, "window": layer.sliding_window}
