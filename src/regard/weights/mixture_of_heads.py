"""A pretrained model as a mixture of heads, with a router that has no parameters.

Some heads stay shared (always on). Of the others, each token keeps the `active` ones in which its own query is longest:

    logit_i = |q_i| / std over the routed heads of |q|;     head i is on when its logit is among the `active` highest

Heads that are on write exactly what they wrote, the others write nothing at that token; keys and values stay those of all tokens.
Gates are 0 or 1 with a straight-through gradient, so the model can be tuned under them, with a load-balance loss.

    with regard.attach(model, QueryNormHeads(shared=5, active=2)) as session: ...

Nothing in the model is changed; on leaving it is as it was. Works on every model whose attention goes through transformers'
interface, under `generate()`, with padding and in half precision.

Source: Jin et al. 2024, arXiv 2410.11842, which continues training LLaMA3-8B so (the first half of the heads shared, half of the
others on: 75 %). Its training code is not released; the norms are taken after rotary positions, which keep them. Where a model
normalises its queries (Qwen 3), their lengths say little, and so does this router.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from regard._errors import InputError
from regard.attach import Session
from regard.engine import AttentionCall, Method
from regard.ops.head_gates import (
    chosen_heads,
    load_balance_loss,
    query_norm_logits,
    straight_through_gates,
)

SiteKey = tuple[str, int]


class RoutedHeads(Method):
    """Base of the methods that switch heads on and off by token; a subclass says by which `logits`.

    Args:
        shared: heads that are always on: how many, from the first; or which.
        active: how many of the others each token switches on.
        balance: weight of the load-balance loss.

    Attributes:
        chosen: the routed heads that were on, by (stack, layer), at the newest forward pass.

    Raises:
        InputError: fewer than one routed head is on, or more than there are (at the first call).
    """

    def __init__(
        self, shared: int | Sequence[int], active: int, *, balance: float | int = 0.01
    ) -> None:
        if isinstance(shared, int) and shared < 0:
            raise InputError.of("shared", given=shared, expected="0 or more heads")
        if active < 1:
            raise InputError.of("active", given=active, expected="1 or more heads")
        self.shared: int | tuple[int, ...] = shared if isinstance(shared, int) else tuple(shared)
        self.active, self.balance = active, balance
        self.chosen: dict[SiteKey, Bool[Tensor, "batch tokens routed"]] = {}
        self._losses: dict[SiteKey, Tensor] = {}

    def start(self, session: Any) -> None:
        self.chosen, self._losses = {}, {}

    def stop(self) -> None:
        self._losses = {}

    def logits(
        self, call: AttentionCall, query: Float[Tensor, "batch routed tokens dim"]
    ) -> Float[Tensor, "batch tokens routed"]:
        """What the choice goes by, from the queries of the routed heads."""
        raise NotImplementedError

    def routed(self, heads: int) -> list[int]:
        """The heads that are not shared, of so many."""
        always = range(self.shared) if isinstance(self.shared, int) else self.shared
        unknown = [head for head in always if not 0 <= head < heads]
        rest = [head for head in range(heads) if head not in always]
        if unknown or self.active > len(rest):
            raise InputError(
                f"shared and active heads must fit into {heads} heads, got shared={self.shared}, active={self.active}"
            )
        return rest

    def heads(
        self, call: AttentionCall, output: Float[Tensor, "batch heads queries dim"]
    ) -> Float[Tensor, "batch heads queries dim"] | None:
        if call.site.kind == "cross":
            return None
        routed = self.routed(call.heads)
        logits = self.logits(call, call.query[:, routed])
        self.chosen[call.site.key] = chosen_heads(logits.detach(), self.active)
        if torch.is_grad_enabled():
            loss = load_balance_loss(logits, self.active, call.valid)
            self._losses[call.site.key] = self.balance * loss
        gates = output.new_ones(len(output), call.heads, call.queries)
        switched = straight_through_gates(logits, self.active).transpose(1, 2)
        gates[:, routed] = switched.to(output.dtype)
        return output * gates[..., None]

    def loss(self) -> Float[Tensor, ""]:
        """The load-balance loss of the newest forward pass with gradients, a mean over layers: to be added in training."""
        if not self._losses:
            raise InputError("no forward pass with gradients has run yet, so there is no loss")
        return torch.stack(list(self._losses.values())).mean()


class QueryNormHeads(RoutedHeads):
    """Each token switches on the routed heads in which its query is longest.

    Cost: one norm of every routed query, and one pass over the head outputs. Heads that are off are computed all the same.

    >>> from regard.engine import Pipeline, attend
    >>> query = torch.tensor([1.0, 3.0, 2.0]).view(1, 3, 1, 1)
    >>> call = AttentionCall.make(query, torch.ones(1, 3, 1, 1), torch.ones(1, 3, 1, 1))
    >>> attend(call, Pipeline([QueryNormHeads(shared=1, active=1)])).flatten()
    tensor([1., 1., 0.])
    """

    def logits(
        self, call: AttentionCall, query: Float[Tensor, "batch routed tokens dim"]
    ) -> Float[Tensor, "batch tokens routed"]:
        return query_norm_logits(query)


def spread_heads(heads: int, kv_heads: int, count: int) -> list[int]:
    """`count` of the query heads, taken from the groups of a KV head in turn, so that no group is routed as a whole.

    Raises:
        InputError: more than there are, or groups that are not even.

    >>> spread_heads(9, 3, 5)
    [0, 1, 3, 4, 6]
    """
    if kv_heads < 1 or heads % kv_heads:
        raise InputError.of("kv_heads", given=kv_heads, expected=f"a divisor of {heads} heads")
    if not 0 <= count <= heads:
        raise InputError.of("count", given=count, expected=f"within 0 .. {heads} heads")
    group = heads // kv_heads
    turns = sorted(range(heads), key=lambda head: (head % group, head // group))
    return sorted(turns[:count])


def mixture_of_heads(model: nn.Module, share: float | int = 0.75, **settings: Any) -> Session:
    """A session in which `share` of the model's heads are on: half of them shared, spread over the groups, the rest routed.

        with mixture_of_heads(model, 0.75): model.generate(...)

    For other splits attach `QueryNormHeads` itself; the paper's takes the first half, `QueryNormHeads(heads // 2, heads // 4)`.

    Raises:
        InputError: a share that leaves no routed head to choose, or a model whose configuration names no heads.
    """
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    heads = getattr(config, "num_attention_heads", None)
    if not isinstance(heads, int):
        raise InputError(
            f"{type(model).__name__} does not say how many heads it has; attach QueryNormHeads(shared, active) instead"
        )
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    shared = -(-heads // 2)
    active = round(share * heads) - shared
    if not 1 <= active < heads - shared:
        low, high = (shared + 1) / heads, (heads - 1) / heads
        raise InputError.of(
            "share", given=share, expected=f"within {low:.2f} .. {high:.2f} for {heads} heads"
        )
    method = QueryNormHeads(spread_heads(heads, kv_heads, shared), active, **settings)
    return Session(model, method)
