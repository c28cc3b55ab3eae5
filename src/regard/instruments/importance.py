"""Head importance: the change of the loss when one head is silenced (Michel et al. 2019, arXiv 1905.10650).

    importance(h) = loss(model without h) - loss(model)      nats per token, on held-out text

Measured for every head, not estimated: all heads of a layer are silenced in one batch, each in its own copy of the text, and the
blocks before that layer run only once.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from regard.attach import anatomy
from regard.coordinates import Head
from regard.instruments._intervals import standard_error
from regard.instruments._variants import BUDGET, variant_losses
from regard.instruments.results import HeadMeasure, SiteKey
from regard.interventions._places import find_heads, head_grid

if TYPE_CHECKING:
    import polars
    from matplotlib.axes import Axes


@dataclass(slots=True)
class HeadImportance:
    """What each head is worth to the model on one text.

    Attributes:
        change: nats per token that the loss rises when the head is silenced (negative: the model is better without it); NaN for
            heads that were not asked for. `change.error` is the standard error over stretches of 32 tokens.
        loss: nats per token of the untouched model.
        tokens: how many predictions were averaged.
        mode: how heads were silenced.
        seconds: wall time.
        per_token: `{head: [batch, tokens - 1]}`, the change at every prediction (NaN at padding).
    """

    change: HeadMeasure
    loss: float
    tokens: int
    mode: str
    seconds: float
    per_token: dict[Head, Float[Tensor, "batch next"]]

    def __getitem__(self, head: Any) -> float:
        return self.change[head]

    def top(self, count: int = 10, *, largest: bool = True) -> list[tuple[Head, float]]:
        """The heads whose silencing hurts most (or least)."""
        return self.change.top(count, largest=largest)

    def sentence(self) -> str:
        """The finding in one line."""
        head, worst = self.top(1)[0]
        values = torch.tensor([value for _, value in self.change.items() if value == value])
        idle = int((values.abs() < 0.01).sum())
        return (
            f"Silencing {head} alone ({self.mode}) raises the loss by {worst:.3f} nats/token from {self.loss:.3f}; "
            f"{idle} of {len(values)} heads change it by less than 0.01."
        )

    def to_frame(self) -> polars.DataFrame:
        """Columns `stack, layer, head, measure, value, error` (needs the `frames` extra)."""
        return self.change.to_frame()

    def plot(self, ax: Axes | None = None, *, stack: str = "") -> Axes:
        """A layer x head heat map (needs the `plot` extra)."""
        return self.change.plot(ax, stack=stack)

    def __repr__(self) -> str:
        return f"HeadImportance({len(self.per_token)} heads, {self.tokens} tokens, {self.seconds:.0f} s): {self.sentence()}"


def head_importance(
    model: nn.Module,
    text: Any = None,
    heads: Any = None,
    mode: str = "zero",
    *,
    means: Any = None,
    window: int = 512,
    budget: int = BUDGET,
) -> HeadImportance:
    """How much the loss rises when each head is silenced, measured head by head.

    Args:
        model: a language model with `regard.attach`-able attention.
        text: held-out text, several texts, token ids or a dict of inputs; a long text is cut into windows of `window` tokens. By
            default 512 tokens of English.
        heads: coordinates; all heads when None.
        mode, means: as in `regard.ablate`.
        budget: tokens in one forward pass, all copies counted; lower it to save memory.

    Raises:
        InputError: a head is outside the model, or the text is empty or a single token.
        ModelError: the loss is not finite.

    Cost: about half a forward pass for each head (the blocks before the head's layer run once), O(budget) memory.
    """
    began = time.perf_counter()
    text = held_out(model, window) if text is None else text
    grid = head_grid(anatomy(model))
    chosen = find_heads(
        model,
        heads
        if heads is not None
        else [Head(n, h, s) for (s, n), c in grid.items() for h in range(c)],
    )
    found = variant_losses(
        model,
        text,
        [(head,) for head in chosen],
        mode=mode,
        means=means,
        window=window,
        budget=budget,
        label="Silencing one head at a time",
    )
    values: dict[SiteKey, Tensor] = {}
    errors: dict[SiteKey, Tensor] = {}
    for head, change in zip(chosen, found.changes, strict=True):
        values.setdefault(head.key, torch.full((grid[head.key],), float("nan")))[head.head] = (
            change.nanmean()
        )
        errors.setdefault(head.key, torch.full((grid[head.key],), float("nan")))[head.head] = (
            standard_error(change)
        )
    measure = HeadMeasure(
        "importance",
        "nats/token",
        values,
        errors,
        f"rise of the loss when the head is silenced ({mode})",
    )
    return HeadImportance(
        measure,
        float(found.base.nanmean()),
        found.tokens,
        mode,
        time.perf_counter() - began,
        dict(zip(chosen, found.changes, strict=True)),
    )


def held_out(model: nn.Module, tokens: int = 512) -> Tensor:
    """Token ids `[1, tokens]` of English prose that no default text shares a window with: the default evaluation text."""
    from regard.pretrained import tokenizer_of
    from regard.texts import prose

    encoded = tokenizer_of(model)(prose(tokens * 8, seed=11), return_tensors="pt", verbose=False)
    return encoded["input_ids"][:, :tokens]
