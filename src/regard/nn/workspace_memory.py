"""Workspace: a few slots that a text writes its summary to, chunk by chunk, and that every token reads.

    read    a = softmax_s(W_q LN(x_t) . W_k LN(M_s) / sqrt(rank)),   output_t = sigmoid(w_r . x_t) W_o sum_s a_s W_v LN(M_s)
    write   h = mean of the chunk;   a = softmax of (W_a h) . LN(M_s) / sqrt(width) over the `active` slots of lowest norm
            M_s <- (1 - w a_s) M_s + w a_s W_w h,     w = sigmoid(w_w . h)

Tokens read what chunks before theirs have written. Every text has slots of its own, which start as learned ones.

Source: Hydra, arXiv 2508.15099. Its released workspace reads the mean of the whole text, is one buffer for all texts that lasts
from batch to batch, and writes without a gradient; that is neither causal nor the same twice. This is the nearest form that is.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from regard._errors import InputError, at_least_one
from regard.nn._row_chunks import RowChunks
from regard.nn.mixer import Mixer, State
from regard.nn.projections import check_heads
from regard.ops.linear_attention import wide


class WorkspaceMemory(Mixer):
    """Slots that are read by attention and written chunk by chunk.

    Args:
        width: of the tokens.
        heads: must divide `width`, as everywhere; reading has one head.
        slots: of which
        active: those of lowest norm may be written.
        rank: of queries, keys and values.
        chunk: tokens between two writings.

    Cost: width (2 rank + 1) + 2 slots rank multiplications a token, and slots width (2 rank + 3) + 2 width^2 a chunk, one chunk
    after the other. The state keeps one size: the slots, and the sum of the running chunk.

    Raises:
        InputError: heads that do not divide, or a number out of range.

    >>> WorkspaceMemory(width=32, heads=4)(torch.randn(2, 70, 32)).shape
    torch.Size([2, 70, 32])
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        slots: int = 64,
        active: int = 32,
        rank: int = 128,
        chunk: int = 32,
    ) -> None:
        super().__init__()
        check_heads(width, heads)
        at_least_one(slots=slots, rank=rank, chunk=chunk)
        if not 1 <= active <= slots:
            raise InputError.of("active", given=active, expected=f"within 1 .. {slots} slots")
        self.active, self.chunk = active, chunk
        self.slots = nn.Parameter(0.01 * torch.randn(slots, width))
        self.norm, self.slot_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q_proj = nn.Linear(width, rank, bias=False)
        self.k_proj = nn.Linear(width, rank, bias=False)
        self.v_proj = nn.Linear(width, rank, bias=False)
        self.o_proj = nn.Linear(rank, width, bias=False)
        self.address_proj = nn.Linear(width, width, bias=False)
        self.write_proj = nn.Linear(width, width, bias=False)
        self.read_gate, self.write_gate = nn.Linear(width, 1), nn.Linear(width, 1)

    def forward(
        self,
        hidden: Float[Tensor, "batch tokens width"],
        *,
        valid: Bool[Tensor, "batch tokens"] | None = None,
        state: State | None = None,
    ) -> Float[Tensor, "batch tokens width"]:
        chunks = RowChunks.of(hidden, self.chunk, state["begun"] if state else None, valid)
        sums = chunks.sums(wide(hidden), state["partial"] if state else None)
        memory = state["memory"] if state else wide(self.slots).expand(len(hidden), -1, -1)
        memories = self._history(memory, sums / self.chunk, chunks)
        if state is not None:
            state["memory"] = chunks.of_running(memories)
            state["partial"] = chunks.of_running(sums)
            state["begun"] = chunks.count % self.chunk
        query = chunks.lay_out(self.q_proj(self.norm(hidden)))
        known = self.slot_norm(memories.to(hidden.dtype))
        scores = query @ self.k_proj(known).mT / query.shape[-1] ** 0.5
        read = chunks.take_back(scores.softmax(-1) @ self.v_proj(known))
        return torch.sigmoid(self.read_gate(hidden)) * self.o_proj(read)

    def _history(
        self, memory: Tensor, means: Float[Tensor, "batch chunks width"], chunks: RowChunks
    ) -> Float[Tensor, "batch chunks slots width"]:
        """The slots that each chunk reads."""
        found = [memory]
        for chunk in range(chunks.number - 1):
            ended = chunks.running > chunk
            memory = torch.where(ended[:, None, None], self.write(memory, means[:, chunk]), memory)
            found.append(memory)
        return torch.stack(found, 1)

    def write(
        self, memory: Float[Tensor, "batch slots width"], summary: Float[Tensor, "batch width"]
    ) -> Float[Tensor, "batch slots width"]:
        """The slots after a chunk of that mean."""
        summary = summary.to(self.slots.dtype)
        known = self.slot_norm(memory.to(summary.dtype))
        scores = (known @ self.address_proj(summary)[..., None])[..., 0] / summary.shape[-1] ** 0.5
        lowest = memory.norm(dim=-1).topk(self.active, -1, largest=False).indices
        free = torch.zeros_like(scores, dtype=torch.bool).scatter(1, lowest, True)
        share = wide(scores).masked_fill(~free, -torch.inf).softmax(-1)
        share = (torch.sigmoid(wide(self.write_gate(summary))) * share)[..., None]
        return (1 - share) * memory + share * wide(self.write_proj(summary))[:, None]
