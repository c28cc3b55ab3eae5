"""One denoising step with cached states: which rows run through which layer.

Every layer keeps, for each sequence, the hidden states X that entered it and the queries, keys and values they gave. A
sequence reuses them down to its restore layer r and recomputes everything from there on:

    l < r   only the rows R of the query set are computed and written; they attend to all keys, old and fresh
    l = r   the rows R are written into X, then all of X goes on (rows outside R enter with their cached states)
    l > r   all rows are computed and written

r = -1 is a full forward. Sequences of a batch may have different r: in each layer they fall into two groups, one that runs
R and one that runs everything.

Memory: `layers x sequence x (width + (heads + 2 kv_heads) x dim)` numbers for each sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from regard.cache.diffusion.canvas import Canvas
from regard.cache.diffusion.denoiser import Denoiser, DiffusionBlock, attention_rows, pack
from regard.cache.diffusion.policy import DiffusionCache


class LayerStates:
    """The cached states of one layer for a batch, made when they are first written.

    `hidden` `[batch, sequence, width]`, `query` `[batch, heads, sequence, dim]`, `key` and `value`
    `[batch, kv_heads, sequence, dim]`; `tracked` `[batch, tracked]`, the followed tokens.
    """

    def __init__(self, batch: int, sequence: int, tracked: int, device: torch.device) -> None:
        self.batch, self.sequence = batch, sequence
        self.tracked = torch.zeros(batch, tracked, dtype=torch.long, device=device)
        self.hidden = self.query = self.key = self.value = torch.empty(0)

    def write_hidden(self, which: Tensor, rows: Tensor, hidden: Tensor) -> None:
        if not self.hidden.numel():
            self.hidden = hidden.new_zeros(self.batch, self.sequence, hidden.shape[-1])
        self.hidden[which[:, None], rows] = hidden

    def write(self, which: Tensor, rows: Tensor, query: Tensor, key: Tensor, value: Tensor) -> None:
        if not self.query.numel():
            self.query, self.key, self.value = (
                states.new_zeros(self.batch, states.shape[1], self.sequence, states.shape[-1])
                for states in (query, key, value)
            )
        for store, states in ((self.query, query), (self.key, key), (self.value, value)):
            store[which[:, None], :, rows] = states.transpose(1, 2)

    def queries(self, which: Tensor, rows: Tensor) -> Tensor:
        """`[len(which), heads, rows, dim]`."""
        return self.query[which[:, None], :, rows].transpose(1, 2)


@dataclass
class Cost:
    """What a step did, for each of its sequences."""

    projected: Int[Tensor, " batch"]
    """Rows projected, summed over layers."""
    restored: Int[Tensor, " batch"]
    """r: the layer from which everything was recomputed; -1 for everything, the number of layers for none."""
    similarity: Float[Tensor, "batch layers"]
    """Sigma of each layer that reused and tracked; NaN elsewhere."""


@dataclass
class _Group:
    """Sequences that run the same kind of rows: their places in the batch, those rows, the rows' hidden states."""

    which: Tensor
    rows: Tensor
    hidden: Tensor


def query_set(
    canvas: Canvas, cache: DiffusionCache, states: list[LayerStates], shift: int
) -> Tensor:
    """The rows R: window, rows whose logits predict the window, tokens just decided, tracked tokens, `cache.rows`."""
    active = cache.active(canvas)
    rows = active | _predicting(active, shift) | canvas.committed | cache.rows(canvas)
    for layer in states:
        rows = rows.scatter(1, layer.tracked[canvas.sequences], True)
    return rows


def _predicting(active: Tensor, shift: int) -> Tensor:
    rows = active.roll(-shift, 1)
    if shift:
        rows[:, -shift:] = False
        rows[:, 0] |= active[:, :shift].any(1)
    return rows


