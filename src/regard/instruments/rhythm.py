"""The preplan-and-anchor rhythm of a response: where it opens a chunk, and which tokens it leans on afterwards.

Heads are split by their mean span over the response rows R,  d = 1/|R| sum_{t in R} sum_s A[t,s] (t - s): the lowest 30 % are
local, the highest 30 % global. Then, averaged over the heads of a group,

    WAAD_t  of the local heads: peaks mark tokens that open a chunk ("preplan")
    FAI_s   of the global heads: peaks mark tokens that later tokens look back at ("anchor")

Source: Attention Illuminates LLM Reasoning, arXiv 2510.13554. Receiver heads, the paper's comparison, are the heads whose column
means have the highest kurtosis. All of it comes from O(tokens) series; no map is kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from regard._errors import InputError
from regard.attach import Session
from regard.instruments.distance import WAAD, Distance
from regard.instruments.influence import FutureInfluence


def split_heads(
    span: Float[Tensor, "layers heads"], share: float = 0.3
) -> tuple[Bool[Tensor, "layers heads"], Bool[Tensor, "layers heads"]]:
    """Which heads are local (the lowest `share` by span) and which are global (the highest).

    >>> local, wide = split_heads(torch.arange(10.0).view(2, 5))
    >>> int(local.sum()), int(wide.sum()), bool((local & wide).any())
    (3, 3, False)
    """
    if not 0 < share <= 0.5:
        raise InputError.of("share", given=share, expected="in (0, 0.5]")
    known = span[~span.isnan()]
    count = max(1, round(share * known.numel()))
    ordered = known.sort().values
    return span <= ordered[count - 1], span >= ordered[-count]


def receiver_heads(
    columns: Float[Tensor, "layers heads tokens"], share: float = 0.1
) -> Bool[Tensor, "layers heads"]:
    """The `share` of the heads whose column means have the highest kurtosis over the tokens."""
    centred = columns - columns.mean(-1, keepdim=True)
    kurtosis = centred.pow(4).mean(-1) / centred.square().mean(-1).square().clamp_min(1e-30)
    count = max(1, round(share * kurtosis.numel()))
    return kurtosis >= kurtosis.flatten().sort().values[-count]


def peaks(values: Float[Tensor, " tokens"], quantile: float = 0.6) -> Int[Tensor, " peaks"]:
    """Local maxima above a quantile of the series (the ends do not count).

    >>> peaks(torch.tensor([0.0, 2.0, 1.0, 0.5, 3.0, 0.0])).tolist()
    [1, 4]
    """
    if len(values) < 3:
        return torch.zeros(0, dtype=torch.long)
    middle = values[1:-1]
    top = (middle >= values[:-2]) & (middle > values[2:]) & (middle > values.quantile(quantile))
    return top.nonzero()[:, 0] + 1


@dataclass(slots=True)
class Rhythm:
    """The series of one response, all `[response tokens]`.

    Attributes:
        waad: windowed distance of the local heads, at the token of the query.
        fai: future influence of the global heads.
        receiver: future influence of the receiver heads.
        entropy: entropy in nats of the distribution that each token was drawn from.
        local, wide: the heads of the two groups.
    """

    waad: Float[Tensor, " tokens"]
    fai: Float[Tensor, " tokens"]
    receiver: Float[Tensor, " tokens"]
    entropy: Float[Tensor, " tokens"]
    local: Bool[Tensor, "layers heads"]
    wide: Bool[Tensor, "layers heads"]


def read_rhythm(
    model: nn.Module,
    ids: Int[Tensor, " tokens"],
    start: int,
    *,
    window: int = 10,
    lo: int = 10,
    hi: int | None = None,
    share: float = 0.3,
) -> Rhythm:
    """The rhythm of the response `ids[start:]` to the prompt `ids[:start]`, from one observed forward pass.

    Args:
        window: W of WAAD.
        lo, hi: the horizon of FAI (analysis: 10 to the end; training: 10 to 100).
        share: of the heads in each group.

    Raises:
        InputError: a response of fewer than `lo + 2` tokens, or no prompt.
    """
    tokens = len(ids)
    if start < 1 or tokens - start < lo + 2:
        raise InputError(
            f"a rhythm needs a prompt and a response of at least {lo + 2} tokens, got {start} and {tokens - start}"
        )
    span, waad = Distance(from_query=start), WAAD(window)
    fai, column = FutureInfluence(lo, hi, start), FutureInfluence(0, None, start)
    with torch.inference_mode(), Session(model, span, waad, fai, column):
        logits: Any = model(input_ids=ids[None]).logits[0, start - 1 : -1].float()
    local, wide = split_heads(span.compute()["distance"].matrix(), share)
    influence = fai.compute().tensor()[..., start:]
    receivers = receiver_heads(column.compute().tensor()[..., start:])
    chosen = logits.log_softmax(-1)
    return Rhythm(
        waad.compute().tensor()[..., start:][local].mean(0),
        influence[wide].mean(0),
        influence[receivers].mean(0),
        -(chosen.exp() * chosen).sum(-1).cpu(),
        local,
        wide,
    )


@dataclass(frozen=True, slots=True)
class Coupling:
    """One statistic over all responses against chance: `lift` = observed / chance - 1, `p` from shuffled peaks."""

    observed: float
    chance: float
    p: float

    @property
    def lift(self) -> float:
        return self.observed / self.chance - 1 if self.chance else float("nan")


def coupling_report(
    rhythms: list[Rhythm], *, shuffles: int = 1000, after: int = 1, lo: int = 10, seed: int = 0
) -> dict[str, Coupling]:
    """The paper's three couplings, each against `shuffles` random placements of as many peaks.

    * "entropy at WAAD peaks": mean token entropy at the WAAD peaks;
    * "receiver and global": share of the global heads' FAI peaks that are FAI peaks of the receiver heads as well;
    * "anchor after preplan": share of WAAD peaks with an FAI peak at the same token or up to `after` tokens later.

    The last `lo` tokens of a response, whose FAI is 0, are left out. Shuffling draws peaks anew inside each response.
    """
    if not rhythms:
        raise InputError("no responses to compare; read at least one rhythm")
    generator = torch.Generator().manual_seed(seed)
    totals = {name: torch.zeros(shuffles + 1, 2, dtype=torch.float64) for name in NAMES}
    for rhythm in rhythms:
        size = len(rhythm.fai) - lo
        marks = {name: peaks(getattr(rhythm, name)[:size]) for name in ("waad", "fai", "receiver")}
        drawn = {
            name: torch.stack([_mask(at, size), *_shuffled(len(at), size, shuffles, generator)])
            for name, at in marks.items()
        }
        truth = {name: mask[:1].expand(shuffles + 1, -1) for name, mask in drawn.items()}
        entropy = rhythm.entropy[:size].double()
        near = torch.stack(
            [
                torch.nn.functional.pad(truth["fai"], (0, k))[:, k : k + size]
                for k in range(after + 1)
            ]
        ).any(0)
        _add(totals["entropy at WAAD peaks"], drawn["waad"] * entropy, drawn["waad"])
        _add(totals["receiver and global"], drawn["receiver"] & truth["fai"], truth["fai"])
        _add(totals["anchor after preplan"], drawn["waad"] & near, drawn["waad"])
    found = {}
    for name, table in totals.items():
        values = table[:, 0] / table[:, 1].clamp_min(1)
        beyond = int((values[1:] >= values[0]).sum())
        found[name] = Coupling(
            float(values[0]), float(values[1:].mean()), (1 + beyond) / (1 + shuffles)
        )
    return found


NAMES = ("entropy at WAAD peaks", "receiver and global", "anchor after preplan")


def _mask(positions: Tensor, size: int) -> Tensor:
    mask = torch.zeros(size, dtype=torch.bool)
    mask[positions] = True
    return mask


def _shuffled(count: int, size: int, shuffles: int, generator: torch.Generator) -> Tensor:
    order = torch.rand(shuffles, size, generator=generator).argsort(-1)
    return torch.zeros(shuffles, size, dtype=torch.bool).scatter_(1, order[:, :count], True)


def _add(total: Tensor, numerator: Tensor, denominator: Tensor) -> None:
    total[:, 0] += numerator.sum(-1)
    total[:, 1] += denominator.sum(-1)
