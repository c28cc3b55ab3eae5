"""How differently the heads of a layer attend: the Jensen-Shannon divergence between their rows.

    JSD(P, Q) = H((P + Q) / 2) - (H(P) + H(Q)) / 2          in nats: 0 for equal rows, ln 2 for rows that share no key

A pair of heads gets the mean over query rows. Source: used by Roy et al. 2020 (Routing Transformer, arXiv 2003.05997) to show
that heads of learned clusters look elsewhere than heads of a window.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from regard._errors import InputError
from regard.engine import Block
from regard.instruments.base import Instrument
from regard.instruments.results import HeadMeasure, SiteKey


class HeadDivergence(Instrument):
    """`[heads, heads]` for each site: the mean divergence between the rows of every pair of heads.

    `measures()` gives each head's mean divergence from the others of its layer. Cost: heads^2 / 2 entropies of each block;
    memory O(heads^2).

    >>> from regard.engine import AttentionCall, Pipeline, attend
    >>> divergence, zeros = HeadDivergence(), torch.zeros(1, 2, 4, 8)
    >>> _ = attend(AttentionCall.make(zeros, zeros, zeros), Pipeline([divergence]))  # both uniform
    >>> divergence.compute()["", 0]
    tensor([[0., 0.],
            [0., 0.]])
    """

    states = {"sum": "sum", "rows": "sum"}

    def weights(self, block: Block) -> None:
        found = pairwise_divergence(block.weights).double()
        if block.valid is not None:
            found = found * block.valid[:, None, None]
            rows = block.valid.sum()
        else:
            rows = torch.tensor(block.weights.shape[0] * len(block.rows), device=found.device)
        key = block.site.key
        self.accumulate("sum", key, found.sum((0, 3)) * block.share)
        self.accumulate("rows", key, rows.double() * block.share)

    def compute(self) -> dict[SiteKey, Float[Tensor, "heads heads"]]:
        return {
            key: (total / self.state["rows"][key]).float()
            for key, total in self.state["sum"].items()
        }

    def measures(self) -> dict[str, HeadMeasure]:
        values = {
            key: table.sum(-1) / max(len(table) - 1, 1) for key, table in self.compute().items()
        }
        name = "divergence from other heads"
        definition = (
            "mean over rows and the other heads of the layer of the Jensen-Shannon divergence"
        )
        return {name: HeadMeasure(name, "nats", values, {}, definition)}


def js_divergence_between_heads(
    maps: Float[Tensor, "batch heads queries keys"],
    valid: Bool[Tensor, "batch queries"] | None = None,
) -> Float[Tensor, "heads heads"]:
    """Mean divergence between heads whose maps are at hand, over the rows in which both heads attend at all.

    A head that attends nowhere for a query (a routing head whose clusters left the token out) has no row there. NaN for a pair
    without a common row.

    >>> js_divergence_between_heads(torch.tensor([[[[1.0, 0.0]], [[0.0, 1.0]]]]))[0, 1]
    tensor(0.6931)
    """
    there = maps.sum(-1) > 0.5
    if valid is not None:
        there = there & valid[:, None]
    both = there[:, :, None] & there[:, None]
    found = torch.where(both, pairwise_divergence(maps), 0)
    return found.sum((0, 3)) / both.sum((0, 3))


def pairwise_divergence(
    maps: Float[Tensor, "batch heads queries keys"],
) -> Float[Tensor, "batch heads heads queries"]:
    """The Jensen-Shannon divergence of every query's rows between every pair of heads, in float32 at least.

    Raises:
        InputError: no heads.
    """
    if maps.shape[1] == 0:
        raise InputError.of("maps", given=tuple(maps.shape), expected="with 1 head or more")
    maps = maps.to(torch.promote_types(maps.dtype, torch.float32))
    own = torch.special.entr(maps).sum(-1)
    heads = maps.shape[1]
    table = own.new_zeros(maps.shape[0], heads, heads, maps.shape[2])
    for head in range(heads - 1):
        others = maps[:, head + 1 :]
        mixed = torch.special.entr((maps[:, head, None] + others) / 2).sum(-1)
        found = (mixed - (own[:, head, None] + own[:, head + 1 :]) / 2).clamp_min(0)
        table[:, head, head + 1 :] = found
        table[:, head + 1 :, head] = found
    return table