@torch.no_grad()
def denoise(
    model: Denoiser, canvas: Canvas, cache: DiffusionCache, states: list[LayerStates]
) -> tuple[
    Float[Tensor, "batch window vocabulary"],
    Int[Tensor, "batch window"],
    Bool[Tensor, "batch window"],
    Cost,
]:
    """Logits of the active masks, their positions, which of them are real (not filling), and the cost.

    Cost: for each layer, the projections and feed-forward of the rows it runs and `rows x sequence` attention.
    """
    count, length = canvas.tokens.shape
    device, layers = canvas.tokens.device, len(model.blocks)
    window, real = pack(cache.active(canvas))
    restart = cache.restart(canvas)
    r = torch.where(restart, -1, layers)
    everything = torch.arange(length, device=device)
    projected = torch.zeros(count, dtype=torch.long, device=device)
    similarity = torch.full((count, layers), float("nan"), device=device)

    def group(which: Tensor, rows: Tensor) -> _Group:
        tokens = canvas.tokens[which].gather(1, rows)
        return _Group(which, rows, model.embed(tokens))

    full = group(restart.nonzero()[:, 0], everything.expand(int(restart.sum()), -1))
    chosen = (~restart).nonzero()[:, 0]
    sizes = torch.full((count,), length, device=device)
    if len(chosen):
        wanted = query_set(canvas, cache, states, model.shift)[chosen]
        part = group(chosen, pack(wanted)[0])
        sizes[chosen] = wanted.sum(1)
    else:
        part = _Group(chosen, everything.expand(0, -1), full.hidden[:0])

    for number, (block, layer) in enumerate(zip(model.blocks, states, strict=True)):
        for some in (part, full):
            if len(some.which):
                layer.write_hidden(canvas.sequences[some.which], some.rows, some.hidden)
        full, part = _restore(full, part, r == number, layer, canvas.sequences)
        for some in (part, full):
            if not len(some.which):
                continue
            reuse = some is part
            tested = _run(block, layer, some, canvas, window, real, cache, reuse)
            projected[some.which] += sizes[some.which] if reuse else length
            if tested is not None:
                similarity[some.which, number], changed = tested
                r[some.which[changed]] = number + 1

    hidden = part.hidden.new_zeros(count, length, part.hidden.shape[-1])
    for some in (part, full):
        hidden[some.which[:, None], some.rows] = some.hidden
    read = (window - model.shift).clamp(min=0)
    logits = model.logits(hidden.gather(1, read[..., None].expand(-1, -1, hidden.shape[-1])))
    return logits, window, real, Cost(projected, r, similarity)


def _restore(
    full: _Group, part: _Group, now: Tensor, layer: LayerStates, sequences: Tensor
) -> tuple[_Group, _Group]:
    """Moves the sequences whose restore layer this is from reuse to full, with all their cached hidden states."""
    moving = now[part.which]
    if not bool(moving.any()):
        return full, part
    which, staying = part.which[moving], ~moving
    length = layer.hidden.shape[1]
    rows = torch.arange(length, device=which.device).expand(len(which), -1)
    joined = _Group(
        torch.cat([full.which, which]),
        torch.cat([full.rows, rows]),
        torch.cat([full.hidden, layer.hidden[sequences[which]]]),
    )
    return joined, _Group(part.which[staying], part.rows[staying], part.hidden[staying])


def _run(
    block: DiffusionBlock,
    layer: LayerStates,
    some: _Group,
    canvas: Canvas,
    window: Tensor,
    real: Tensor,
    cache: DiffusionCache,
    reuse: bool,
) -> tuple[Tensor, Tensor] | None:
    """Runs one layer for one group, in place; returns sigma and the verdict of the drift test where there was one."""
    ids = canvas.sequences[some.which]
    tracked = layer.tracked[ids]
    testing = reuse and cache.tracked > 0
    query, key, value = block.project(some.hidden, some.rows)
    old = torch.empty(0)
    if testing:  # before the fresh rows overwrite the cached ones
        old = attention_rows(layer.queries(ids, tracked), layer.key[ids])
    layer.write(ids, some.rows, query, key, value)
    keys, values = layer.key[ids], layer.value[ids]
    some.hidden = block.finish(some.hidden, block.attend(query, keys, values))
    result = None
    if testing:
        new = attention_rows(layer.queries(ids, tracked), keys)
        result = cache.changed(old, new)
    if cache.tracked:
        weights = attention_rows(layer.queries(ids, window[some.which]), keys)
        received = (weights * real[some.which][:, None, :, None]).sum((1, 2))
        received = received.masked_fill(~canvas.decoded[some.which], 0)
        layer.tracked[ids] = received.topk(cache.tracked).indices
    return result
