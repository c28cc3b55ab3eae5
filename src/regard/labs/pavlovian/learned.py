"""One-layer readers trained to predict outcomes of fresh cues, and the conditioning protocols as tests in context.

A stream has a few cues, each a random direction with a hidden strength w ~ N(0, 1). A trial shows one cue or two of them
together (their sum), and the outcome is the sum of the strengths. Asked about a single cue, a reader predicts its strength.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from regard.labs.pavlovian.capacity import random_codes
from regard.ops import delta_rule


@dataclass(frozen=True, slots=True)
class Streams:
    """Trials, and probes with their answers; the leading axes are runs and batch.

    Attributes:
        cues, outcomes: of the trials.
        probes, answers: single cues and their strengths.
    """

    cues: Float[Tensor, "runs batch trials dim"]
    outcomes: Float[Tensor, "runs batch trials"]
    probes: Float[Tensor, "runs batch probes dim"]
    answers: Float[Tensor, "runs batch probes"]


def draw_streams(
    runs: int, batch: int, *, trials: int, cues: int, dim: int, generator: torch.Generator
) -> Streams:
    """Random streams of `trials` trials over `cues` cues; half of the trials show two of them."""
    codes = random_codes(runs, batch, cues, dim, generator=generator).float()
    strengths = torch.randn(runs, batch, cues, generator=generator)
    shown = torch.rand(runs, batch, trials, cues, generator=generator).topk(2).indices
    present = torch.zeros(runs, batch, trials, cues).scatter_(-1, shown[..., :1], 1.0)
    pairs = (torch.rand(runs, batch, trials, 1, generator=generator) < 0.5).float()
    present = present.scatter_add(-1, shown[..., 1:], pairs)
    outcomes = (present @ strengths[..., None]).squeeze(-1)
    return Streams(present @ codes, outcomes, codes, strengths)


class Reader(nn.Module):
    """Base of the readers: keys and queries are linear in cues, outcomes are the values; runs are independent models.

    Args:
        runs: models side by side.
        dim: of cues and keys.
        generator: draws the projections.
    """

    def __init__(self, runs: int, dim: int, *, generator: torch.Generator) -> None:
        super().__init__()
        draw = lambda: torch.randn(runs, dim, dim, generator=generator) / dim**0.5  # noqa: E731
        self.key, self.query = nn.Parameter(draw()), nn.Parameter(draw())
        self.gain = nn.Parameter(torch.full((runs,), -1.0))

    def forward(
        self,
        cues: Float[Tensor, "runs batch trials dim"],
        outcomes: Float[Tensor, "runs batch trials"],
        probes: Float[Tensor, "runs batch probes dim"],
    ) -> Float[Tensor, "runs batch probes"]:
        """What each probe predicts after all trials."""
        keys, queries = cues @ self.key[:, None], probes @ self.query[:, None]
        return self.read(keys, outcomes, queries, self.gain[:, None, None])

    def read(self, keys: Tensor, outcomes: Tensor, queries: Tensor, gain: Tensor) -> Tensor:
        raise NotImplementedError


class HebbianReader(Reader):
    """Linear attention without normalisation: `e^g sum_t (q . k_t) v_t`."""

    def read(self, keys: Tensor, outcomes: Tensor, queries: Tensor, gain: Tensor) -> Tensor:
        return gain.exp() * ((queries @ keys.mT) @ outcomes[..., None]).squeeze(-1)


class DeltaReader(Reader):
    """DeltaNet's memory (`regard.ops.delta_rule`) with one learnt write strength `sigmoid(g)`, and keys of learnt length."""

    def read(self, keys: Tensor, outcomes: Tensor, queries: Tensor, gain: Tensor) -> Tensor:
        strength = gain.sigmoid().expand(outcomes.shape)
        _, memory = delta_rule(keys, keys, outcomes[..., None], strength)
        return (queries @ memory.mT).squeeze(-1)


