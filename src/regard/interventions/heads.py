"""Silence heads: replace what chosen heads write, in a live model.

One method per way of silencing. With `o_h` the output of head h before the output projection:

| method | the head | source |
|---|---|---|
| `ZeroHeads` | writes nothing, `o_h := 0` | Michel et al. 2019, arXiv 1905.10650 |
| `MeanHeads` | writes a constant, its mean output over a reference text | Wang et al. 2022, arXiv 2211.00593 |
| `UniformHeads` | attends evenly: scores := 0 at every visible key | Wu et al. 2024, arXiv 2404.15574 |
| `ParkOnSink` | attends to the first visible key only | Guo et al. 2024, arXiv 2410.13835 |

The first two leave the fused kernel in place and cost one pass over the head outputs; the other two run attention block by block.

Heads are query heads, also where several share a KV head. Each class takes heads in any form that `regard.coordinates.heads`
reads. With `each`, the rows of one batch get different heads: `ZeroHeads.each([[], ["L5H3"], ["L7H0"]])` compares the model with
itself in a single forward pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from regard._errors import InputError
from regard.coordinates import Head
from regard.coordinates import heads as parse_heads
from regard.engine import AttentionCall, Block, Method
from regard.interventions._places import SiteKey, head_grid

M = TypeVar("M", bound="HeadMethod")


class HeadMethod(Method):
    """Base of methods that act on chosen heads: knows which heads, in which batch rows, and when.

    Args:
        heads: the heads to act on, in every row of the batch.
        phase: "all", or "decode" to leave the prompt's pass alone and act only while tokens are generated.

    Attributes:
        variants: one tuple of heads for each equal share of the batch; a single one acts on every row.

    Raises:
        InputError: a head is outside the model (when attached, or at the layer's first call where the model does not say
            how many heads it has).
    """

    def __init__(self, heads: Any, *, phase: str = "all") -> None:
        if phase not in ("all", "decode"):
            raise InputError.of("phase", given=phase, expected="'all' or 'decode'")
        self.specs: tuple[Any, ...] = (heads,)
        self.phase = phase
        self.variants: tuple[tuple[Head, ...], ...] | None = None
        self._grid: dict[SiteKey, int] | None = None
        self._tables: dict[SiteKey, Tensor | None] = {}

    @classmethod
    def each(cls: type[M], variants: Sequence[Any], **settings: Any) -> M:
        """Acts on other heads in each share of the batch: `len(variants)` equal runs of consecutive rows."""
        method = cls((), **settings)
        method.choose(variants)
        return method

    def choose(self, variants: Sequence[Any]) -> None:
        """Sets the heads of each share of the batch anew; also while attached, between two forward passes."""
        if not variants:
            raise InputError(
                "variants must be at least one list of heads (an empty list acts on none), got none"
            )
        self.specs, self.variants = tuple(variants), None
        self._tables.clear()
        if self._grid is not None:
            self._resolve()

    def start(self, session: Any) -> None:
        self._grid = head_grid(session.stacks)
        self._resolve()

    def stop(self) -> None:
        self._grid = None
        self._tables.clear()

    def _resolve(self) -> None:
        self.variants = tuple(parse_heads(spec, grid=self._grid or None) for spec in self.specs)

    def mask(self, call: AttentionCall) -> Bool[Tensor, "rows heads"] | None:
        """`[batch, heads]` (`[1, heads]` when every row is the same), True where the method acts; None when nowhere."""
        if self.phase == "decode" and call.phase != "decode":
            return None
        if call.site.key not in self._tables:
            self._tables[call.site.key] = self._table(call)
        table = self._tables[call.site.key]
        if table is None or table.shape[0] == 1:
            return table
        rows = call.query.shape[0]
        if rows % table.shape[0]:
            raise InputError(
                f"a batch of {rows} rows cannot be shared evenly by {table.shape[0]} variants; "
                "repeat the batch once for each variant"
            )
        return table.repeat_interleave(rows // table.shape[0], 0)

    def _table(self, call: AttentionCall) -> Tensor | None:
        if self.variants is None:
            self._resolve()
        variants = self.variants or ()
        table = torch.zeros(len(variants), call.heads, dtype=torch.bool)
        for row, chosen in enumerate(variants):
            for head in chosen:
                if head.key == call.site.key:
                    if head.head >= call.heads:
                        raise InputError(
                            f"{head} is outside the model: {call.site} has heads 0..{call.heads - 1}"
                        )
                    table[row, head.head] = True
        return table.to(call.query.device) if bool(table.any()) else None

    def __repr__(self) -> str:
        if self.variants is None or len(self.variants) != 1:
            return f"{type(self).__name__}({len(self.specs)} variants, phase={self.phase!r})"
        names = ", ".join(map(str, self.variants[0]))
        return f"{type(self).__name__}([{names}], phase={self.phase!r})"


class ZeroHeads(HeadMethod):
    """The head writes nothing: its output before the output projection is 0.

    The same as a model whose output projection has zeros in the head's columns.

    >>> import torch
    >>> from regard.engine import AttentionCall, Pipeline, attend
    >>> x = torch.ones(1, 2, 3, 4)
    >>> attend(AttentionCall.make(x, x, x), Pipeline([ZeroHeads("L0H1")])).amax((0, 2, 3))
    tensor([1., 0.])
    """

    def heads(
        self, call: AttentionCall, output: Float[Tensor, "batch heads queries dim"]
    ) -> Float[Tensor, "batch heads queries dim"] | None:
        mask = self.mask(call)
        return None if mask is None else output.masked_fill(mask[:, :, None, None], 0)


class MeanHeads(HeadMethod):
    """The head writes the same at every token: its mean output over a reference text.

    Args:
        means: `[heads, dim]` for each `(stack, layer)`, as `mean_outputs` collects them.
    """

    def __init__(self, heads: Any, *, means: Mapping[SiteKey, Tensor], phase: str = "all") -> None:
        super().__init__(heads, phase=phase)
        self.means = dict(means)

    def heads(
        self, call: AttentionCall, output: Float[Tensor, "batch heads queries dim"]
    ) -> Float[Tensor, "batch heads queries dim"] | None:
        mask = self.mask(call)
        if mask is None:
            return None
        if call.site.key not in self.means:
            known = ", ".join(sorted({str(layer) for _, layer in self.means}, key=int))
            raise InputError(
                f"no mean outputs for {call.site}; the means cover layers {known or 'none'}"
            )
        mean = self.means[call.site.key].to(output.device, output.dtype)
        return torch.where(mask[:, :, None, None], mean[None, :, None, :], output)


class UniformHeads(HeadMethod):
    """The head attends evenly to all visible keys: its scores are 0 there (a learned sink keeps its own logit).

    >>> import torch
    >>> from regard.engine import AttentionCall, Pipeline, attend
    >>> q = torch.randn(1, 1, 4, 8)
    >>> values = torch.arange(4.0).view(1, 1, 4, 1)
    >>> attend(AttentionCall.make(q, q, values), Pipeline([UniformHeads("L0H0")])).flatten()
    tensor([0.0000, 0.5000, 1.0000, 1.5000])
    """

    def scores(self, block: Block) -> Float[Tensor, "batch heads rows keys"] | None:
        mask = self.mask(block.call)
        if mask is None:
            return None
        act = mask[:, :, None, None]
        return block.scores.masked_fill(act if block.visible is None else act & block.visible, 0)


class ParkOnSink(HeadMethod):
    """The head attends to the first key that each query sees, and to nothing else.

    >>> import torch
    >>> from regard.engine import AttentionCall, Pipeline, attend
    >>> q = torch.randn(1, 1, 4, 8)
    >>> values = torch.arange(1.0, 5).view(1, 1, 4, 1)
    >>> attend(AttentionCall.make(q, q, values), Pipeline([ParkOnSink("L0H0")])).flatten()
    tensor([1., 1., 1., 1.])
    """

    def weights(self, block: Block) -> Float[Tensor, "batch heads rows keys"] | None:
        mask = self.mask(block.call)
        if mask is None:
            return None
        keys = torch.arange(block.keys.start, block.keys.stop, device=block.weights.device)
        parked = (keys == block.first_key[..., None]).to(
            block.weights.dtype
        )  # [batch|1, rows, keys]
        return torch.where(mask[:, :, None, None], parked[:, None], block.weights)
