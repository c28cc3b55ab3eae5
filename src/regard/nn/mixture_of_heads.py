"""Mixture of heads (MoH): multi-head attention in which each token switches on a few of the heads.

    output_t = sum_i g_i(x_t) W_o,i H_i,t;     H_i the head's softmax attention, g the gates of `regard.ops.head_gates`
    logits of the gates: W_s x_t (shared heads, always on), W_r x_t (routed heads, `active` of them on), W_h x_t (their shares)

The token that asks chooses; every token still gives keys and values to all heads. Training adds a load-balance loss on the
routed heads. Attention goes through `regard`'s engine, whose methods see head outputs before the gates.

Source: Jin et al. 2024, arXiv 2410.11842, in the scale-preserving form of the released models. Heads that are off are computed
and multiplied by 0: this measures what a mixture of heads learns, and saves no time.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from regard._errors import InputError
from regard.nn.mixer import State
from regard.nn.softmax_attention import SoftmaxAttention
from regard.ops.head_gates import head_gates, load_balance_loss


class MixtureOfHeads(SoftmaxAttention):
    """Causal self-attention with rotary positions whose heads are gated token by token.

    Args:
        width: of the tokens.
        heads: query heads; must divide `width`, with an even quotient. The first `shared` are always on.
        shared: heads that are always on, half of them by default.
        active: routed heads that a token switches on, a quarter of `heads` by default (so 75 % of the heads are on). With 1, its
            gate does not depend on the routed logits, and their router learns from the load-balance loss alone.
        kv_heads: key and value heads, `heads` by default.
        balance: weight of the load-balance loss.

    Attributes:
        losses: "load_balance", in training, where there are routed heads.

    Cost: that of `SoftmaxAttention`, and width x (heads + 2) multiplications a token.

    Raises:
        InputError: heads that do not divide, more shared or active heads than there are, or routed heads that are never on.

    >>> mixer = MixtureOfHeads(width=32, heads=4)
    >>> mixer(torch.randn(2, 10, 32)).shape
    torch.Size([2, 10, 32])
    >>> mixer.gates(torch.zeros(1, 1, 32))[0, 0].sum()  # two shared heads and one of two routed ones
    tensor(3., grad_fn=<SumBackward0>)
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        shared: int | None = None,
        active: int | None = None,
        kv_heads: int | None = None,
        balance: float | int = 0.01,
    ) -> None:
        super().__init__(width, heads, kv_heads=kv_heads)
        shared = heads // 2 if shared is None else shared
        if not 0 <= shared <= heads:
            raise InputError.of("shared", given=shared, expected=f"within 0 .. {heads} heads")
        routed = heads - shared
        active = min(max(1, heads // 4), routed) if active is None else active
        if not min(1, routed) <= active <= routed:
            raise InputError.of(
                "active",
                given=active,
                expected=f"within {min(1, routed)} .. {routed}, the heads that are not shared",
            )
        self.shared, self.active, self.balance = shared, active, balance
        # a softmax over one head is a constant: such a router has nothing to learn
        self.shared_router = nn.Linear(width, shared, bias=False) if shared > 1 else None
        self.routed_router = nn.Linear(width, routed, bias=False) if routed > 1 else None
        self.split_router = nn.Linear(width, 2, bias=False) if shared and routed else None

    def gates(
        self, hidden: Float[Tensor, "batch tokens width"]
    ) -> Float[Tensor, "batch tokens heads"]:
        """The weight of each head at each token; 0 where it is off."""
        shared = _logits(self.shared_router, hidden, self.shared)
        split = _logits(self.split_router, hidden, 2)
        return head_gates(shared, self.routed_logits(hidden), split, self.active).to(hidden.dtype)

    def routed_logits(
        self, hidden: Float[Tensor, "batch tokens width"]
    ) -> Float[Tensor, "batch tokens routed"]:
        """What the choice among the routed heads goes by."""
        return _logits(self.routed_router, hidden, self.heads - self.shared)

    def forward(
        self,
        hidden: Float[Tensor, "batch tokens width"],
        *,
        valid: Bool[Tensor, "batch tokens"] | None = None,
        state: State | None = None,
    ) -> Float[Tensor, "batch tokens width"]:
        mixed = self.mix(hidden, valid, state)
        self.losses = {}
        if self.training and self.routed_router is not None:
            logits = self.routed_logits(hidden)
            loss = load_balance_loss(logits, self.active, valid)
            self.losses["load_balance"] = self.balance * loss
        gates = self.gates(hidden).transpose(1, 2)[..., None]
        return self.output_of(mixed * gates, hidden)


def _logits(router: nn.Module | None, hidden: Tensor, heads: int) -> Tensor:
    """In float32 at least: sums of half-precision probabilities would not add up to 1."""
    precise = torch.promote_types(hidden.dtype, torch.float32)
    if router is None:
        return torch.zeros(*hidden.shape[:-1], heads, dtype=precise, device=hidden.device)
    return router(hidden).to(precise)
