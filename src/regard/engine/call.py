"""One attention call and the place in the model where it happens."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from regard.engine.masks import Mask, as_mask

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True, slots=True)
class Site:
    """Where attention happens: layer, module path, self or cross, and the stack it belongs to.

    `stack` is "" for a model's main text stack (or its only one), else "encoder", "vision", "cross", ...
    """

    layer: int
    name: str = ""
    kind: Literal["self", "cross"] = "self"
    causal: bool = True
    heads: int = 0
    kv_heads: int = 0
    stack: str = ""

    @property
    def key(self) -> tuple[str, int]:
        return self.stack, self.layer

    def __str__(self) -> str:
        return f"{self.stack}.L{self.layer}" if self.stack else f"L{self.layer}"


@dataclass(slots=True)
class AttentionCall:
    """What one attention layer computes: `softmax(scaling * query @ key.T + bias, visible keys) @ value`.

    Grouped heads stay grouped: query head `h` reads KV head `h // (heads // kv_heads)`.

    Attributes:
        query: `[batch, heads, queries, dim]`.
        key: `[batch, kv_heads, keys, dim]`.
        value: `[batch, kv_heads, keys, value_dim]`.
        mask: which keys each query sees.
        scaling: factor on query . key.
        softcap: when set, scores become `softcap * tanh(scores / softcap)` (Gemma 2).
        sinks: learned sink logits `[heads]`, a virtual key with no value (GPT-OSS), or `[batch, heads, queries]` where
            they depend on the query.
        bias: additive position bias, broadcastable to `[batch, heads, queries, keys]` (T5).
        valid: `[batch, queries]`, False at padding queries; None when there is no padding.
        key_valid: `[batch, keys]`, False at padding keys; None when there is no padding.
        query_offset: the key slot of query 0 (tokens already in the cache).
        rows: `[rows]`, the query rows that were sampled for reading; None where every row is read.
        output: `[batch, heads, queries, value_dim]` once the call is done.
    """

    query: Float[Tensor, "batch heads queries dim"]
    key: Float[Tensor, "batch kv_heads keys dim"]
    value: Float[Tensor, "batch kv_heads keys value_dim"]
    mask: Mask
    scaling: float
    site: Site = field(default_factory=lambda: Site(0))
    softcap: float | None = None
    sinks: Tensor | None = None
    bias: Tensor | None = None
    dropout: float = 0.0
    valid: Bool[Tensor, "batch queries"] | None = None
    key_valid: Bool[Tensor, "batch keys"] | None = None
    query_offset: int = 0
    module: nn.Module | None = None
    rows: Tensor | None = None
    output: Tensor | None = None
    fused: Callable[[AttentionCall], Tensor] | None = None

    def __post_init__(self) -> None:
        batch, heads, _queries, dim = self.query.shape
        kv_heads, keys = self.key.shape[1], self.key.shape[2]
        if heads % kv_heads:
            raise ValueError(
                f"query heads must be a multiple of KV heads, got {heads} and {kv_heads}"
            )
        if (
            self.key.shape != (batch, kv_heads, keys, dim)
            or self.value.shape[:3] != self.key.shape[:3]
        ):
            raise ValueError(
                "query, key and value do not fit: got query "
                f"{tuple(self.query.shape)}, key {tuple(self.key.shape)}, value {tuple(self.value.shape)}"
            )

    @classmethod
    def make(
        cls,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        mask: Tensor | Mask | None = None,
        causal: bool = True,
        scaling: float | None = None,
        **rest: object,
    ) -> AttentionCall:
        """A call from plain tensors; `mask` is a boolean or additive tensor, None for causal or full attention."""
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        rule = as_mask(mask, query.shape[2], key.shape[2], causal)
        return cls(query, key, value, rule, scaling, **rest)  # type: ignore[arg-type]

    @property
    def heads(self) -> int:
        return self.query.shape[1]

    @property
    def kv_heads(self) -> int:
        return self.key.shape[1]

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.heads // self.kv_heads

    @property
    def queries(self) -> int:
        return self.query.shape[2]

    @property
    def keys(self) -> int:
        return self.key.shape[2]

    @property
    def phase(self) -> Literal["prefill", "decode"]:
        return "decode" if self.queries == 1 and self.keys > 1 else "prefill"

    @property
    def positions(self) -> Tensor:
        """The key slot of every query, `[queries]`."""
        return torch.arange(self.queries, device=self.query.device) + self.query_offset
