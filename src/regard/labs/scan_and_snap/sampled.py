"""The same model trained on sampled sequences."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from regard.labs.scan_and_snap.dynamics import (
    Classes,
)


@dataclass(frozen=True, slots=True)
class Sampled:
    """Training on sampled sequences; the first axis is runs.

    Attributes:
        attention: Z at the end, `[runs, rows, tokens]`.
        losses: `[runs, steps]`, nats.
    """

    attention: Float[np.ndarray, "runs rows tokens"]
    losses: Float[np.ndarray, "runs steps"]


def sample_gradient(
    decoder: Float[Tensor, "runs tokens tokens"],
    attention: Float[Tensor, "runs rows tokens"],
    seen: Float[Tensor, "runs batch tokens"],
    last: Int[Tensor, "runs batch"],
    label: Int[Tensor, "runs batch"],
) -> tuple[Float[Tensor, " runs"], tuple[Tensor, Tensor]]:
    """The mean loss of a batch, and the mean gradient of the log-likelihood with respect to Y and Z.

    `seen` counts each token before the last one: without positions a sequence is no more than that.
    """
    batch = seen.shape[1]
    mass = seen * attention[torch.arange(len(seen))[:, None], last].exp()
    unit = mass / mass.norm(dim=-1, keepdim=True)
    logs = (unit @ decoder.mT).log_softmax(-1)
    error = -logs.exp()
    error.scatter_add_(-1, label[..., None], torch.ones_like(error[..., :1]))
    back = error @ decoder
    pull = unit * (back - unit * (unit * back).sum(-1, keepdim=True))
    asked = torch.nn.functional.one_hot(last, attention.shape[1]).to(pull)
    loss = -logs.gather(-1, label[..., None]).mean((1, 2))
    return loss, (error.mT @ unit / batch, asked.mT @ pull / batch)


def train_sampled(
    classes: Classes,
    rate_decoder: Float[np.ndarray, " runs"],
    rate_attention: Float[np.ndarray, " runs"],
    *,
    length: int,
    batch: int,
    steps: int,
    momentum: float,
    seed: int,
) -> Sampled:
    """Stochastic gradient ascent on sequences of `length` tokens, the last of them the query, every run at once.

    Cost: O(steps x runs x (batch x tokens^2 + batch x length)).
    """
    generator = torch.Generator().manual_seed(seed)
    chance = torch.as_tensor(classes.probability)
    last, label = torch.as_tensor(classes.last), torch.as_tensor(classes.label)
    runs, (count, tokens) = len(rate_decoder), classes.probability.shape
    decoder = torch.zeros(runs, tokens, tokens, dtype=torch.float64)
    attention = torch.zeros(runs, classes.rows, tokens, dtype=torch.float64)
    pace = [torch.zeros_like(decoder), torch.zeros_like(attention)]
    eta = [torch.as_tensor(rate)[:, None, None] for rate in (rate_decoder, rate_attention)]
    losses = []
    for _ in range(steps):
        drawn = torch.randint(count, (runs, batch), generator=generator)
        tokens_ = torch.multinomial(chance[drawn.flatten()], length - 1, True, generator=generator)
        seen = torch.zeros(runs * batch, tokens, dtype=torch.float64)
        seen.scatter_add_(1, tokens_, torch.ones_like(tokens_, dtype=torch.float64))
        loss, gradients = sample_gradient(
            decoder, attention, seen.view(runs, batch, tokens), last[drawn], label[drawn]
        )
        losses.append(loss)
        for part, moving, gradient, rate in zip(
            (decoder, attention), pace, gradients, eta, strict=True
        ):
            moving.mul_(momentum).add_(gradient)
            part += rate * moving
    return Sampled(attention.numpy(), torch.stack(losses, 1).numpy())