class SoftmaxReader(Reader):
    """Softmax attention from the probe over the trials: `e^g sum_t softmax_t(q . k_t) v_t`."""

    def read(self, keys: Tensor, outcomes: Tensor, queries: Tensor, gain: Tensor) -> Tensor:
        weights = (queries @ keys.mT).softmax(-1)
        return gain.exp() * (weights @ outcomes[..., None]).squeeze(-1)


def train_reader(
    reader: Reader,
    *,
    steps: int,
    batch: int,
    trials: int,
    cues: int,
    rate: float,
    seed: int,
) -> Float[np.ndarray, "steps runs"]:
    """Adam on fresh streams at every step, the rate falling linearly; the mean squared error by step."""
    runs, dim = reader.key.shape[:2]
    generator, losses = torch.Generator().manual_seed(seed), []
    optimiser = torch.optim.Adam(reader.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min(1.0, 1.05 - step / steps)
    )
    for _ in range(steps):
        loss = prediction_error(
            reader,
            draw_streams(runs, batch, trials=trials, cues=cues, dim=dim, generator=generator),
        )
        optimiser.zero_grad()
        loss.sum().backward()  # runs share no weights
        for part in reader.parameters():  # clip each run by itself, so that runs stay independent
            assert part.grad is not None
            norms = part.grad.flatten(1).norm(dim=1) if part.grad.dim() > 1 else part.grad.abs()
            scale = (1 / norms.clamp_min(1.0)).view(-1, *[1] * (part.dim() - 1))
            part.grad.mul_(scale)
        optimiser.step()
        schedule.step()
        losses.append(loss.detach())
    return torch.stack(losses).numpy()


def prediction_error(reader: Reader, streams: Streams) -> Float[Tensor, " runs"]:
    """Mean squared error on the probes; predicting nothing has 1."""
    found = reader(streams.cues, streams.outcomes, streams.probes)
    return (found - streams.answers).square().mean((1, 2))


def least_squares_error(streams: Streams) -> Float[Tensor, " runs"]:
    """The error of the best linear predictor of a stream, the least solution of all that fit the trials: the floor.

    It is `X^+ y` with X the trials' cues, which also answers cues that were never shown alone.
    """
    solved = torch.linalg.pinv(streams.cues.double()) @ streams.outcomes.double()[..., None]
    found = (streams.probes.double() @ solved).squeeze(-1)
    return (found - streams.answers).square().mean((1, 2))


@torch.no_grad()
def conditioned_responses(
    reader: Reader, count: int, *, first: int = 8, second: int = 8, seed: int = 0
) -> dict[str, Float[Tensor, " runs"]]:
    """Protocols as tests in context, on `count` triples of fresh cues; what the probe predicts, mean over triples.

    Returns:
        `blocked` and `control` (B after A+ or C+, then AB+), `acquired` and `extinguished` (A after A+, and then A-),
        `shadowed` and `alone` (A after AB+, or after A+ as often).
    """
    runs, dim = reader.key.shape[:2]
    generator = torch.Generator().manual_seed(seed)
    a, b, c = random_codes(3, runs, count, dim, generator=generator).float()

    def ends(protocol: list[tuple[Tensor, float, int]], probe: Tensor) -> Tensor:
        cues = torch.stack([cue for cue, _, often in protocol for _ in range(often)], 2)
        values = [value for _, value, often in protocol for _ in range(often)]
        outcomes = torch.tensor(values).expand(runs, count, -1)
        return reader(cues, outcomes, probe[:, :, None])[..., 0].mean(1)

    together = a + b
    return {
        "blocked": ends([(a, 1.0, first), (together, 1.0, second)], b),
        "control": ends([(c, 1.0, first), (together, 1.0, second)], b),
        "acquired": ends([(a, 1.0, first)], a),
        "extinguished": ends([(a, 1.0, first), (a, 0.0, second)], a),
        "shadowed": ends([(together, 1.0, second)], a),
        "alone": ends([(a, 1.0, second)], a),
    }
