"""Which keys a query may see, without ever building a queries x keys mask.

A mask answers one question, for one block of query rows: the range of keys that any of these rows can see, and which
(query, key) pairs inside that range are hidden. Four kinds cover what models ask for:

* `FullMask`: every key (encoders, cross-attention without padding, one decoded token);
* `CausalMask`: keys up to the query's own position;
* `TensorMask`: a boolean or additive tensor that the model made itself;
* `DeferredMask`: a rule `(batch, head, query, key) -> bool`, evaluated block by block. To the model it looks like the
  boolean tensor it stands for, and becomes that tensor if the model computes with it.

Cost of `window`: O(block x keys) time and memory, nothing for the first two kinds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Window:
    """The keys `lo:hi` a block of rows sees; `hidden` `[batch|1, heads|1, rows, hi - edge]` marks what is masked in `edge:hi`.

    `additive` (same shape over `lo:hi`) is what a float mask adds to the scores; `dead` says that a row may see nothing.
    """

    lo: int
    hi: int
    edge: int
    hidden: Tensor | None = None
    additive: Tensor | None = None
    dead: bool = False

    def visible(self, rows: int, device: torch.device) -> Tensor | None:
        """`[batch|1, heads|1, rows, hi - lo]`, or None when everything in the range is visible."""
        if self.hidden is None:
            return None
        before = torch.ones(1, 1, rows, self.edge - self.lo, dtype=torch.bool, device=device)
        before = before.expand(self.hidden.shape[0], self.hidden.shape[1], -1, -1)
        return torch.cat([before, ~self.hidden], dim=-1)


@runtime_checkable
class Mask(Protocol):
    def window(self, rows: Tensor) -> Window:
        """What the query rows `rows` (ascending indices) may see."""
        ...


@dataclass(frozen=True, slots=True)
class FullMask:
    keys: int

    def window(self, rows: Tensor) -> Window:
        return Window(0, self.keys, self.keys)


@dataclass(frozen=True, slots=True)
class CausalMask:
    """Query `i` sees keys `0 .. i + offset`."""

    keys: int
    offset: int = 0

    def window(self, rows: Tensor) -> Window:
        first, last = int(rows[0]) + self.offset, int(rows[-1]) + self.offset
        lo, edge, hi = 0, min(first + 1, self.keys), min(last + 1, self.keys)
        if edge >= hi:
            return Window(lo, hi, hi)
        columns = torch.arange(edge, hi, device=rows.device)
        hidden = columns[None, :] > (rows + self.offset)[:, None]
        return Window(lo, hi, edge, hidden[None, None])


def _from_visible(visible: Tensor, additive: Tensor | None = None) -> Window:
    """The tightest window around a visible block `[batch|1, heads|1, rows, keys]`."""
    keys = visible.shape[-1]
    anywhere = visible.flatten(0, -2).any(0).nonzero()
    if anywhere.numel() == 0:
        return Window(
            0,
            1,
            0,
            torch.ones(1, 1, visible.shape[-2], 1, dtype=torch.bool, device=visible.device),
            None,
            True,
        )
    lo, hi = int(anywhere[0]), int(anywhere[-1]) + 1
    visible = visible[..., lo:hi]
    if additive is not None:
        additive = additive[..., lo:hi]
    partial = (~visible.flatten(0, -2).all(0)).nonzero()
    if partial.numel() == 0:
        return Window(lo, hi, hi, None, additive)
    edge = int(partial[0])
    dead = edge == 0 and bool((~visible.any(-1)).any())
    return Window(lo, min(hi, keys), lo + edge, ~visible[..., edge:], additive, dead)


@dataclass(frozen=True, slots=True)
class TensorMask:
    """A boolean `[batch|1, heads|1, queries, keys]` (True = visible) or an additive float mask of the same shape."""

    tensor: Tensor
    keys: int

    def window(self, rows: Tensor) -> Window:
        block = self.tensor[..., : self.keys]
        block = (
            block.index_select(-2, rows)
            if block.shape[-2] > 1
            else block.expand(-1, -1, len(rows), -1)
        )
        if block.dtype == torch.bool:
            return _from_visible(block)
        visible = block > torch.finfo(block.dtype).min / 2
        flat = bool((block.masked_fill(~visible, 0) == 0).all())
        return _from_visible(visible, None if flat else block.masked_fill(~visible, 0))


class DeferredMask(Tensor):
    """The mask `[batch, 1, queries, keys]` of a rule, evaluated only where it is needed.

    `rule(batch, head, query, key)` takes index tensors that broadcast and returns True where the key is visible;
    `key_valid` `[batch, keys]` is False at padding; `causal` says that the rule is plain causality. `unpadded` is the rule
    without padding, for keys that lie anywhere (`at`), and `past` says that this one is plain causality. Any torch
    operation on it yields the ordinary tensor: boolean, or additive (0 and the smallest number) when `dtype` is a float.
    """

    rule: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    key_valid: Tensor | None
    query_offset: int
    key_offset: int
    causal: bool
    unpadded: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    past: bool

    @staticmethod
    def __new__(
        cls,
        rule: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
        shape: tuple[int, int, int, int],
        *,
        query_offset: int = 0,
        key_offset: int = 0,
        key_valid: Tensor | None = None,
        causal: bool = False,
        unpadded: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] | None = None,
        past: bool = False,
        dtype: torch.dtype = torch.bool,
        device: torch.device | str = "cpu",
    ) -> DeferredMask:
        mask = torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=dtype, device=torch.device(device)
        )
        mask.rule = rule
        mask.key_valid = key_valid
        mask.query_offset = query_offset
        mask.key_offset = key_offset
        mask.causal = causal
        mask.unpadded = unpadded or rule
        mask.past = past or causal
        return mask

    def block(self, rows: Tensor) -> Tensor:
        """The visible pairs of some query rows, `[batch|1, 1, rows, keys]`."""
        device, keys = rows.device, self.shape[-1]
        batch = torch.arange(self.shape[0], device=device).view(-1, 1, 1, 1)
        head = torch.zeros(1, 1, 1, 1, dtype=torch.long, device=device)
        query = (rows + self.query_offset).view(1, 1, -1, 1)
        key = (torch.arange(keys, device=device) + self.key_offset).view(1, 1, 1, -1)
        visible = self.rule(batch, head, query, key)
        return visible.expand(-1, -1, len(rows), keys)

    def at(self, positions: Tensor) -> Tensor:
        """The visible pairs of every query with keys at `positions` `[batch, heads, keys]`, `[batch, heads, queries, keys]`.

        O(batch x heads x queries x keys) memory.
        """
        device = positions.device
        batch = torch.arange(positions.shape[0], device=device).view(-1, 1, 1, 1)
        head = torch.zeros(1, 1, 1, 1, dtype=torch.long, device=device)
        query = torch.arange(self.shape[-2], device=device) + self.query_offset
        key = positions.long()[:, :, None, :]
        visible = self.unpadded(batch, head, query.view(1, 1, -1, 1), key)
        visible = visible.expand(*positions.shape[:2], len(query), positions.shape[-1])
        if self.key_valid is not None:
            column = key - self.key_offset
            known = (column >= 0) & (column < self.key_valid.shape[1])
            column = torch.where(known, column, 0)
            valid = self.key_valid[batch, column] | ~known
            visible = visible & valid
        return visible

    def window(self, rows: Tensor) -> Window:
        if self.causal:
            return CausalMask(self.shape[-1], self.query_offset - self.key_offset).window(rows)
        return _from_visible(self.block(rows))

    def visible(self) -> Tensor:
        """The whole boolean tensor; O(batch x queries x keys) memory."""
        rows = torch.arange(self.shape[-2], device=self.device)
        return self.block(rows).expand(self.shape).contiguous()

    def materialise(self) -> Tensor:
        """The tensor it stands for, boolean or additive."""
        visible = self.visible()
        if self.dtype == torch.bool:
            return visible
        nothing = torch.zeros((), dtype=self.dtype, device=self.device)
        return torch.where(visible, nothing, torch.finfo(self.dtype).min)

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"DeferredMask{tuple(self.shape)}"

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func in _METADATA:
            return super().__torch_function__(func, types, args, kwargs or {})
        return func(*_plain(args), **_plain(kwargs or {}))

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        return func(*_plain(args), **_plain(kwargs or {}))


_METADATA = {
    Tensor.shape.__get__,  # type: ignore[attr-defined]
    Tensor.dtype.__get__,  # type: ignore[attr-defined]
    Tensor.device.__get__,  # type: ignore[attr-defined]
    Tensor.requires_grad.__get__,  # type: ignore[attr-defined]
    Tensor.is_cuda.__get__,  # type: ignore[attr-defined]
    Tensor.ndim.__get__,  # type: ignore[attr-defined]
    Tensor.dim,
    Tensor.size,
    Tensor.numel,
}


def _plain(value: Any) -> Any:
    if isinstance(value, DeferredMask):
        return value.materialise()
    if isinstance(value, tuple | list):
        return type(value)(_plain(item) for item in value)
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return value


def as_mask(mask: Tensor | Mask | None, queries: int, keys: int, causal: bool) -> Mask:
    """The mask of one attention call: None means causal when `causal` and there is more than one query, else full."""
    if mask is None:
        return CausalMask(keys) if causal and queries > 1 else FullMask(keys)
    if isinstance(mask, Mask):
        return mask
    if mask.dim() == 2:
        mask = mask[:, None, None, :].bool()
    if mask.dim() != 4:
        raise ValueError(
            f"attention mask must be [batch, heads|1, queries|1, keys], got {tuple(mask.shape)}"
        )
    return TensorMask(mask, keys)
