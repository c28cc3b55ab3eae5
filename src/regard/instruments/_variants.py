"""Per-token losses of a model with different heads silenced, many variants in one batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from regard._errors import InputError
from regard._progress import progress
from regard.attach import Session
from regard.attach.equality import check_finite
from regard.coordinates import Head
from regard.instruments._losses import evaluation_inputs, next_tokens
from regard.instruments._replay import Replay
from regard.instruments.outputs import MeanOutput, mean_outputs
from regard.interventions import MODES
from regard.interventions.heads import HeadMethod

BUDGET = 8192


@dataclass(slots=True)
class VariantLosses:
    """`base` `[batch, tokens - 1]` of the untouched model and `losses` `[variants, batch, tokens - 1]`, NaN at padding."""

    base: Float[Tensor, "batch next"]
    losses: Float[Tensor, "variants batch next"]

    @property
    def changes(self) -> Float[Tensor, "variants batch next"]:
        return self.losses - self.base

    @property
    def tokens(self) -> int:
        return int(torch.isfinite(self.base).sum())


def silencer(model: nn.Module, mode: str, means: Any = None) -> HeadMethod:
    """The method of `regard.ablate`'s `mode`, silencing nothing yet."""
    if mode not in MODES:
        raise InputError.unknown("mode", given=mode, known=MODES)
    if mode != "mean":
        return MODES[mode](())
    found = means.compute() if isinstance(means, MeanOutput) else means
    return MODES[mode]((), means=found if _is_means(found) else mean_outputs(model, found))


def _is_means(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(key, tuple) for key in value)


def variant_losses(
    model: nn.Module,
    text: Any,
    variants: Sequence[Sequence[Head]],
    *,
    mode: str = "zero",
    means: Any = None,
    window: int = 512,
    budget: int = BUDGET,
    together: bool = False,
    label: str = "Silencing heads",
) -> VariantLosses:
    """The loss of every token with each set of heads silenced, and with none.

    Args:
        text: as in `evaluation_inputs`; longer texts are cut into windows of `window` tokens.
        variants: sets of heads.
        budget: tokens in one forward pass, all variants counted.
        together: put sets that begin at different layers into one pass (fewer, longer passes).

    Cost: sets are sorted by their first layer l, and only blocks l and later run for them: on average half a forward pass for
    each set, plus the output layer.
    """
    inputs = evaluation_inputs(model, text, window)
    method = silencer(model, mode, means)
    rows, tokens = inputs["input_ids"].shape
    size = max(1, budget // tokens // 16)
    bases, found = [], []
    with (
        torch.inference_mode(),
        Session(model, method) as session,
        progress(len(variants) * -(-rows // size), label) as advance,
    ):
        for start in range(0, rows, size):
            part = {
                name: value[start : start + size] if value.shape[:1] == (rows,) else value
                for name, value in inputs.items()
            }
            method.choose([()])
            replay = Replay(model, part, session.stacks)
            check_finite(model, replay.base[next_tokens(replay.targets, replay.batch) >= 0])
            copies = max(1, budget // (tokens * replay.batch))
            losses = replay.base.new_empty(len(variants), *replay.base.shape)
            for skip, group in _groups(replay, variants, copies, together):
                method.choose([variants[i] for i in group])
                losses[torch.tensor(group)] = replay.losses(len(group), skip)
                advance(len(group))
            bases.append(replay.base.cpu())
            found.append(losses.cpu())
    return VariantLosses(torch.cat(bases), torch.cat(found, 1))


def _groups(
    replay: Replay, variants: Sequence[Sequence[Head]], copies: int, together: bool
) -> Iterator[tuple[int, list[int]]]:
    """`(blocks to skip, indices of variants)` of each forward pass."""
    first = [min((replay.place(*head.key) for head in heads), default=0) for heads in variants]
    order = sorted(range(len(variants)), key=first.__getitem__)
    while order:
        same = [i for i in order if together or first[i] == first[order[0]]][:copies]
        yield first[same[0]], same
        order = [i for i in order if i not in same]
