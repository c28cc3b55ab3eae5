"""Pre-training on facts and fine-tuning on questions, every run at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from regard.labs.filtering_storing.facts import Facts, Prompts


def loss(model: nn.Module, prompts: Prompts) -> Float[Tensor, " runs"]:
    """Mean cross-entropy of the token after each prompt, nats; prompts with several possible tokens count each equally."""
    logs = model(prompts.tokens).log_softmax(-1)
    return -logs.gather(-1, prompts.targets).mean((1, 2))


def pretrain(
    model: nn.Module,
    facts: Facts,
    *,
    steps: int,
    rate: float,
    noise: int = 0,
    seed: int = 0,
) -> Float[np.ndarray, "steps positions runs"]:
    """Adam on all facts at every step; the loss after the subject and after the template, by step.

    The two are next-token prediction on the sequences `s, r, a`: a subject occurs once with each of its templates. With
    `noise` distractors between s and r, new ones at every step, the template is predicted after the last of them.
    """
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.Adam(model.parameters(), lr=rate)
    losses = []
    for _ in range(steps):
        parts = torch.stack(
            [
                loss(model, facts.after_subject(noise, generator)),
                loss(model, facts.after_template(noise, generator)),
            ]
        )
        optimiser.zero_grad()
        parts.sum().backward()  # runs share no weights, so each sees the gradient of its own loss
        optimiser.step()
        losses.append(parts.detach())
    return torch.stack(losses).numpy()


def finetune(
    model: nn.Module,
    facts: Facts,
    count: int,
    rates: Sequence[float],
    *,
    optimiser: type[torch.optim.Optimizer] = torch.optim.SGD,
    **options: Any,
) -> Float[np.ndarray, "steps sides runs"]:
    """Trains on the questions of the first `count` subjects, a step for each of `rates`.

    Plain gradient descent by default. Adam scales every coordinate of its own, moves the output rows of all answers that it
    sees as fast as the trigger, and leaves untouched facts unanswered.

    Returns:
        Before each step, the loss on these questions and on those of all other subjects.
    """
    asked, others = facts.questions().first(count), facts.questions()
    others = Prompts(others.tokens[:, count:], others.targets[:, count:])
    parameters = [part for part in model.parameters() if part.requires_grad]
    moving, losses = optimiser(parameters, lr=1.0, **options), []  # type: ignore[call-arg]
    for rate in rates:
        for group in moving.param_groups:
            group["lr"] = rate
        own = loss(model, asked)
        with torch.no_grad():
            losses.append(torch.stack([own.detach(), loss(model, others)]))
        moving.zero_grad()
        own.sum().backward()
        moving.step()
    return torch.stack(losses).numpy()
