"""The experiment: walks of untrained models, choices between sums of random vectors, and two tasks that ask more and less of
attention."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from regard.attach import attach
from regard.instruments.walk import Walk, record_walk
from regard.labs.embedding_walk.aggregation import UniformWeights
from regard.labs.embedding_walk.concepts import choose
from regard.labs.embedding_walk.theory import bag_nats
from regard.labs.tasks import IGNORED, Samples, Task
from regard.labs.training import train
from regard.nn import LanguageModel, LanguageModelConfig

SYMBOLS = 6
KEYS, VALUES, PAIRS = 8, 8, 5
FIRST_PAIR, FIRST_KEY, FIRST_VALUE = 0, KEYS * VALUES, KEYS * VALUES + KEYS


def untrained_walks(
    width: int, layers: int, heads: int, tokens: int, seeds: int, seed: int
) -> list[Walk]:
    """Walks of random tokens through models as initialised, one model a seed."""
    found = []
    for index in range(seeds):
        torch.manual_seed(seed + index)
        config = LanguageModelConfig(
            vocab_size=256,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            mixers=["softmax"],
        )
        model = LanguageModel(config).eval()
        found.append(record_walk(model, torch.randint(256, (4, tokens))))
    return found


def displacements(
    walk: Walk,
) -> tuple[Float[np.ndarray, "tokens steps"], Float[np.ndarray, "tokens steps"]]:
    """For every token the length of each step (attention, MLP, attention, ..), and how far from its start it is after it."""
    steps = walk.steps().flatten(1, 2).double()
    return steps.norm(dim=-1).T.numpy(), steps.cumsum(0).norm(dim=-1).T.numpy()


def measured_choices(
    weights: Float[np.ndarray, " words"],
    dimension: int,
    choice_words: int,
    trials: int,
    generator: torch.Generator,
    *,
    choices: int = 4,
    sink: float | int = 0.0,
) -> tuple[float, float]:
    """Share of items whose right choice scores highest, and half of its 95 % interval.

    Context and choices are sums of independent random words; the first word of the right choice is one of the context's. A sink
    is one direction of norm `sink` at the front of every text, of the context's mean weight.
    """
    kind = {"generator": generator, "dtype": torch.float64}
    shares = torch.as_tensor(weights)
    right, left = 0, trials
    while left > 0:
        count = min(left, 2000)
        context = torch.randn(count, len(shares), dimension, **kind) / math.sqrt(dimension)
        words = torch.randn(count, choices, choice_words, dimension, **kind) / math.sqrt(dimension)
        place = torch.randint(len(shares), (count,), generator=generator)
        words[:, 0, 0] = context[torch.arange(count), place]
        front = torch.zeros(dimension, dtype=torch.float64)
        front[0] = sink
        whole = (shares[:, None] * context).sum(1) + shares.mean() * front
        scores = choose(whole[:, None], (words.sum(2) + front) / choice_words)
        right += int((scores.argmax(-1) == 0).sum())
        left -= count
    share = right / trials
    return share, 1.96 * math.sqrt(max(share * (1 - share), 1 / trials) / trials)


def bags(length: int = 24) -> Task:
    """Symbols drawn from odds that are uniform on the simplex, new for each sample; every next symbol is asked.

    How often each symbol came is all that helps: a running mean of tokens is enough.
    """

    def make(count: int, generator: torch.Generator, held_out: bool) -> Samples:
        odds = -torch.rand(count, SYMBOLS, generator=generator).clamp_min(1e-9).log()
        ids = torch.multinomial(odds, length, replacement=True, generator=generator)
        return Samples(ids, ids.clone())

    return Task("bags", SYMBOLS, length, make)


def best_bag_nats(task: Task, count: int, seed: int) -> float:
    """What the best forecast from counts costs on held-out samples of `bags`."""
    ids = task.draw(count, seed, held_out=True).ids
    before = torch.nn.functional.one_hot(ids, SYMBOLS).cumsum(1)[:, :-1]
    return float(bag_nats(before.numpy(), ids[:, 1:].numpy()).mean())


def lookups() -> Task:
    """Tokens that are each a pair of a key and a value, then a key alone: its value is asked. Attention must find the pair."""

    def make(count: int, generator: torch.Generator, held_out: bool) -> Samples:
        key = torch.rand(count, KEYS, generator=generator).argsort(-1)[:, :PAIRS]
        value = torch.randint(VALUES, (count, PAIRS), generator=generator)
        asked = torch.randint(PAIRS, (count, 1), generator=generator)
        ids = torch.cat(
            [
                FIRST_PAIR + key * VALUES + value,
                FIRST_KEY + key.gather(1, asked),
                FIRST_VALUE + value.gather(1, asked),
            ],
            1,
        )
        labels = torch.full_like(ids, IGNORED)
        labels[:, -1] = ids[:, -1]
        return Samples(ids, labels)

    return Task("lookups", FIRST_VALUE + VALUES, PAIRS + 2, make)


def trained(task: Task, steps: int, width: int, seed: int, rate: float = 5e-3) -> LanguageModel:
    """One layer of softmax attention and an MLP, trained on a task."""
    torch.manual_seed(seed)
    config = LanguageModelConfig(
        vocab_size=task.vocabulary,
        hidden_size=width,
        num_hidden_layers=1,
        num_attention_heads=2,
        mixers=["softmax"],
    )
    model = LanguageModel(config)
    train(model, task, steps, batch=64, rate=rate, seed=seed)
    return model.eval()


@dataclass(frozen=True, slots=True)
class MixingCurve:
    """Nats by the share e of uniform weights, and their slope in the middle, found in two ways.

    Attributes:
        slope: d loss / d e at e = 1/2, by differentiation of the pass.
        difference: the same from losses at 1/2 +- a step.
        middle: the loss at e = 1/2.
        accuracy: share of asked tokens that are right at e = 0.
    """

    mixes: tuple[float, ...]
    nats: list[float]
    slope: float
    difference: float
    middle: float
    accuracy: float

    @property
    def rise(self) -> float:
        """Nats at the last share above those at the first."""
        return self.nats[-1] - self.nats[0]


def mixing_curve(
    model: LanguageModel,
    task: Task,
    mixes: tuple[float, ...],
    count: int,
    seed: int,
    step: float = 0.01,
) -> MixingCurve:
    """The loss as attention is mixed with uniform weights."""
    samples = task.draw(count, seed, held_out=True)

    def nats(mix: float | Tensor) -> Tensor:
        with attach(model, UniformWeights(mix=mix)):
            return model(samples.ids, labels=samples.labels).loss

    share = torch.full((), 0.5, requires_grad=True)
    middle = nats(share)
    (slope,) = torch.autograd.grad(middle, share)
    with torch.no_grad():
        found = [float(nats(mix)) for mix in mixes]
        up, down = float(nats(0.5 + step)), float(nats(0.5 - step))
    accuracy = task.accuracy(model, count, seed)
    return MixingCurve(
        mixes, found, float(slope), (up - down) / (2 * step), float(middle.detach()), accuracy
    )
