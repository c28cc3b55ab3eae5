"""How a budget is divided over layers and heads.

| rule | a head's slots | asked |
|---|---|---|
| `Uniform` | the same for all | layer by layer |
| `Pyramid` | fall linearly from the first layer to the last | layer by layer |
| `Ada` | what the best-scored slots of the layer's heads together give it | layer by layer |
| `CakePreference` | as dispersed and changeable as the layer's attention is | again after each layer |
| `Global` | what the best-scored slots of all layers and heads together give it | after the last layer |
| `Calibrated` | its share in a profile made once per model (`regard.cache.calibrate`) | layer by layer |

Every rule hands out `tokens x KV heads x layers` slots in all, up to what there is to keep.

Sources: PyramidKV (arXiv 2406.02069), Ada-KV (arXiv 2407.11550), CAKE (arXiv 2503.12491), KVzip (arXiv 2505.23416) for
the global rule. Cost: a sort of the scores at most.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from regard._errors import InputError
from regard.cache.budget import Budget, Room
from regard.cache.calibration import Calibration
from regard.ops.budgets import allocate_layer_budgets, pyramid_budgets
from regard.ops.eviction import layer_preference

Scores = Sequence[Float[Tensor, "batch _kv_heads _held"]]  # layers hold different numbers
Counts = list[Int[Tensor, "batch _kv_heads"]]


@dataclass(frozen=True)
class Uniform(Budget):
    """The same number of slots for every KV head of every layer."""

    def counts(self, scores: Scores, room: Room) -> Counts:
        return [_every_head(room.tokens, score) for score in scores]


@dataclass(frozen=True)
class Pyramid(Budget):
    """PyramidKV: more slots for the lower layers, in an arithmetic series.

    Beside the protected slots (the window and the sinks), layer l of L gets

        most - l (most - least) / (L - 1),   least = mean / beta,   most = 2 mean - least,

    and where `most` exceeds what there is to keep, `most` is that and `least` is lowered so that the mean stays.

    Args:
        size: as for every budget.
        beta: steepness, at least 1 (then all layers are alike).
    """

    beta: float = 20.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beta < 1:
            raise InputError.of("beta", given=self.beta, expected="at least 1")

    def counts(self, scores: Scores, room: Room) -> Counts:
        return [
            torch.stack([self._row(score, room, i, b) for b in range(len(score))])
            for i, score in enumerate(scores)
        ]

    def _row(self, score: Tensor, room: Room, i: int, b: int) -> Tensor:
        layer, kept = room.layers[i], int(room.protected[i][b].max())
        mean, most = int(room.tokens[b]) - kept, int(layer.real[b]) - kept
        slots = pyramid_budgets(room.total, max(0, mean), max(0, most), self.beta)
        # rounding the running total keeps the sum over layers exact
        ends = slots.cumsum(0).round().long()
        place = min(_rank(room, i), room.total - 1)
        own = ends[place] - (ends[place - 1] if place else 0)
        return (own + kept).expand(score.shape[1])


@dataclass(frozen=True)
class Ada(Budget):
    """Ada-KV: a layer's slots go to its best-scored keys, whichever head they are in.

    Args:
        size: as for every budget.
        floor: share of an even budget that every head keeps in any case.
    """

    floor: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.floor <= 1:
            raise InputError.of("floor", given=self.floor, expected="a share in [0, 1]")

    def counts(self, scores: Scores, room: Room) -> Counts:
        found = []
        for score in scores:
            least = (room.tokens * self.floor).long().to(score.device)
            found.append(best_anywhere([score], room.tokens * score.shape[1], least)[0])
        return found


@dataclass(frozen=True)
class Global(Budget):
    """One ranking over all layers and heads: the best-scored keys of the whole cache stay.

    It takes scores that mean the same in every layer and head, as attention and shares of it do.
    """

    scope: ClassVar[Literal["layer", "cascade", "model"]] = "model"

    def counts(self, scores: Scores, room: Room) -> Counts:
        total = room.tokens * sum(score.shape[1] for score in scores)
        return best_anywhere(scores, total, torch.zeros_like(room.tokens))


@dataclass(frozen=True)
class CakePreference(Budget):
    """CAKE: layers whose attention is spread out and changes a lot keep more; re-divided after each layer of a prefill.

    A layer's preference is `dispersion^(1/tau1) * shift^(1/tau2)` of the scorer's observation window. After layer m the slots of
    all layers are divided over layers 0..m, and all of them are evicted from again, so that memory during the prefill stays
    within the budget and one layer. A layer's share only falls as layers are added, and scores stay with their keys, so what is
    kept in the end is what one selection after the last layer would keep.

    Args:
        size: as for every budget.
        tau: `(tau1, tau2)`. The authors' tuned pairs lie between 0.4 and 2.3, by model and budget.

    Raises:
        InputError: the cache's scorer does not measure dispersion and shift (`regard.cache.scorers.CAKE` does).
    """

    scope: ClassVar[Literal["layer", "cascade", "model"]] = "cascade"
    tau: tuple[float, float] = (1.0, 1.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.tau) != 2 or min(self.tau) <= 0:
            raise InputError.of("tau", given=self.tau, expected="two numbers above 0")

    def counts(self, scores: Scores, room: Room) -> Counts:
        if any("dispersion" not in layer.memory for layer in room.layers):
            raise InputError(
                "CakePreference needs a scorer that measures dispersion and shift: regard.cache.scorers.CAKE (gamma=0.0 makes "
                "its score SnapKV's)"
            )
        if room.decoding:  # every layer keeps the share that the prompt gave it
            return [
                _every_head(
                    (room.tokens * layer.memory.get("share", torch.ones(1))).round().long(), score
                )
                for layer, score in zip(room.layers, scores, strict=True)
            ]
        preference = layer_preference(
            torch.stack([layer.memory["dispersion"] for layer in room.layers]),
            torch.stack([layer.memory["shift"] for layer in room.layers]),
            self.tau,
        )
        found = torch.stack(
            [self._row(preference[:, b].cpu(), room, b) for b in range(len(room.tokens))], 1
        )
        for layer, slots in zip(room.layers, found, strict=True):
            layer.memory["share"] = slots / room.tokens
        return [_every_head(slots, score) for slots, score in zip(found, scores, strict=True)]

    def _row(self, preference: Tensor, room: Room, b: int) -> Tensor:
        """The slots of every layer for one row, protected ones included."""
        kept = torch.stack([own[b].max() for own in room.protected])
        seen = torch.stack([layer.real[b] for layer in room.layers])
        total = (int(room.tokens[b]) - int(kept[-1])) * room.total
        return kept + allocate_layer_budgets(preference, max(0, total), (seen - kept).clamp_min(0))


@dataclass(frozen=True)
class Calibrated(Budget):
    """Each head's share of the budget comes from a profile that was made once for the model.

    Which heads need much is a property of the model rather than of the text, so a profile from one plain text serves others.

    Args:
        size: as for every budget.
        calibration: from `regard.cache.calibrate` or `Calibration.load`.
        least: slots every head keeps, sinks included, before the rest is divided.

    Raises:
        InputError: a calibration that was made for a model with other layers or heads.
    """

    calibration: Calibration | None = None
    least: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.calibration, Calibration):
            raise InputError.of(
                "calibration",
                given=self.calibration,
                expected="a Calibration",
                fix="make one with regard.cache.calibrate(model, texts)",
            )
        if self.least < 0:
            raise InputError.of("least", given=self.least, expected="a whole number >= 0")

    def counts(self, scores: Scores, room: Room) -> Counts:
        assert self.calibration is not None
        shares = self.calibration.shares_at
        found = [torch.zeros(score.shape[:2], dtype=torch.long) for score in scores]
        layers, heads = self.calibration.layers, self.calibration.kv_heads
        if room.total != layers or any(score.shape[1] != heads for score in scores):
            raise InputError(
                f"this calibration is for {layers} layers with {heads} KV heads, the model has {room.total} with "
                f"{scores[0].shape[1]}; make one with regard.cache.calibrate(model, texts)"
            )
        for b, tokens in enumerate(room.tokens.tolist()):
            seen = max(1, int(room.layers[-1].real[b]))
            wanted = shares(tokens / seen)
            slots = divide(wanted * seen, tokens * wanted.numel(), self.least, seen)
            for i, own in enumerate(found):
                own[b] = slots[_rank(room, i)]
        return found


def best_anywhere(
    scores: Scores, total: Int[Tensor, " batch"], least: Int[Tensor, " batch"]
) -> Counts:
    """How many of the `total` best-scored slots of each row lie in each head, where every head keeps its `least` best ones.

    Slots at -inf are never counted.

    >>> best_anywhere([torch.tensor([[[5.0, 1.0, 2.0], [4.0, 3.0, 0.0]]])], torch.tensor([3]), torch.tensor([0]))
    [tensor([[1, 2]])]
    """
    lifted = [_lift_best(score, least) for score in scores]
    flat = torch.cat([score.flatten(1) for score in lifted], 1)
    ranked = flat.argsort(dim=-1, descending=True, stable=True)
    chosen = torch.zeros_like(flat, dtype=torch.bool)
    wanted = torch.arange(flat.shape[1], device=flat.device) < total.to(flat.device)[:, None]
    chosen.scatter_(1, ranked, wanted)
    chosen &= flat > -math.inf
    parts = chosen.split([score[0].numel() for score in scores], 1)
    return [part.view_as(score).sum(-1) for part, score in zip(parts, scores, strict=True)]


def _lift_best(score: Tensor, least: Tensor) -> Tensor:
    """+inf at the `least` best slots of every head."""
    if not bool((least > 0).any()):
        return score
    order = score.argsort(dim=-1, descending=True, stable=True)
    ranks = torch.empty_like(order)
    ranks.scatter_(-1, order, torch.arange(score.shape[-1], device=score.device).expand_as(order))
    lifted = (ranks < least.to(score.device)[:, None, None]) & (score > -math.inf)
    return score.masked_fill(lifted, math.inf)


def divide(
    wanted: Float[Tensor, "layers heads"], total: int, least: int, most: int
) -> Int[Tensor, "layers heads"]:
    """Whole slots in proportion to `wanted`, between `least` and `most` each, `total` in all as far as these allow.

    >>> divide(torch.tensor([[0.0, 6.0]]), 8, least=2, most=5)
    tensor([[3, 5]])
    """
    least = min(least, total // wanted.numel(), most)
    rest = allocate_layer_budgets(
        (wanted - least).clamp_min(0).flatten(), total - least * wanted.numel(), most - least
    )
    return (rest + least).view_as(wanted)


def _every_head(slots: Tensor, score: Tensor) -> Tensor:
    return slots[:, None].expand(-1, score.shape[1])


def _rank(room: Room, i: int) -> int:
    """The place of `room.layers[i]` among the layers that the budget is for."""
    return room.layers[i].index
