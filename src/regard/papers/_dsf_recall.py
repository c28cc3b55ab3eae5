"""Multi-query associative recall as the source draws it, and small models of every mixer that learn it in one and the same block.

The runs of a mixer are trained side by side: their parameters are stacked, each has its own rate and, by seed, its own samples.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, stack_module_state, vmap

from regard._errors import InputError
from regard.nn import QLSTM, S6, SSD, NormalisedAttention, ReversedQLSTM
from regard.nn.neural_memory import ShortConvolution
from regard.nn.projections import Projections
from regard.ops import causal_linear_attention


@dataclass(frozen=True, slots=True)
class Recall:
    """Multi-query associative recall (MQAR): sizes of a sample.

    The first 2 `pairs` tokens are keys and values in turn, keys from 1 to vocabulary / 2 - 1, values from vocabulary / 2 up, none
    twice. The rest are places of two tokens; at the first token of some, each key stands once more, and its value is asked.
    Places are drawn without replacement with odds (1 + place)^(power - 1), so that most questions come early; all else is 0.
    """

    vocabulary: int
    length: int
    pairs: int
    power: float = 0.01

    def __post_init__(self) -> None:
        places, half = (self.length - 2 * self.pairs) // 2, self.vocabulary // 2
        if not 1 <= self.pairs <= min(places, half - 1):
            raise InputError.of(
                "pairs",
                given=self.pairs,
                expected=f"1 or more, in at least as many places ({places}) and keys ({half - 1})",
            )

    def __str__(self) -> str:
        return f"({self.length}, {self.pairs})"

    def draw(
        self, count: int, generator: torch.Generator
    ) -> tuple[Int[Tensor, "count length"], Int[Tensor, "count pairs"], Int[Tensor, "count pairs"]]:
        """Tokens, the places where a value is asked, and these values."""
        half, begin = self.vocabulary // 2, 2 * self.pairs
        places = (self.length - begin) // 2

        def some(of: int) -> Tensor:
            return torch.rand(count, of, generator=generator).argsort(-1)[:, : self.pairs]

        key, value = 1 + some(half - 1), half + some(half)
        # the largest of log odds plus Gumbel noise are a draw without replacement
        odds = (self.power - 1) * torch.arange(1, places + 1).log()
        noise = -torch.rand(count, places, generator=generator).log()
        gap = (odds - noise.log()).argsort(-1, descending=True)[:, : self.pairs]
        ids = torch.zeros(count, self.length, dtype=torch.long)
        ids[:, 0:begin:2], ids[:, 1:begin:2] = key, value
        asked = begin + 2 * gap
        return ids.scatter_(1, asked, key), asked, value


class OneHead(Projections):
    """Attention of one head with as many numbers to a query and key as wanted; subclasses say how it mixes."""

    def __init__(self, width: int, state_size: int) -> None:
        super().__init__(width, 1, state_size=state_size)

    def mix(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, hidden: Float[Tensor, "batch tokens width"]) -> Tensor:
        mixed = self.mix(*self.query_key_of(hidden), self.value_of(hidden))
        return self.output_of(mixed, hidden)


class OneHeadSoftmax(OneHead):
    """Softmax attention without positions."""

    def mix(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        scores = query @ key.mT * query.shape[-1] ** -0.5
        later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        return scores.masked_fill(later, -torch.inf).softmax(-1) @ value


class OneHeadLinear(OneHead):
    """Linear attention with features elu + 1."""

    def mix(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return causal_linear_attention(query, key, value)[0]


def _normalised(normaliser: str) -> Callable[[int, int], nn.Module]:
    return lambda width, n: NormalisedAttention(width, 1, state_size=n, normaliser=normaliser)


MIXERS: dict[str, Callable[[int, int], nn.Module]] = {
    "softmax": OneHeadSoftmax,
    "linear": OneHeadLinear,
    "normalised, exp": _normalised("exp"),
    "normalised, softplus": _normalised("softplus"),
    "normalised, sigmoid": _normalised("sigmoid"),
    "S6": lambda width, n: S6(width, 1, state_size=n),
    "SSD": lambda width, n: SSD(width, 1, state_size=n),
    "qLSTM": lambda width, n: QLSTM(width, 1),
    "reversed qLSTM": lambda width, n: ReversedQLSTM(width, 1),
}
"""Each makes a mixer from its width and n, the numbers of a query and key; the quasi-LSTMs have none."""


@dataclass(frozen=True, slots=True)
class Fit:
    """How models are trained: AdamW, warm-up over a twentieth of the steps, a cosine to a tenth of the rate."""

    width: int
    steps: int
    batch: int
    layers: int = 2
    decay: float = 0.1
    tested: int = 400


class Recaller(nn.Module):
    """The one block that all mixers get: h <- h + mixer(conv(norm(h))), no feed-forward layer, no positions.

    The convolution of 4 tokens, which state-space models bring along, shows each mixer its neighbours: what is compared is the
    memory. Half of its channels start as the token itself, half as the one before.
    """

    def __init__(self, mixer: str, state_size: int, vocabulary: int, fit: Fit) -> None:
        super().__init__()
        width, layers = fit.width, range(fit.layers)
        self.embed = nn.Embedding(vocabulary, width)
        nn.init.normal_(self.embed.weight, std=0.02)
        self.norms = nn.ModuleList(nn.RMSNorm(width, eps=1e-6) for _ in layers)
        self.convolutions = nn.ModuleList(_neighbours(width) for _ in layers)
        self.mixers = nn.ModuleList(MIXERS[mixer](width, state_size) for _ in layers)
        self.norm = nn.RMSNorm(width, eps=1e-6)

    def forward(
        self, ids: Int[Tensor, "batch tokens"], asked: Int[Tensor, "batch pairs"]
    ) -> Float[Tensor, "batch pairs vocabulary"]:
        """What stands for the value at each place that is asked."""
        hidden = self.embed(ids)
        parts = zip(self.norms, self.convolutions, self.mixers, strict=True)
        for norm, convolution, mixer in parts:
            hidden = hidden + mixer(convolution(norm(hidden))[0])
        hidden = hidden.gather(1, asked[..., None].expand(-1, -1, hidden.shape[-1]))
        return self.norm(hidden) @ self.embed.weight.T


def tuned_recall(
    mixer: str,
    state_size: int,
    task: Recall,
    fit: Fit,
    seeds: Sequence[int],
    rates: Sequence[float],
) -> dict[str, Any]:
    """`recall` of several seeds at the rate with which seed 0 ends at the lowest loss, and that `rate`."""
    rate = rates[0]
    if len(rates) > 1:
        losses = recall(mixer, state_size, task, fit, [(rate, 0) for rate in rates])["loss"]
        rate, _ = min(zip(rates, losses, strict=True), key=lambda pair: pair[1][-1])
    return {"rate": rate, **recall(mixer, state_size, task, fit, [(rate, s) for s in seeds])}


def recall(
    mixer: str, state_size: int, task: Recall, fit: Fit, runs: Sequence[tuple[float, int]]
) -> dict[str, list[Any]]:
    """Trains and tests a model for each run, a rate and a seed, all at once.

    Returns:
        `right`: the share of asked values that are right, in percent, on samples that all runs share; `loss`: the mean training
        loss of every twentieth of the steps. Both by run.
    """
    models = []
    for _, seed in runs:
        torch.manual_seed(seed)
        models.append(Recaller(mixer, state_size, task.vocabulary, fit))
    parameters, buffers = stack_module_state(models)
    assert not buffers
    parameters = {name: value.detach() for name, value in parameters.items()}
    moments = {n: (torch.zeros_like(p), torch.zeros_like(p)) for n, p in parameters.items()}
    base = copy.deepcopy(models[0]).to("meta")

    def predict(own: dict[str, Tensor], ids: Tensor, asked: Tensor) -> Tensor:
        return functional_call(base, (own, {}), (ids, asked))

    def loss(own: dict[str, Tensor], ids: Tensor, asked: Tensor, value: Tensor) -> Tensor:
        logits = predict(own, ids, asked)
        return nn.functional.cross_entropy(logits.flatten(0, 1), value.flatten())

    slopes = vmap(grad_and_value(loss))
    draws = {seed: torch.Generator().manual_seed(10_000 + seed) for _, seed in runs}
    peak = torch.tensor([rate for rate, _ in runs])
    losses = []
    for step in range(fit.steps):
        drawn = {seed: task.draw(fit.batch, own) for seed, own in draws.items()}
        samples = (torch.stack([drawn[seed][i] for _, seed in runs]) for i in range(3))
        gradients, values = slopes(parameters, *samples)
        _adamw(parameters, gradients, moments, peak * _factor(step, fit.steps), step, fit.decay)
        losses.append(values)
    means = [part.mean(0) for part in torch.stack(losses).tensor_split(min(20, fit.steps))]
    ids, asked, value = task.draw(fit.tested, torch.Generator().manual_seed(0))
    with torch.no_grad():
        guess = vmap(predict, in_dims=(0, None, None))(parameters, ids, asked).argmax(-1)
    right = 100 * (guess == value).float().mean((1, 2))
    return {"right": right.tolist(), "loss": torch.stack(means, -1).tolist()}


def _neighbours(width: int) -> ShortConvolution:
    convolution = ShortConvolution(width, 4)
    with torch.no_grad():
        convolution.weight.zero_()
        convolution.weight[: width // 2, -1] = 1
        convolution.weight[width // 2 :, -2] = 1
    return convolution


def _factor(step: int, steps: int) -> float:
    """Share of the highest rate."""
    warmup = max(1, steps // 20)
    if step < warmup:
        return (step + 1) / warmup
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def _adamw(
    parameters: dict[str, Tensor],
    gradients: dict[str, Tensor],
    moments: dict[str, tuple[Tensor, Tensor]],
    rates: Float[Tensor, " runs"],
    step: int,
    decay: float,
) -> None:
    """One step of AdamW for stacked runs, in place, each run's gradient clipped at norm 1; vectors do not decay."""
    squares = torch.stack([g.flatten(1).square().sum(1) for g in gradients.values()]).sum(0)
    clip = (1 / squares.sqrt().clamp_min(1e-12)).clamp_max(1)
    for name, parameter in parameters.items():
        along = (-1, *[1] * (parameter.ndim - 1))
        gradient, rate = gradients[name] * clip.view(along), rates.view(along)
        first, second = moments[name]
        first.lerp_(gradient, 0.1)
        second.lerp_(gradient.square(), 0.05)
        if parameter.ndim > 2:
            parameter.mul_(1 - rate * decay)
        size = (second / (1 - 0.95 ** (step + 1))).sqrt().add_(1e-8)
        parameter.sub_(rate * first / (1 - 0.9 ** (step + 1)) / size)
