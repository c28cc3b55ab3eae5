"""A block of query rows against the keys they see, and what instruments ask of it.

Everything here is computed at most once per block and only when asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from regard.engine.call import AttentionCall, Site
from regard.engine.masks import CausalMask, Window

_OF_WEIGHTS = (
    "first_weight",
    "logsumexp",
    "entropy",
    "mean_key",
    "mass",
    "_received",
    "_diagonals",
)
FAINT = 1e-20
"""Weights below this are too near the smallest number to take the logarithm of."""


class Block:
    """Rows `rows` of one attention call over its keys `keys`.

    Attributes:
        call: the attention call.
        rows: `[rows]` query indices, ascending.
        keys: the slice of keys that any of the rows sees.
        scores: `[batch, heads, rows, keys]` before the softmax (hidden pairs hold the smallest finite number).
        weights: `[batch, heads, rows, keys]` after the softmax; a row sums to 1 (less with learned sinks).
        share: how many query rows each row stands for (1 when exact, 16 when one row in 16 was sampled).
    """

    def __init__(
        self,
        call: AttentionCall,
        rows: Tensor,
        window: Window,
        scores: Tensor,
        *,
        share: float = 1.0,
        contiguous: bool = True,
    ) -> None:
        self.call = call
        self.rows = rows
        self.window = window
        self.rescore: Callable[[], Tensor] | None = None
        self._scores: Tensor | None = scores
        self._weights: Tensor = scores
        self.share = share
        self.contiguous = contiguous
        self.plain = False  # weights == softmax(scores), nothing replaced
        self.padded: Tensor | None = (
            None  # storage of the weights with `padding` spare numbers in front
        )
        self.padding = 0
        self._first = int(rows[0])

    @property
    def scores(self) -> Float[Tensor, "batch heads rows keys"]:
        if self._scores is None:  # the entropy was computed in their place
            assert self.rescore is not None
            self._scores = self.rescore()
        return self._scores

    @scores.setter
    def scores(self, scores: Tensor) -> None:
        self._scores = scores

    @property
    def weights(self) -> Float[Tensor, "batch heads rows keys"]:
        return self._weights

    @weights.setter
    def weights(self, weights: Tensor) -> None:
        self._weights = weights
        for name in _OF_WEIGHTS:
            vars(self).pop(name, None)

    @property
    def site(self) -> Site:
        return self.call.site

    @property
    def keys(self) -> slice:
        return slice(self.window.lo, self.window.hi)

    @cached_property
    def positions(self) -> Tensor:
        """`[rows]`: the key slot of each query."""
        return self.rows + self.call.query_offset

    @cached_property
    def valid(self) -> Tensor | None:
        """`[batch, rows]`, False where the query is padding; None without padding."""
        return None if self.call.valid is None else self.call.valid[:, self.rows]

    @cached_property
    def visible(self) -> Tensor | None:
        """`[batch|1, heads|1, rows, keys]`, or None when the rows see the whole range."""
        return self.window.visible(len(self.rows), self.rows.device)

    @cached_property
    def counts(self) -> Float[Tensor, "batch rows"]:
        """How many keys each query sees (`[1, rows]` when it is the same for the whole batch)."""
        window, hidden = self.window, self.window.hidden
        if self._causal is not None:
            return (self.rows + (self._causal.offset + 1)).clamp(max=window.hi).float()[None]
        if hidden is None:
            width = float(window.hi - window.lo)
            return torch.full((1, len(self.rows)), width, device=self.rows.device)
        return ((~hidden).sum(-1) + (window.edge - window.lo)).float().amax(1)

    @cached_property
    def _causal(self) -> CausalMask | None:
        """The mask where each row sees every key up to its own position and no more, in every sequence."""
        return self.call.mask if isinstance(self.call.mask, CausalMask) else None

    @cached_property
    def first_key(self) -> Tensor:
        """`[batch|1, rows]`: the first key slot each query sees (0 without padding, packing or windows)."""
        if self._causal is not None or self.window.edge > self.window.lo or self.visible is None:
            return torch.full((1, len(self.rows)), self.window.lo, device=self.rows.device)
        return self.visible.any(1).to(torch.uint8).argmax(-1) + self.window.lo

    @cached_property
    def first_weight(self) -> Float[Tensor, "batch heads rows"]:
        """What each query gives to the first key it sees."""
        first = self.first_key
        if first.shape[0] == 1 and bool((first == self.window.lo).all()):
            return self.weights[..., 0]
        index = (first - self.window.lo)[:, None, :, None].expand(*self.weights.shape[:3], 1)
        return self.weights.gather(-1, index)[..., 0]

    @cached_property
    def logsumexp(self) -> Float[Tensor, "batch heads rows"]:
        """Log of the softmax denominator over the visible keys (a learned sink left out), exact to rounding."""
        if not self.plain:
            return torch.logsumexp(self.scores, -1)
        # score - ln(weight) is the same for every visible key: the first key or the query's own will mostly do
        weight = self.weights[..., 0]
        if bool((weight >= FAINT).all()):
            return self.scores[..., 0] - weight.log()
        own = (self.positions - self.window.lo).clamp(0, self.weights.shape[-1] - 1)
        own = own[:, None].expand(*self.weights.shape[:-1], 1)
        score, weight = (
            torch.stack([table[..., 0], table.gather(-1, own)[..., 0]])
            for table in (self.scores, self.weights)
        )
        weight, at = weight.max(0)
        if bool((weight < FAINT).any()):
            return self.scores.amax(-1) - self.weights.amax(-1).log()
        return score.gather(0, at[None])[0] - weight.log()

    @cached_property
    def entropy(self) -> Float[Tensor, "batch heads rows"]:
        """Shannon entropy of every row in nats: `logsumexp - sum_k weights * scores` for an ordinary softmax.

        One multiplication pass over the block, in the place of the scores where they can be computed again
        (`block.scores` then does so). With learned sinks, replaced weights or 16-bit input the definition
        `-sum w log w` is used instead (over the visible keys and, with learned sinks, the sink's share).
        """
        if self.plain:
            return (self.logsumexp - self._mean_score()).clamp_min(0)
        entropy = torch.special.entr(self.weights).sum(-1)
        if self.call.sinks is not None:
            entropy = entropy + torch.special.entr((1 - self.weights.sum(-1)).clamp(0, 1))
        return entropy

    def _mean_score(self) -> Tensor:
        if self.rescore is None:
            return (self.weights * self.scores).sum(-1)
        products = self.scores.mul_(self.weights)
        self._scores = None
        return products.sum(-1)

    def expect(self, columns: Float[Tensor, "keys"]) -> Float[Tensor, "batch heads rows"]:
        """The attention-weighted mean of one number per key slot of the whole call, `sum_k weights * columns[k]`."""
        weights = self.weights
        part = columns[self.keys].to(weights.dtype)
        return torch.mv(weights.reshape(-1, weights.shape[-1]), part).view(weights.shape[:-1])

    @cached_property
    def mean_key(self) -> Float[Tensor, "batch heads rows"]:
        """The attention-weighted mean key slot."""
        slots = torch.arange(self.call.keys, device=self.rows.device, dtype=self.weights.dtype)
        return self.expect(slots)

    def received(self) -> Float[Tensor, "batch heads keys"]:
        """Attention that each key of the range receives from the valid rows of this block (not yet times `share`)."""
        return self._received

    @cached_property
    def _received(self) -> Tensor:
        return self.row_sum(slice(0, len(self.rows)))

    def received_by_part(self, counts: list[int]) -> Float[Tensor, "parts batch heads keys"]:
        """`received()` of consecutive runs of rows, `counts[i]` rows each (they add up to the block's rows).

        One pass over the weights; `received()` is their sum afterwards and costs nothing more.
        """
        if len(counts) == 1:
            return self.received()[None]
        if len(counts) <= 8:
            starts = [sum(counts[:i]) for i in range(len(counts))]
            runs = zip(starts, counts, strict=True)
            parts = torch.stack([self.row_sum(slice(at, at + count)) for at, count in runs])
        else:
            device, rows = self.rows.device, len(self.rows)
            part = torch.repeat_interleave(torch.tensor(counts, device=device), output_size=rows)
            choose = self.weights.new_zeros(1, len(counts), rows)
            choose[:, part, torch.arange(rows, device=device)] = 1
            if self.valid is not None:
                choose = choose * self.valid[:, None]
            parts = torch.matmul(choose[:, None], self.weights).permute(2, 0, 1, 3)
        if "_received" not in vars(self):
            self._received = parts.sum(0)
        return parts

    @cached_property
    def mass(self) -> Float[Tensor, "batch heads rows"] | float:
        """What a row's weights sum to: 1.0 for an ordinary softmax, less with learned sinks or replaced weights."""
        return 1.0 if self.plain else self.weights.sum(-1)

    @cached_property
    def seen(self) -> Float[Tensor, "batch keys"]:
        """How many valid rows of this block see each key of the range (`[1, keys]` when it is the same for the batch)."""
        window, hidden, valid = self.window, self.window.hidden, self.valid
        if self._causal is not None and self.contiguous and valid is None:
            first, device = self._first + self._causal.offset, self.rows.device
            keys = torch.arange(window.lo, window.hi, device=device, dtype=torch.float32)
            return (first + len(self.rows) - keys.clamp_min(first))[None]
        rows = torch.full((1, 1), float(len(self.rows)), device=self.rows.device)
        if valid is not None:
            rows = valid.sum(-1, keepdim=True).float()
        if hidden is None:
            return rows.expand(-1, window.hi - window.lo)
        shown = (~hidden).any(1)
        if valid is not None:
            shown = shown & valid[:, :, None]
        tail = shown.sum(-2).float()
        batch = max(len(rows), len(tail))
        free = rows.expand(batch, window.edge - window.lo)
        return torch.cat([free, tail.expand(batch, -1)], dim=-1)

    def row_sum(self, part: slice) -> Float[Tensor, "batch heads keys"]:
        """Column sums over some of the block's rows, padding rows left out."""
        weights = self.weights[..., part, :]
        if self.valid is None:
            return weights.sum(-2)
        return torch.matmul(self.valid[:, None, None, part].to(weights.dtype), weights)[..., 0, :]

    def diagonals(self, width: int) -> Float[Tensor, "batch heads rows width"]:
        """Weight on the key `j` slots before the query, for `j = 0 .. width - 1`; 0 where there is no such key."""
        held = vars(self).get("_diagonals")
        if held is not None and held.shape[-1] >= width:
            return held[..., :width]
        self._diagonals = self._offsets(width)
        return self._diagonals

    def _offsets(self, width: int) -> Tensor:
        last = self._first + len(self.rows) - 1 + self.call.query_offset - self.window.lo
        if (
            self.padded is not None
            and self.contiguous
            and width <= self.padding
            and last < self.weights.shape[-1]
        ):
            return self._strided_diagonals(width)
        column = (
            self.positions[:, None]
            - torch.arange(width, device=self.rows.device)[None, :]
            - self.window.lo
        )
        inside = (column >= 0) & (column < self.weights.shape[-1])
        index = column.clamp(0, self.weights.shape[-1] - 1).expand(*self.weights.shape[:2], -1, -1)
        return self.weights.gather(-1, index).masked_fill_(~inside, 0)

    def _strided_diagonals(self, width: int) -> Tensor:
        """The same as a strided view: one key to the right for every row down."""
        weights = self.weights
        first = self._first + self.call.query_offset - self.window.lo - (width - 1)
        strides = (*weights.stride()[:2], weights.stride(2) + 1, 1)
        assert self.padded is not None
        view = self.padded.as_strided(
            (*weights.shape[:3], width), strides, weights.storage_offset() + first
        )
        view = view.flip(-1)
        if first < 0:
            row = torch.arange(len(self.rows), device=view.device)[:, None]
            outside = torch.arange(width, device=view.device)[None, :] > row + first + (width - 1)
            view = view.masked_fill_(outside, 0)
        return view
