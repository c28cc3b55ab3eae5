"""How much each head writes: the norm of its output before and after the output projection.

    before(h) = mean over tokens of ||o_h||          after(h) = mean over tokens of ||W_h o_h||

where W_h `[hidden, dim]` are the columns of the output projection that belong to head h, so that W_h o_h is what the head
adds to the residual stream. A head that writes much less than the other heads of its layer does little, wherever it looks.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from regard.engine import AttentionCall
from regard.instruments.base import HeadMeasure, RowInstrument, SiteKey

BEFORE = "mean over tokens of the norm of the head's output, before the output projection"
AFTER = "mean over tokens of the norm of what the head adds to the residual stream"
PART = 512
"""Rows whose products are held at once."""
RELATIVE = "norm of what the head adds to the stream over the median head of its layer"


def head_factors(
    weight: Float[Tensor, "hidden width"], heads: int
) -> Float[Tensor, "heads rank dim"]:
    """R_h with `||R_h o|| = ||W_h o||` for every o, from the QR factors of each head's columns of an output projection.

    Norms of `[tokens, dim]` outputs then cost dim x dim instead of hidden x dim products for each token.
    """
    slices = weight.unflatten(1, (heads, -1)).movedim(1, 0)  # [heads, hidden, dim]
    return torch.linalg.qr(slices.float() if slices.dtype != torch.float64 else slices, mode="r").R


def projection_weight(module: nn.Module | None) -> Tensor | None:
    """`[hidden, width]` of a linear output projection (also transformers' Conv1D); None for any other module."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2 or not weight.is_floating_point():
        return None
    return weight.T if hasattr(module, "nf") else weight


class HeadOutputNorms(RowInstrument):
    """Mean norm of every head's output, before and after the output projection, and relative to the layer's median head.

    Padding tokens are left out. `after` and `relative` are NaN in layers whose output projection is not a plain linear layer over
    all heads. Where rows are sampled for other methods, the norms are those of the same rows. Keeps the fused kernel; cost: one
    dim x dim product for each head and token read; memory O(heads x dim x dim).

    >>> import torch
    >>> from regard.engine import AttentionCall, Pipeline, attend
    >>> norms, x = HeadOutputNorms(), torch.ones(1, 2, 3, 4)
    >>> _ = attend(AttentionCall.make(x, x, x), Pipeline([norms]))
    >>> norms.compute()["output norm"]["L0H1"]
    2.0
    """

    quantities = {"output norm": ("norm", BEFORE), "write norm": ("norm", AFTER)}

    def __init__(self) -> None:
        super().__init__()
        self._projections: dict[int, nn.Module | None] = {}
        self._factors: dict[SiteKey, Tensor | None] = {}

    def start(self, session: Any) -> None:
        super().start(session)
        for stack in session.stacks:
            for block in stack.blocks:
                if block.attention is not None:
                    for module in block.attention.modules():
                        self._projections[id(module)] = block.output_projection

    def stop(self) -> None:
        super().stop()
        self._projections.clear()
        self._factors.clear()

    def heads(self, call: AttentionCall, output: Float[Tensor, "batch heads queries dim"]) -> None:
        held, valid = output.detach(), call.valid
        if call.rows is not None:
            held = held[:, :, call.rows]
            valid = None if valid is None else valid[:, call.rows]
        held = held if held.dtype == torch.float64 else held.float()
        norms = {"output norm": [(held.norm(dim=-1), valid)]}
        factors = self._factor(call, held)
        if factors is not None:
            written = [torch.matmul(part, factors.mT).norm(dim=-1) for part in held.split(PART, 2)]
            norms["write norm"] = [(torch.cat(written, -1), valid)]
        self.reduce(call.site.key, norms, call.queries / held.shape[2])

    def _factor(self, call: AttentionCall, output: Tensor) -> Tensor | None:
        if call.site.key not in self._factors:
            weight = projection_weight(self._projections.get(id(call.module)))
            fits = weight is not None and weight.shape[1] == call.heads * output.shape[-1]
            found = (
                head_factors(weight.detach(), call.heads) if weight is not None and fits else None
            )
            self._factors[call.site.key] = None if found is None else found.to(output)
        return self._factors[call.site.key]

    def compute(self) -> dict[str, HeadMeasure]:
        """`output norm` (before the projection), `write norm` (after it) and `relative write norm`."""
        before, after = self.mean("output norm"), self.mean("write norm")
        relative = HeadMeasure("relative write norm", "ratio", {}, {}, RELATIVE)
        for key, values in before.values.items():
            written = after.values.setdefault(key, torch.full_like(values, float("nan")))
            relative.values[key] = written / written.quantile(0.5)
        after.values = {key: after.values[key] for key in before.values}
        return {measure.name: measure for measure in (before, after, relative)}
