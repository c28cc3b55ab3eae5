"""The one attention function: run the hooks, choose the backend.

| attached methods need | backend |
|---|---|
| no weights | `dense`: the fused kernel |
| to read or change scores or weights | `blockwise`: exact, O(block x keys) memory |
| to read weights of sampled rows only | the fused kernel for the output, `blockwise` for the sampled rows |
| a sparse pattern (`call.mask` is a `BlockSparseMask`) | `block_sparse`: only the named key blocks |
| patterns that differ by rows or heads (`SplitMask`) | each part by its own backend |
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from regard.engine import block_sparse, blockwise, dense, split
from regard.engine.call import AttentionCall
from regard.engine.method import Pipeline, reading


def sample_rows(
    queries: int, fraction: float, generator: torch.Generator, device: torch.device
) -> Tensor:
    """One row drawn at random from each run of `1 / fraction` consecutive rows (stratified), ascending.

    The last run may be shorter; every row has the same chance up to that edge.
    """
    stride = max(1, round(1 / fraction))
    count = math.ceil(queries / stride)
    starts = torch.arange(count) * stride
    widths = torch.clamp(queries - starts, max=stride)
    offsets = (torch.rand(count, generator=generator) * widths).long()
    return (starts + offsets).to(device)


def attend(
    call: AttentionCall,
    pipeline: Pipeline,
    *,
    fraction: float | None = None,
    generator: torch.Generator | None = None,
    workspace: blockwise.Workspace | None = None,
) -> Tensor:
    """Runs one call through all hooks and returns `[batch, heads, queries, value_dim]`.

    `fraction` (for example 1/16) samples the query rows that reading methods see; it is refused when a method may
    change weights, since the output would then be computed from rows that it never saw.
    """
    for method in pipeline["before"]:
        call = method.before(call) or call
    call.rows = None

    if not pipeline.needs_weights:
        output = _fused(call, workspace)
    elif fraction is not None and call.queries > 1:
        if not pipeline.reads_only:
            changing = [
                type(m).__name__ for m in pipeline.methods if not getattr(m, "reads_only", False)
            ]
            raise ValueError(
                f"rows={fraction} samples what is read, but {', '.join(changing)} may change attention; use rows=None"
            )
        output = _fused(call, workspace)
        rows = sample_rows(
            call.queries, fraction, generator or torch.Generator().manual_seed(0), call.query.device
        )
        call.output, call.rows = output, rows
        with torch.no_grad():
            share = call.queries / len(rows)
            blockwise.attend(
                call, (), pipeline["weights"], rows=rows, share=share, workspace=workspace
            )
    else:
        result = blockwise.attend(
            call, pipeline["scores"], pipeline["weights"], workspace=workspace
        )
        assert result is not None
        output = result

    for method in pipeline["heads"]:
        with reading(method):
            replaced = method.heads(call, output)
        if replaced is not None:
            output = replaced
    call.output = output
    for method in pipeline["after"]:
        with reading(method):
            method.after(call)
    return output


def _fused(call: AttentionCall, workspace: blockwise.Workspace | None) -> Tensor:
    if call.fused is not None:
        return call.fused(call)
    if dense.can_attend(call):
        if isinstance(call.mask, block_sparse.BlockSparseMask) and not call.dropout:
            return block_sparse.attend(call)
        if isinstance(call.mask, split.SplitMask):
            return _parts(call, call.mask, workspace)
        if not isinstance(call.mask, split.Both):
            return dense.attend(call)
    output = blockwise.attend(call, (), (), workspace=workspace)
    assert output is not None
    return output


def _parts(
    call: AttentionCall, mask: split.SplitMask, workspace: blockwise.Workspace | None
) -> Tensor:
    """Every part by the backend that suits it; queries that no part holds give zeros."""
    shape = (*call.query.shape[:3], call.value.shape[-1])
    output = call.query.new_zeros(shape)
    for part in mask.parts:
        rows = slice(None) if part.batch is None else split.runs(part.batch)
        for inner, heads in split.sub_calls(call, part):
            held = output[rows] if isinstance(rows, slice) else None
            mixed = _fused(inner, workspace)
            if held is not None:
                held[:, heads, part.first : part.last] = mixed
            else:
                for row, one in zip(part.batch or (), mixed, strict=True):
                    output[row, heads, part.first : part.last] = one
    return output
