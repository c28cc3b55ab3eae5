"""Chunk-routed mixture of experts: a stretch of tokens shares its experts, which the stretch before it chose.

    logits_k = W_r s_k / temperature,      s_k = mean of the tokens of chunk k - 1,   s_0 learned
    y_t = sum_e g_e SwiGLU_e(x_t)          g: softmax over the `active` largest logits of the chunk of t

Neighbouring tokens need similar experts, and a router that speaks once a chunk keeps their weights in the cache. Chunks begin
at a row's first token that is no padding.

Source: Hydra, arXiv 2508.15099. There chunk k is routed on its own mean, and so its first tokens on its last ones;
`WholeChunkMoE` is that form, for encoders.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from regard._errors import InputError, at_least_one
from regard.nn._row_chunks import RowChunks
from regard.nn.mixer import Mixer, State
from regard.nn.projections import check_heads
from regard.ops.expert_routing import expert_balance, expert_gates, expert_mixture
from regard.ops.linear_attention import wide


class ChunkMoE(Mixer):
    """A mixture of experts whose router speaks once a chunk, causally.

    Args:
        width: of the tokens.
        heads: must divide `width`, as everywhere; experts have no heads.
        chunk: tokens that share their experts.
        experts: of which
        active: work on each chunk. With 1, the router learns from the balance loss alone.
        inner: width of an expert.
        temperature: of the router.
        balance: weight of the balance loss.

    Attributes:
        losses: "balance", in training, where there are several experts.

    Cost: 3 active width inner multiplications a token, of 3 experts width inner parameters. The state keeps one size: the mean
    of the last chunk and the sum of the running one.

    Raises:
        InputError: heads that do not divide, or a number out of range.

    >>> mixer = ChunkMoE(width=32, heads=4, inner=64)
    >>> mixer(torch.randn(2, 40, 32)).shape
    torch.Size([2, 40, 32])
    >>> (mixer.gates(torch.randn(1, 1, 32)) > 0).sum().item()
    2
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        chunk: int = 32,
        experts: int = 4,
        active: int = 2,
        inner: int = 256,
        temperature: float | int = 1.0,
        balance: float | int = 0.01,
    ) -> None:
        super().__init__()
        check_heads(width, heads)
        at_least_one(chunk=chunk, experts=experts, inner=inner)
        if not 1 <= active <= experts:
            raise InputError.of("active", given=active, expected=f"within 1 .. {experts} experts")
        if not temperature > 0:
            raise InputError.of("temperature", given=temperature, expected="above 0")
        self.chunk, self.active, self.temperature, self.balance = (
            chunk,
            active,
            temperature,
            balance,
        )
        self.experts = experts
        # a choice of one is no choice: such a router has nothing to learn
        self.router = nn.Linear(width, experts, bias=False) if experts > 1 else None
        if experts > 1:
            self.start = nn.Parameter(0.02 * torch.randn(width))
        self.gate_proj = nn.Parameter(_matrices(experts, inner, width))
        self.up_proj = nn.Parameter(_matrices(experts, inner, width))
        self.down_proj = nn.Parameter(_matrices(experts, width, inner))

    def forward(
        self,
        hidden: Float[Tensor, "batch tokens width"],
        *,
        valid: Bool[Tensor, "batch tokens"] | None = None,
        state: State | None = None,
    ) -> Float[Tensor, "batch tokens width"]:
        self.losses = {}
        if self.router is None:
            gates = torch.ones_like(hidden[..., :1])
        else:
            logits = self.logits(hidden, valid, state)
            gates = expert_gates(logits, self.active).to(hidden.dtype)
            if self.training and (valid is None or bool(valid.any())):
                self.losses["balance"] = self.balance * expert_balance(gates, logits, valid)
        if valid is not None:
            gates = gates.masked_fill(~valid[..., None], 0)
        weights = (self.gate_proj, self.up_proj, self.down_proj)
        return expert_mixture(hidden.flatten(0, 1), gates.flatten(0, 1), *weights).view_as(hidden)

    def gates(
        self,
        hidden: Float[Tensor, "batch tokens width"],
        valid: Bool[Tensor, "batch tokens"] | None = None,
    ) -> Float[Tensor, "batch tokens experts"]:
        """The weight of each expert at each token, 0 for those that do not work on it."""
        return expert_gates(self.logits(hidden, valid, None), self.active)

    def logits(
        self,
        hidden: Float[Tensor, "batch tokens width"],
        valid: Bool[Tensor, "batch tokens"] | None = None,
        state: State | None = None,
    ) -> Float[Tensor, "batch tokens experts"]:
        """What the choice of experts goes by, the same for all tokens of a chunk."""
        chunks = RowChunks.of(hidden, self.chunk, state["begun"] if state else None, valid)
        sums = chunks.sums(wide(hidden), state["partial"] if state else None)
        before = state["before"] if state else wide(self.start).expand(len(hidden), -1)
        means = torch.cat([before[:, None], sums[:, :-1] / self.chunk], 1)
        if state is not None:
            state["before"] = chunks.of_running(means)
            state["partial"] = chunks.of_running(sums)
            state["begun"] = chunks.count % self.chunk
        return chunks.of_token(self._scores(means))

    def _scores(self, summary: Float[Tensor, "batch chunks width"]) -> Tensor:
        assert self.router is not None
        # summed by itself, chunk by chunk: how a matrix product rounds depends on the batch, and a choice hangs on it
        return (summary[..., None, :] * wide(self.router.weight)).sum(-1) / self.temperature


class WholeChunkMoE(ChunkMoE):
    """The published router, which reads the chunk that it routes. For encoders: not causal, without a state, not in `MIXERS`."""

    def __init__(self, width: int, heads: int, **options: object) -> None:
        super().__init__(width, heads, **options)  # pyright: ignore[reportArgumentType]
        if self.router is not None:
            del self.start

    def logits(
        self,
        hidden: Float[Tensor, "batch tokens width"],
        valid: Bool[Tensor, "batch tokens"] | None = None,
        state: State | None = None,
    ) -> Float[Tensor, "batch tokens experts"]:
        if state is not None:
            raise InputError.of(
                "state", given="a state", expected="None", fix="ChunkMoE goes token by token"
            )
        chunks = RowChunks.of(hidden, self.chunk, None, valid)
        sums = chunks.sums(wide(hidden), None)
        starts = self.chunk * torch.arange(sums.shape[1], device=hidden.device)
        tokens = (chunks.count[:, None] - starts).clamp(1, self.chunk)
        return chunks.of_token(self._scores(sums / tokens[..., None]))


def _matrices(count: int, rows: int, columns: int) -> Tensor:
    """As `nn.Linear` begins."""
    return torch.empty(count, rows, columns).uniform_(-1, 1) / columns**0.5
