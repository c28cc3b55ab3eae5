"""Context extension by cheap fine-tuning: train at a longer length with sparse attention, run with full attention.

The recipe of LongLoRA (arXiv 2309.12307) and SinkLoRA (arXiv 2406.05678):

1. positions are interpolated, factor = ceil(new length / known length);
2. LoRA adapters on the attention projections, embeddings and norms in full;
3. next-token loss at the new length while a pattern replaces attention (`S2Attention`, `SFAttention`; None trains with full
   attention, the baseline); AdamW without decay, a constant rate after a linear warm-up, gradients clipped at norm 1;
4. evaluation with full attention.

How much of the gain of full attention a pattern keeps:

    recovery = (ppl_before - ppl_pattern) / (ppl_before - ppl_full).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from regard._errors import InputError
from regard.attach import Session
from regard.engine import Method
from regard.weights import Interpolation, lora, rope_interpolate
from regard.weights.lora import TARGETS

if TYPE_CHECKING:
    from peft import PeftModel

Watch = Callable[[Iterable[int]], Iterator[int]]


@dataclass(frozen=True, slots=True)
class Recipe:
    """What is trained and how; the defaults are the paper's.

    Attributes:
        steps: optimiser steps.
        rate: learning rate after the warm-up.
        warmup: steps in which the rate grows to that.
        batch: rows in a step.
        r: rank of the adapters.
        targets: linear layers with adapters.
        extra: pieces of the names of modules trained in full.
    """

    steps: int = 1000
    rate: float = 2e-5
    warmup: int = 20
    batch: int = 1
    r: int = 8
    targets: Sequence[str] = TARGETS
    extra: Sequence[str] = ("embed", "norm")


@dataclass(slots=True)
class Extended:
    """A model with a longer context.

    Attributes:
        model: the `peft` model, trained; it runs with full attention.
        losses: mean next-token loss of each step, in nats, under the pattern.
        interpolation: the change of its positions, still in force; None when the length was known already.
    """

    model: PeftModel
    losses: list[float]
    interpolation: Interpolation | None


def extend_context(
    model: nn.Module,
    rows: Int[Tensor, "rows length"],
    pattern: Method | None = None,
    recipe: Recipe | None = None,
    *,
    factor: float | int | None = None,
    seed: int = 0,
    watch: Watch = iter,
) -> Extended:
    """Fine-tunes a rotary model to the length of `rows`; the model itself gets the adapters and the new positions.

    Args:
        model: a transformers causal language model.
        rows: token ids without padding, all of the new length.
        pattern: the method that replaces attention while training; None for full attention.
        recipe: what is trained and how.
        factor: of the interpolation; None for ceil(length / `max_position_embeddings`).
        seed: of the adapters' start and the order of the rows.
        watch: wraps the steps, for a progress bar.

    Raises:
        InputError: `peft` is missing, a name of the recipe fits no module, or there are fewer rows than a batch.
        ModelError: positions need interpolation and are not rotary.

    Cost: `steps x batch` forward and backward passes at the new length.
    """
    recipe = recipe or Recipe()
    if factor is None:
        known = getattr(getattr(model, "config", None), "max_position_embeddings", rows.shape[1])
        factor = math.ceil(rows.shape[1] / known)
    change = rope_interpolate(model, factor) if factor > 1 else None
    try:
        torch.manual_seed(seed)
        adapted = lora(model, recipe.r, recipe.targets, extra=recipe.extra).train(model.training)
        losses = fine_tune(adapted, rows, pattern, recipe, seed=seed, watch=watch)
    except BaseException:
        if change is not None:
            change.undo()
        raise
    return Extended(adapted, losses, change)


def fine_tune(
    model: nn.Module,
    rows: Int[Tensor, "rows length"],
    pattern: Method | None,
    recipe: Recipe,
    *,
    seed: int = 0,
    watch: Watch = iter,
) -> list[float]:
    """Trains what requires a gradient on `rows` with next-token loss, attention replaced by `pattern`; the loss of each step.

    The rows are taken in a random order, all of them before any comes again.
    """
    if len(rows) < recipe.batch:
        raise InputError.of("rows", given=len(rows), expected=f"at least a batch of {recipe.batch}")
    chosen = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(chosen, lr=recipe.rate, weight_decay=0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / max(1, recipe.warmup))
    )
    order = _batches(len(rows), recipe.batch, torch.Generator().manual_seed(seed))
    training, losses = model.training, []
    model.train()
    try:
        with nullcontext() if pattern is None else Session(model, pattern):
            for _ in watch(range(recipe.steps)):
                batch = rows[next(order)]
                optimizer.zero_grad()
                loss = model(input_ids=batch, labels=batch).loss
                loss.backward()
                nn.utils.clip_grad_norm_(chosen, 1.0)
                optimizer.step()
                schedule.step()
                losses.append(float(loss.detach()))
    finally:
        model.train(training)
    return losses


def token_losses(
    model: nn.Module, rows: Int[Tensor, "rows length"], batch: int = 8
) -> Float[Tensor, "rows predicted"]:
    """The loss of every predicted token in nats, `[rows, length - 1]`, in eval mode and without gradients."""
    training, found = model.training, []
    model.eval()
    try:
        with torch.inference_mode():
            for part in rows.split(batch):
                logits = model(input_ids=part).logits[:, :-1].float()
                found.append(
                    nn.functional.cross_entropy(
                        logits.transpose(1, 2), part[:, 1:], reduction="none"
                    )
                )
    finally:
        model.train(training)
    return torch.cat(found)


def recovery(before: float, pattern: float, full: float) -> float:
    """The share of full attention's gain in perplexity that a pattern keeps: 1 as good as full, 0 no gain.

    >>> recovery(12.0, 9.0, 8.0)
    0.75
    """
    if not before > full:
        raise InputError(
            f"recovery needs a gain from full attention, got perplexity {before} before and {full} after; train longer"
        )
    return (before - pattern) / (before - full)


def _batches(rows: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Row numbers in batches, in a new random order each time round; what does not fill a batch is left for the next round."""
    while True:
        yield from torch.randperm(rows, generator=generator)[: rows // size * size].split(size)
