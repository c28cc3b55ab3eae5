"""Attention in blocks of query rows: exact weights for methods to read or change, never the N x N map.

For each block: scores by one matrix product with the visible keys only (the causal upper triangle is not computed),
softmax, the methods' hooks, and the product with the values. Grouped heads are folded into rows, so a KV head is read
once for all its query heads.

Cost: the time of the two matrix products and one softmax pass; extra memory 2 x block x keys x heads numbers, the same for
every block (two buffers, allocated once per call).
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from regard.engine.block import Block
from regard.engine.call import AttentionCall
from regard.engine.masks import Window
from regard.engine.method import Method, reading

PADDING = 512
SAMPLED_BLOCKS = 8
BLOCK_ROWS = 192
"""Query rows in one block: enough that the small operations of the hooks and of the products cost little."""
BLOCK_NUMBERS = 16_000_000
"""The most numbers in one block of scores; long calls with many heads take fewer rows at once."""


def block_size(call: AttentionCall) -> int:
    """Rows per block: `BLOCK_ROWS`, or fewer, but at least 32, so that a block holds about `BLOCK_NUMBERS` numbers."""
    width = call.query.shape[0] * call.heads * max(call.keys, 1)
    size = max(32, min(BLOCK_ROWS, BLOCK_NUMBERS // width // 16 * 16))
    return min(size, call.queries)


class Workspace:
    """Two score-sized buffers, reused by all blocks of a call (and by all calls of a session)."""

    def __init__(self) -> None:
        self.buffers: dict[str, Tensor] = {}

    def take(self, name: str, numbers: int, like: Tensor) -> Tensor:
        held = self.buffers.get(name)
        if (
            held is None
            or held.numel() < numbers
            or held.dtype != like.dtype
            or held.device != like.device
            or (held.is_inference() and not torch.is_inference_mode_enabled())
        ):
            held = torch.empty(numbers, dtype=like.dtype, device=like.device)
            self.buffers[name] = held
        return held

    def clear(self) -> None:
        self.buffers.clear()


def _working(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def _product(left: Tensor, right: Tensor, out: Tensor | None) -> Tensor:
    """`[batch, groups, rows, m] @ [batch, groups, m, n]`, one product per KV head where they are few and large."""
    batch, groups, rows, _ = left.shape
    shape = (batch, groups, rows, right.shape[-1])
    if out is None or rows < 32:
        return torch.matmul(left, right)
    if batch * groups > 8:
        torch.bmm(
            left.reshape(-1, *left.shape[2:]),
            right.reshape(-1, *right.shape[2:]),
            out=out.view(-1, *shape[2:]),
        )
        return out
    for b in range(batch):
        for g in range(groups):
            torch.mm(left[b, g], right[b, g], out=out[b, g])
    return out


def attend(
    call: AttentionCall,
    methods_scores: tuple[Method, ...],
    methods_weights: tuple[Method, ...],
    *,
    rows: Tensor | None = None,
    share: float = 1.0,
    workspace: Workspace | None = None,
) -> Tensor | None:
    """Runs the call and returns `[batch, heads, queries, value_dim]`.

    With `rows`, only these query rows are visited for the methods to read, and None is returned.
    """
    query, key, value = _working(call.query), _working(call.key), _working(call.value)
    batch, heads, queries, dim = query.shape
    groups, group = call.kv_heads, call.group
    grad = _needs_grad(call, (*methods_scores, *methods_weights))
    workspace = workspace or Workspace()
    key, value = key.contiguous(), value.contiguous()  # rows of one head next to each other
    keys_t = key.transpose(-1, -2)
    lowest = torch.finfo(query.dtype).min
    only_read = rows is not None
    if rows is None:
        rows = torch.arange(queries, device=query.device)
    neighbours = int(rows[-1]) - int(rows[0]) < len(rows)
    output = (
        None
        if only_read or grad
        else query.new_empty(batch, groups, group, queries, value.shape[-1])
    )
    pieces: list[Tensor] = []

    size = block_size(call)
    if not neighbours:  # sampled: small blocks, so that each computes few keys beyond its rows' own
        size = min(size, max(16, len(rows) // SAMPLED_BLOCKS))
    # the buffers are taken at their largest: if they grew block by block, they would break up the memory
    largest = batch * heads * size * call.keys
    for block_rows in rows.split(size):
        window = call.mask.window(block_rows)
        lo, hi, count = window.lo, window.hi, len(block_rows)
        first = int(block_rows[0])
        picked = query[:, :, first : first + count] if neighbours else query[:, :, block_rows]
        picked = (
            picked.view(batch, groups, group, count, dim)
            if picked.is_contiguous()
            else picked.unflatten(1, (groups, group))
        )
        folded = (picked * call.scaling).reshape(batch, groups, group * count, dim)
        numbers = batch * heads * count * (hi - lo)
        shape = (batch, groups, group * count, hi - lo)

        out = None if grad else workspace.take("scores", largest, query)[:numbers].view(shape)
        scores = _product(folded, keys_t[..., lo:hi], out).view(batch, heads, count, hi - lo)
        scores = _shape_scores(call, window, block_rows, scores, lowest, grad)
        block = Block(call, block_rows, window, scores, share=share, contiguous=neighbours)
        rewritten = False
        for method in methods_scores:
            with reading(method):
                replaced = method.scores(block)
            if replaced is not None:
                block.scores, rewritten = replaced, True

        if grad or block.scores.dtype != query.dtype:
            weights = torch.softmax(block.scores, -1)
        else:
            storage = workspace.take("weights", largest + PADDING, query)
            weights = storage[PADDING : PADDING + numbers].view(batch, heads, count, hi - lo)
            torch.softmax(block.scores, -1, out=weights)
            block.padded, block.padding = storage, PADDING
            if not rewritten:
                parts = (folded, keys_t[..., lo:hi])
                block.rescore = partial(_rescore, call, window, block_rows, parts, lowest)
        block.weights, block.plain = weights, call.sinks is None and not rewritten
        if window.dead:
            block.weights = weights.masked_fill(~block.visible.any(-1, keepdim=True), 0)  # type: ignore[union-attr]
            block.plain, block.padded = False, None
        if call.sinks is not None:
            taken = torch.sigmoid(
                torch.logsumexp(block.scores, -1) - _sinks(call.sinks, block_rows, scores.dtype)
            )
            block.weights = block.weights * taken[..., None]
            block.padded = None
        for method in methods_weights:
            with reading(method):
                replaced = method.weights(block)
            if replaced is None:
                continue
            if only_read or getattr(method, "reads_only", False):
                raise ValueError(
                    f"{type(method).__name__} says that it only reads (reads_only = True) but returned other weights; "
                    "set reads_only = False and attach it with rows=None"
                )
            block.weights, block.plain, block.padded = replaced, False, None
        if only_read:
            continue

        used = block.weights
        if call.dropout:
            used = torch.nn.functional.dropout(used, call.dropout)
        width = value.shape[-1]
        room = batch * heads * count * width
        out = None
        if not grad and used.dtype == query.dtype:
            out = workspace.take("mixed", room, query)[:room].view(*shape[:-1], width)
        mixed = _product(used.reshape(shape), value[..., lo:hi, :], out)
        mixed = mixed.view(batch, groups, group, count, width)
        if output is None:
            pieces.append(mixed)
        else:
            output[..., first : first + count, :] = mixed
    if only_read:
        return None
    result = torch.cat(pieces, -2) if output is None else output
    return result.view(batch, heads, queries, -1).to(call.query.dtype)


def _rescore(
    call: AttentionCall, window: Window, rows: Tensor, parts: tuple[Tensor, Tensor], lowest: float
) -> Tensor:
    """The scores of a block once more."""
    scores = torch.matmul(*parts).view(call.query.shape[0], call.heads, len(rows), -1)
    return _shape_scores(call, window, rows, scores, lowest, False)


def _needs_grad(call: AttentionCall, methods: tuple[Method, ...]) -> bool:
    """Whether autograd may come back to a block, so that the shared buffers must not be used.

    True as well for methods that change attention: what they put in may depend on parameters of theirs.
    """
    if not torch.is_grad_enabled():
        return False
    mask = getattr(call.mask, "tensor", None)
    inputs = (call.query, call.key, call.value, call.bias, call.sinks, mask)
    return any(t is not None and t.requires_grad for t in inputs) or any(
        not getattr(method, "reads_only", False) for method in methods
    )


def _sinks(sinks: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Sink logits for a block, `[1|batch, heads, 1|rows]`."""
    return (sinks.view(1, -1, 1) if sinks.dim() == 1 else sinks[..., rows]).to(dtype)


def _shape_scores(
    call: AttentionCall, window: Window, rows: Tensor, scores: Tensor, lowest: float, grad: bool
) -> Tensor:
    """Soft-capping, position bias and mask, in this order (the order of the models that have them)."""
    lo, hi = window.lo, window.hi
    if call.softcap is not None:
        scores = torch.tanh(scores / call.softcap) * call.softcap
    if call.bias is not None:
        bias = call.bias[..., lo:hi]
        bias = bias if bias.shape[-2] == 1 else bias[..., rows, :]
        scores = scores + bias
    if window.additive is not None:
        scores = scores + window.additive
    if window.hidden is not None:
        edge = window.edge - lo
        if grad:
            hidden = torch.nn.functional.pad(window.hidden, (edge, 0))
            scores = scores.masked_fill(hidden, lowest)
        else:
            scores[..., edge:].masked_fill_(window.hidden, lowest)
    return scores
