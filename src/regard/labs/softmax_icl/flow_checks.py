"""What the reduced flow is checked for: where one head ends, and the groups that several heads form."""

from __future__ import annotations

import numpy as np

from regard.labs.results import Check
from regard.labs.softmax_icl.theory import single_head


def one_head_checks(
    omega: np.ndarray, mu: np.ndarray, place: tuple[int, int, float]
) -> list[Check]:
    """The end of the reduced flow with one head, `[starts, 1]`."""
    alone = single_head(*place)
    return [
        Check(
            name,
            f"Reduced flow, 1 head: |{name}| at the end, mean over starts",
            float(np.abs(part).mean()),
            limit,
            tolerance=1e-3,
            why="1e-3: what is left of the flow",
        )
        for name, part, limit in (("omega", omega, alone[0]), ("mu", mu, alone[1]))
    ]


def group_checks(omega: np.ndarray, mu: np.ndarray, loss: np.ndarray) -> list[Check]:
    """Signs and sums of the reduced flow with several heads; heads count by their share of |mu|."""
    half_way = np.abs(loss.mean(1) - (loss[0].mean() + loss[-1].mean()) / 2).argmin()
    weight = np.abs(mu) / np.abs(mu).sum(-1, keepdims=True)
    agree = (weight * (omega * mu > 0)).sum(-1).mean(-1)
    size = np.abs(omega[-1])
    mean = (weight[-1] * size).sum(-1)
    spread = np.sqrt((weight[-1] * (size - mean[:, None]) ** 2).sum(-1)) / mean
    both = (omega[-1] > 0).any(1) & (omega[-1] < 0).any(1)
    sums = np.abs(mu[-1].sum(1)) / np.abs(mu[-1]).sum(1)
    early = omega[0] + mu[0]  # what grows first
    mixed = (early > 0).any(1) & (early < 0).any(1)
    return [
        Check(
            "signs early",
            "Reduced flow, 4 heads: share of |mu| with sign(omega) = sign(mu) when half of the loss is gone",
            float(agree[half_way]),
            0.95,
            why="active heads, soon after the start",
            sense=">",
        ),
        Check(
            "signs",
            "... at the end",
            float(agree[-1]),
            0.999,
            why="a statement about signs; a head of no weight may have either",
            sense=">",
        ),
        Check(
            "groups",
            "Reduced flow, 4 heads: share of starts with heads of both signs at the end",
            float(both.mean()),
            1.0,
            why="a statement about signs",
        ),
        Check(
            "mixed groups",
            "... of the starts where omega + mu has both signs",
            float(both[mixed].mean()),
            1.0,
            why="a statement about signs",
        ),
        Check(
            "mixed zero sum",
            "... and of those |sum mu| / sum |mu| at the end, the worst start",
            float(sums[mixed].max()),
            0.02,
            why="2 %: what is left of the flow",
            sense="<",
        ),
        Check(
            "zero sum",
            "Reduced flow, 4 heads: |sum mu| / sum |mu| at the end, mean over starts",
            float(sums.mean()),
            0.02,
            why="2 %: what is left of the flow",
            sense="<",
        ),
        Check(
            "equal",
            "Reduced flow, 4 heads: spread of |omega| over its mean at the end, mean over starts",
            float(spread.mean()),
            0.05,
            why="5 %: what is left of the flow",
            sense="<",
        ),
    ]
