"""Training a masked-diffusion model; as a program, the training of the weights that ship with the package.

    python -m regard.models.language.training --out first/ --steps 3000 --stop 2000
    python -m regard.models.language.training --out weights/ --start first/ --steps 300 --learning-rate 0.0015 --seed 1

take about 13 minutes of one core: a long stage, cut at a quarter of its peak rate, and a short one down to nothing. The
matrices inside blocks are trained by Muon, the other parameters by AdamW; the noise levels of a batch are spread evenly over
(0.001, 1) from a random start, which leaves each of them uniform and takes noise out of the gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
import typer
from jaxtyping import Bool, Float, Int
from rich.console import Console
from torch import Tensor, nn

from regard._progress import track
from regard.models.language import char_tasks
from regard.models.language.char_tasks import Samples

if TYPE_CHECKING:
    from regard.models.language.masked_diffusion import MaskedDiffusionLM

SMALLEST = 1e-3
"""The lowest noise level; the loss divides by it."""


def noise_levels(batch: int, generator: torch.Generator) -> Float[Tensor, " batch"]:
    """One level t in (0.001, 1) for each sample: evenly spaced from a random start, in random order."""
    spread = (torch.rand(1, generator=generator) + torch.arange(batch) / batch) % 1
    return SMALLEST + (1 - SMALLEST) * spread[torch.randperm(batch, generator=generator)]


def hide(
    tokens: Int[Tensor, "batch sequence"],
    prompts: Int[Tensor, " batch"],
    levels: Float[Tensor, " batch"],
    mask: int,
    generator: torch.Generator,
) -> tuple[Int[Tensor, "batch sequence"], Bool[Tensor, "batch sequence"]]:
    """The tokens with each answer token masked with its sample's probability, and where that happened."""
    hidden = torch.rand(tokens.shape, generator=generator) < levels[:, None]
    hidden &= torch.arange(tokens.shape[1]) >= prompts[:, None]
    return tokens.masked_fill(hidden, mask), hidden


def diffusion_loss(
    logits: Float[Tensor, "batch sequence vocabulary"],
    tokens: Int[Tensor, "batch sequence"],
    hidden: Bool[Tensor, "batch sequence"],
    prompts: Int[Tensor, " batch"],
    levels: Float[Tensor, " batch"],
) -> Float[Tensor, ""]:
    """`1 / (t * L) * sum over hidden tokens of cross-entropy`, mean over samples; L counts the answer with its padding."""
    nats = nn.functional.cross_entropy(logits.transpose(1, 2), tokens, reduction="none")
    answer = tokens.shape[1] - prompts
    return ((nats * hidden).sum(1) / (levels * answer)).mean()


def fit(
    model: MaskedDiffusionLM,
    draw: Callable[[int, int], Samples],
    *,
    steps: int = 3000,
    batch: int = 32,
    learning_rate: float = 0.006,
    warmup: int = 50,
    stop: int | None = None,
    seed: int = 0,
    after_step: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Trains `model` in place and returns the loss of every step.

    Args:
        draw: `draw(count, seed)` gives `count` samples.
        learning_rate: of the matrices in blocks (Muon, scaled to AdamW's step size); embeddings, head and norms take 3 / 10
            of it. Both fall along a cosine over `steps`, to 2 %, after `warmup` steps.
        stop: end after this many steps, before the schedule does.
        after_step: called with the number of finished steps and the loss (checkpoints, logs).

    Cost: `steps` forward and backward passes; about 0.3 s each for the default model and batch on one core.
    """
    generator = torch.Generator().manual_seed(seed)
    inner = {id(p) for block in model.layers for p in block.parameters() if p.ndim == 2}
    groups = [[p for p in model.parameters() if (id(p) in inner) is side] for side in (True, False)]
    optimisers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(
            groups[0], lr=learning_rate, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(groups[1], lr=0.3 * learning_rate, weight_decay=0.1, betas=(0.9, 0.95)),
    ]

    def factor(step: int) -> float:
        return min(1, (step + 1) / warmup) * max(0.02, 0.5 + 0.5 * math.cos(math.pi * step / steps))

    schedules = [torch.optim.lr_scheduler.LambdaLR(o, factor) for o in optimisers]
    model.train()
    losses = []
    for step in track(range(steps if stop is None else stop), "Training"):
        samples = draw(batch, seed * 1_000_003 + step)
        levels = noise_levels(batch, generator)
        noisy, hidden = hide(
            samples.tokens, samples.prompts, levels, model.config.mask_token_id, generator
        )
        loss = diffusion_loss(model(noisy), samples.tokens, hidden, samples.prompts, levels)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimiser, schedule in zip(optimisers, schedules, strict=True):
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            schedule.step()
        losses.append(loss.item())
        if after_step is not None:
            after_step(step + 1, losses[-1])
    model.eval()
    return losses


def main(
    out: Annotated[Path, typer.Option(help="directory for config.json and model.safetensors")],
    steps: Annotated[int, typer.Option(help="optimiser steps of the schedule")] = 3000,
    stop: Annotated[int | None, typer.Option(help="end after this many steps")] = None,
    start: Annotated[Path | None, typer.Option(help="go on from the model saved here")] = None,
    learning_rate: Annotated[float, typer.Option(help="peak, of the blocks' matrices")] = 0.006,
    seed: Annotated[int, typer.Option(help="seed of initialisation and data")] = 0,
) -> None:
    """Train the small masked-diffusion model on strings and prose, and save it in half precision every 100 steps."""
    from regard.models.language.masked_diffusion import MaskedDiffusionLM

    torch.manual_seed(seed)
    model = MaskedDiffusionLM() if start is None else MaskedDiffusionLM.from_pretrained(start)
    console, recent = Console(), []

    def report(step: int, loss: float) -> None:
        recent.append(loss)
        if step % 100 == 0:
            console.print(f"step {step}: loss {sum(recent[-100:]) / 100:.3f}")
            model.save(out, dtype=torch.float16)

    fit(
        model,
        char_tasks.mixed_samples,
        steps=steps,
        stop=stop,
        learning_rate=learning_rate,
        seed=seed,
        after_step=report,
    )
    model.save(out, dtype=torch.float16)


if __name__ == "__main__":
    typer.run(main)
