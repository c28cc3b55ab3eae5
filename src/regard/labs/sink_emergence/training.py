"""Trains the runs of one architecture at once, each with its own rate, weight decay, data, mask and loss, and watches the sink.

AdamW (0.9, 0.95) with decay of all parameters, gradients of each run clipped at norm 1, a linear warm-up, then a constant rate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from regard._errors import InputError
from regard.labs.sink_emergence.arms import Arm
from regard.labs.sink_emergence.course import SHOWN, Course
from regard.labs.sink_emergence.data import Corpus, batch, probes
from regard.labs.sink_emergence.metric import (
    causal_mask,
    prefix_mask,
    proxy_weights,
    relative_importance,
    token_importance,
    window_mask,
)
from regard.labs.sink_emergence.models import Models, Size


@dataclass(frozen=True, slots=True)
class Recipe:
    """What all runs share.

    Attributes:
        size: of the models.
        context: tokens of a sequence, T.
        batch: sequences in a step.
        steps: optimiser steps.
        rate: learning rate of the default run.
        decay: weight decay of the default run.
        warmup: steps in which the rate grows to that.
        logged: steps after which the sink is measured.
        sequences: held-out sequences it is measured on.
        eps: importance above which a key is a sink.
    """

    size: Size
    context: int = 64
    batch: int = 8
    steps: int = 2000
    rate: float | int = 2e-3
    decay: float | int = 0.1
    warmup: int = 100
    logged: tuple[int, ...] = (0, 500, 1000, 2000)
    sequences: int = 100
    eps: float | int = 0.3


class AdamW:
    """AdamW for parameters whose first axis is the run, with a rate and a weight decay for each run."""

    def __init__(
        self,
        parameters: Sequence[Tensor],
        rates: Float[Tensor, "runs"],
        decays: Float[Tensor, "runs"],
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        clip: float = 1.0,
    ) -> None:
        self.parameters, self.rates, self.decays = list(parameters), rates, decays
        self.betas, self.eps, self.clip, self.count = betas, eps, clip, 0
        self.first = [torch.zeros_like(p) for p in self.parameters]
        self.second = [torch.zeros_like(p) for p in self.parameters]

    @torch.no_grad()
    def step(self, share: float = 1.0) -> None:
        """One step at `share` of the rates, and no gradients left."""
        self.count += 1
        one, two = self.betas
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        size = sum((g.flatten(1).square().sum(1) for g in gradients), torch.tensor(0.0)).sqrt()
        scale = (self.clip / (size + 1e-6)).clamp(max=1.0)
        rate = share * self.rates
        for p, m, v in zip(self.parameters, self.first, self.second, strict=True):
            if p.grad is None:
                continue
            shape = (-1, *[1] * (p.ndim - 1))
            g = p.grad.mul_(scale.view(shape))
            p.mul_((1 - rate * self.decays).view(shape))
            m.lerp_(g, 1 - one)
            v.mul_(two).addcmul_(g, g, value=1 - two)
            root = (v / (1 - two**self.count)).sqrt_().add_(self.eps)
            p.sub_((rate / (1 - one**self.count)).view(shape) * m / root)
            p.grad = None


def masks(arms: Sequence[Arm], length: int) -> Bool[Tensor, "runs length length"]:
    """Which keys each query sees, for each run."""
    found = []
    for arm in arms:
        mask = prefix_mask(length, arm.prefix) if arm.prefix else causal_mask(length)
        found.append(mask & window_mask(length, arm.window) if arm.window else mask)
    return torch.stack(found)


def losses(
    logits: Float[Tensor, "runs batch length vocabulary"],
    ids: Int[Tensor, "runs batch longer"],
    arms: Sequence[Arm],
) -> Float[Tensor, "runs"]:
    """Mean nats of the next token for each run; in a prefix nothing is asked before its last token."""
    asked = torch.stack([torch.arange(logits.shape[2]) >= max(arm.prefix - 1, 0) for arm in arms])
    nats = nn.functional.cross_entropy(
        logits.flatten(0, 2), ids[:, :, 1:].flatten(), reduction="none"
    ).view(logits.shape[:3])
    return (nats * asked[:, None]).sum((1, 2)) / (asked.sum(1) * logits.shape[1])


def train(arms: Sequence[Arm], seeds: Sequence[int], recipe: Recipe, text: Corpus) -> Course:
    """Trains every arm from every seed, all at once, and returns what was seen on the way.

    Raises:
        InputError: arms of different architectures.
    """
    kinds = {arm.architecture for arm in arms}
    if len(kinds) != 1:
        raise InputError(f"arms of one architecture train at once, got {sorted(kinds)}")
    attention, bias = kinds.pop()
    runs = [(arm, seed) for arm in arms for seed in seeds]
    each, of_run = [arm for arm, _ in runs], [seed for _, seed in runs]
    models = Models(
        of_run,
        recipe.size,
        text.vocabulary + 1,
        attention,
        bias,
        turned=[arm.turned for arm in each],
        carried=[arm.carried for arm in each],
    )
    optimiser = AdamW(
        list(models.parameters()),
        torch.tensor([recipe.rate * arm.rate for arm in each]),
        torch.tensor([recipe.decay if arm.decay is None else float(arm.decay) for arm in each]),
    )
    visible = masks(each, recipe.context)
    held = probes(text, each, recipe.sequences, recipe.context + 1, seed=10**6)
    seen = []
    for step in range(recipe.steps + 1):
        if step in recipe.logged:
            seen.append(look(models, held, visible, each, recipe.eps))
        if step == recipe.steps:
            break
        ids = batch(text, each, of_run, step, recipe.batch, recipe.context + 1)
        losses(models(ids[..., :-1], visible), ids, each).sum().backward()
        optimiser.step(min(1.0, (step + 1) / max(1, recipe.warmup)))
    stacked = {
        key: np.stack([one[key] for one in seen], 1).reshape(
            len(arms), len(seeds), len(seen), *seen[0][key].shape[1:]
        )
        for key in seen[0]
    }
    logged = np.array([step for step in recipe.logged if step <= recipe.steps])
    return Course([arm.name for arm in arms], list(seeds), logged, **stacked)


@torch.no_grad()
def look(
    models: Models,
    ids: Int[Tensor, "runs count longer"],
    visible: Bool[Tensor, "runs length length"],
    arms: Sequence[Arm],
    eps: float | int,
) -> dict[str, np.ndarray]:
    """What is measured on the way, one row a run: see `Course`."""
    extra = int(models.bias in ("token", "kv", "k"))
    totals: dict[str, list[Tensor]] = {}
    count = ids.shape[1]
    for part in ids.split(25, 1):
        kept: list[Tensor] = []
        logits = models(part[..., :-1], visible, kept)
        weights = proxy_weights(torch.stack(kept, 2))  # [runs, batch, layers, heads, T, keys]
        share = part.shape[1] / count
        own = weights[..., extra:]
        importance = token_importance(own, visible[:, None, None, None])
        above = (importance > eps).float().mean((1, 2, 3))
        found = {
            "loss": losses(logits, part, arms),
            "rates": 100 * above[:, :SHOWN],
            "importance": importance.mean((1, 2, 3))[:, :SHOWN],
            "learnt": torch.zeros(len(arms)),
            "relative": torch.zeros(len(arms)),
            "maps": thin(weights[:, :, 1:].mean((1, 2, 3)), extra),
        }
        if extra:
            found["learnt"] = 100 * (weights[..., 0].mean(-1) > eps).float().mean((1, 2, 3))
        for row, arm in enumerate(arms):
            if arm.window:
                oldest = relative_importance(own[row], arm.window)
                found["relative"][row] = 100 * (oldest > eps).float().mean()
        for key, value in found.items():
            totals.setdefault(key, []).append(share * value)
    whole = {key: torch.stack(parts).sum(0).numpy() for key, parts in totals.items()}
    tokens = min(32, models.embedding.shape[1])
    return whole | {"repeated": repeated_rate(models, tokens, ids.shape[-1] - 1, eps).numpy()}


@torch.no_grad()
def repeated_rate(
    models: Models, tokens: int, length: int, eps: float | int
) -> Float[Tensor, "runs"]:
    """Sink_1 of each run on sequences that repeat one token, over `tokens` different ones."""
    runs = models.embedding.shape[0]
    ids = torch.arange(tokens)[None, :, None].expand(runs, -1, length).contiguous()
    kept: list[Tensor] = []
    models(ids, causal_mask(length).expand(runs, -1, -1), kept)
    extra = kept[0].shape[-1] - length
    importance = token_importance(proxy_weights(torch.stack(kept, 2))[..., extra:])
    return 100 * (importance[..., 0] > eps).float().mean((1, 2, 3))


def thin(maps: Float[Tensor, "runs length keys"], extra: int) -> Float[Tensor, "runs rows columns"]:
    """Every second row of a map; of the keys a learnt one (zeros without one) and the first `SHOWN`."""
    learnt = maps[..., :1] if extra else torch.zeros_like(maps[..., :1])
    return torch.cat([learnt, maps[..., extra : extra + SHOWN]], -1)[:, 1::2]
