"""Tasks, hosts and measurements of `aaren`: one causal stack for sequences to classify, series to continue, events to expect."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from regard.labs import tasks
from regard.nn import Aaren, Mixer, SoftmaxAttention
from regard.nn.projections import split_heads
from regard.nn.softmax_attention import remember
from regard.ops import Attended, attention_scan, attention_scan_step, merge_attention
from regard.papers._flowformer_runs import AbsoluteSoftmax, Sequences, language_model

MIXED: dict[str, Callable[[int, int], Mixer]] = {"aaren": Aaren, "softmax": AbsoluteSoftmax}


# the stack


class Stack(nn.Module):
    """Causal layers over `[batch, tokens, inputs]`: embedded positions, pre-norm mixers and feed-forward layers; or a GRU.

    Every token gets `outputs` numbers, from itself and the tokens before it.
    """

    def __init__(
        self, name: str, inputs: int, tokens: int, outputs: int, *, width: int = 32, layers: int = 2
    ) -> None:
        super().__init__()
        self.embed = nn.Linear(inputs, width)
        self.positions = nn.Parameter(0.02 * torch.randn(tokens, width))
        self.mixers = nn.ModuleList()
        self.gru: nn.GRU | None = None
        if name == "GRU":
            self.gru = nn.GRU(width, width, layers, batch_first=True)
        else:
            self.mixers.extend(MIXED[name](width, 4) for _ in range(layers))
        count = len(self.mixers)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2 * count))
        self.feeds = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
            for _ in range(count)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, outputs)

    def forward(
        self, series: Float[Tensor, "batch tokens inputs"]
    ) -> Float[Tensor, "batch tokens outputs"]:
        hidden = self.embed(series) + self.positions[: series.shape[1]]
        if self.gru is not None:
            hidden = self.gru(hidden)[0]
        for i, (mixer, feed) in enumerate(zip(self.mixers, self.feeds, strict=True)):
            hidden = hidden + mixer(self.norms[2 * i](hidden))
            hidden = hidden + feed(self.norms[2 * i + 1](hidden))
        return self.head(self.norm(hidden))


class LastOutput(nn.Module):
    """A stack read out at its last token."""

    def __init__(self, stack: Stack) -> None:
        super().__init__()
        self.stack = stack

    def forward(self, series: Tensor) -> Tensor:
        return self.stack(series)[:, -1]


def classifier(name: str, data: Sequences) -> nn.Module:
    _, tokens, channels = data.train.shape
    return LastOutput(Stack(name, channels, tokens, data.classes))


def fit(
    loss: Callable[[Tensor], Tensor],
    model: nn.Module,
    count: int,
    steps: int,
    seed: int,
    *,
    batch: int = 32,
    rate: float = 2e-3,
) -> None:
    """AdamW on batches of row numbers below `count`, the rate falling to 0 over the last half."""
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda i: min(1.0, 2 - 2 * i / steps))
    model.train()
    for _ in range(steps):
        optimiser.zero_grad()
        loss(torch.randint(count, (batch,), generator=generator)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
    model.eval()


# series to continue


@dataclass(frozen=True)
class Windows:
    """Pasts `[rows, past, 1]` and futures `[rows, future]`, each row scaled by the mean and deviation of its past."""

    past: Float[Tensor, "rows past 1"]
    future: Float[Tensor, "rows future"]
    train: int

    def error(self, guess: Float[Tensor, "held future"]) -> float:
        """Mean squared error on the rows that are held out."""
        return float((guess - self.future[self.train :]).square().mean())


def seasonal_series(hours: int = 6000, past: int = 96, future: int = 24) -> Windows:
    """A random walk, a daily cycle of drifting strength, a weekly one, noise that remembers; the last fifth is held out."""
    generator = torch.Generator().manual_seed(11)
    shocks = torch.randn(3, hours, generator=generator, dtype=torch.float64)
    hour = torch.arange(hours, dtype=torch.float64)
    strength = 1 + 0.3 * torch.sin(2 * math.pi * hour / 1700)
    noise = torch.zeros(hours, dtype=torch.float64)
    for t in range(1, hours):
        noise[t] = 0.7 * noise[t - 1] + 0.25 * shocks[0, t]
    daily = strength * torch.sin(2 * math.pi * hour / 24) + 0.4 * torch.sin(4 * math.pi * hour / 24)
    weekly = 0.6 * torch.sin(2 * math.pi * hour / 168)
    series = (0.03 * shocks[1].cumsum(0) + daily + weekly + noise).float()
    rows = series.unfold(0, past + future, 3)
    mean = rows[:, :past].mean(1, keepdim=True)
    rows = (rows - mean) / rows[:, :past].std(1, keepdim=True)
    train = len(rows) * 4 // 5
    gap = (past + future) // 3  # no held-out window overlaps one that is trained on
    kept = torch.cat([rows[: train - gap], rows[train:]])
    return Windows(kept[:, :past, None], kept[:, past:], train - gap)


def continue_series(name: str, data: Windows, steps: int, seed: int) -> float:
    """Mean squared error after training, on held-out windows."""
    model = LastOutput(Stack(name, 1, data.past.shape[1], data.future.shape[1]))

    def loss(rows: Tensor) -> Tensor:
        return (model(data.past[rows]) - data.future[rows]).square().mean()

    fit(loss, model, data.train, steps, seed)
    with torch.no_grad():
        return data.error(model(data.past[data.train :]))


def naive_errors(data: Windows) -> dict[str, float]:
    """Errors of the last value and of the same hour of the last day."""
    past = data.past[data.train :, :, 0]
    future = data.future.shape[1]
    return {
        "last value": data.error(past[:, -1:].expand(-1, future)),
        "last day": data.error(past[:, -24:][:, :future]),
    }


# events to expect


@dataclass(frozen=True)
class Events:
    """Waiting times and marks of a Hawkes process, and the log-density of each wait under the process itself."""

    waits: Float[Tensor, "rows events"]
    marks: Int[Tensor, "rows events"]
    density: Float[Tensor, "rows events"]


def hawkes(
    rows: int,
    events: int = 48,
    *,
    base: float = 0.2,
    jumps: tuple[float, ...] = (0.2, 0.8, 1.4),
    decay: float = 1.2,
    seed: int = 5,
) -> Events:
    """Events at the rate `base + sum over past events of jumps[mark] e^(-decay age)`, marks drawn alike.

    A wait is the smaller of two: of the base rate, and of what the past excites, both drawn by inversion (Dassios and
    Zhao 2013).
    """
    generator = torch.Generator().manual_seed(seed)
    draw = lambda: torch.rand(rows, generator=generator, dtype=torch.float64)  # noqa: E731
    excited = torch.zeros(rows, dtype=torch.float64)
    waits, marks, density = [], [], []
    for _ in range(events):
        plain = -draw().log() / base
        left = 1 + decay * draw().log() / excited.clamp_min(1e-12)
        sudden = torch.where(left > 0, -left.clamp_min(1e-300).log() / decay, torch.inf)
        wait = torch.minimum(plain, sudden)
        after = excited * torch.exp(-decay * wait)
        density.append((base + after).log() - base * wait - (excited - after) / decay)
        mark = torch.randint(len(jumps), (rows,), generator=generator)
        excited = after + torch.tensor(jumps, dtype=torch.float64)[mark]
        waits.append(wait)
        marks.append(mark)
    stacked = (torch.stack(part, 1) for part in (waits, marks, density))
    wait, mark, log = stacked
    return Events(wait.float(), mark, log.float())


def log_normal_mixture(
    numbers: Float[Tensor, "*events parameters"], waits: Float[Tensor, "*events"]
) -> Float[Tensor, "*events"]:
    """Log-density of waits under mixtures of log-normals: a third of the numbers each are weights, means and log-deviations."""
    weight, mean, spread = numbers.chunk(3, -1)
    log = waits.clamp_min(1e-6).log()[..., None]
    spread = spread.clamp(-5, 5)
    z = (log - mean) * torch.exp(-spread)
    parts = weight.log_softmax(-1) - 0.5 * z.square() - spread - 0.5 * math.log(2 * math.pi)
    return parts.logsumexp(-1) - log[..., 0]


def expect_events(
    name: str, data: Events, train: int, steps: int, seed: int, components: int = 16
) -> float:
    """Negative log-density of a held-out wait, nats an event, the first event of a row left out."""
    times = data.waits.clamp_min(1e-6).log()[..., None]
    inputs = torch.cat([times, nn.functional.one_hot(data.marks, 3).float()], -1)[:, :-1]
    model = Stack(name, 4, inputs.shape[1], 3 * components)

    def nats(rows: Tensor | slice) -> Tensor:
        return -log_normal_mixture(model(inputs[rows]), data.waits[rows, 1:]).mean()

    fit(nats, model, train, steps, seed)
    with torch.no_grad():
        return float(nats(slice(train, None)))


# recall


def lookups(count: int, pairs: int = 8, keys: int = 16) -> Sequences:
    """Tokens that each hold a key and a value, then a key alone; the class is its value. A third of the rows is held out."""
    generator = torch.Generator().manual_seed(13)
    key = torch.rand(count, keys, generator=generator).argsort(-1)[:, :pairs]
    value = torch.randint(keys, (count, pairs), generator=generator)
    asked = torch.randint(pairs, (count, 1), generator=generator)
    every_key = torch.cat([key, key.gather(1, asked)], 1)
    written = nn.functional.pad(nn.functional.one_hot(value, keys), (0, 0, 0, 1))
    series = torch.cat([nn.functional.one_hot(every_key, keys), written], -1).float()
    held, label = torch.arange(count) % 3 == 0, value.gather(1, asked)[:, 0]
    return Sequences(series[~held], label[~held], series[held], label[held], keys)


# exactness


def by_softmax(scores: Tensor, value: Tensor) -> Tensor:
    """The softmax of every prefix, dense."""
    later = torch.ones(scores.shape[-1], scores.shape[-1], dtype=torch.bool).triu(1)
    rows = scores[..., None, :].expand(*scores.shape, -1).masked_fill(later, -torch.inf)
    return rows.softmax(-1) @ value


def deviations() -> dict[str, float]:
    """Largest differences in float64 between forms that must agree, scores 30 times normal."""
    scores = (30 * torch.randn(4, 257, dtype=torch.float64)).requires_grad_()
    value = torch.randn(4, 257, 16, dtype=torch.float64, requires_grad=True)
    dense = by_softmax(scores, value)
    scans = {block: attention_scan(scores, value, block=block)[0] for block in (1, 16, 64)}
    state, steps = None, []
    for t in range(scores.shape[1]):
        one, state = attention_scan_step(scores[:, t], value[:, t], state)
        steps.append(one)
    weight = torch.randn_like(dense)
    wanted = torch.autograd.grad((dense * weight).sum(), (scores, value))
    got = torch.autograd.grad((scans[16] * weight).sum(), (scores, value))
    return {
        "scan": max(far(scan, dense) for scan in scans.values()),
        "steps": far(torch.stack(steps, 1), dense),
        "gradient": max(far(a, b) for a, b in zip(got, wanted, strict=True)),
        "associativity": associativity(),
    }


def associativity(triples: int = 1000) -> float:
    """Largest relative difference of the two ways to merge three sets."""
    one, two, three = (
        Attended(
            30 * torch.randn(triples, dtype=torch.float64),
            1 + torch.rand(triples, dtype=torch.float64),
            torch.randn(triples, 8, dtype=torch.float64),
        )
        for _ in range(3)
    )
    left = merge_attention(merge_attention(one, two), three)
    right = merge_attention(one, merge_attention(two, three))
    return max(far(a, b) for a, b in zip(left, right, strict=True))


def far(one: Tensor, other: Tensor) -> float:
    return float((one - other).detach().abs().max())


# streaming


def streamed(tokens: int, width: int = 64) -> tuple[float, list[int]]:
    """Three layers fed token by token against all at once in float64: largest difference, and the state's numbers after each."""
    task = tasks.characters(tokens)
    model = language_model(Aaren, task, width=width, layers=3).double().eval()
    ids = task.draw(1, 0).ids
    memory, parts, sizes = model.states(), [], []
    with torch.no_grad():
        whole = model(ids).logits
        for one in ids.split(1, 1):
            parts.append(model(one, past_key_values=memory).logits)
            sizes.append(sum(part.numel() for state in memory.states for part in state.values()))
    return far(torch.cat(parts, 1), whole), sizes


@torch.no_grad()
def step_cost(
    name: str, contexts: list[int], steps: int = 40, width: int = 64
) -> dict[str, list[float]]:
    """Processor milliseconds of a token and kilobytes of memory, three layers, after contexts of several lengths."""
    make = {"aaren": Aaren, "softmax": SoftmaxAttention}[name]
    mixers = [make(width, 4).eval() for _ in range(3)]
    hidden = torch.randn(1, max(contexts), width)
    found: dict[str, list[float]] = {"milliseconds": [], "kilobytes": []}
    for context in contexts:
        states: list[dict[str, Any]] = []
        for mixer in mixers:
            state: dict[str, Any] = {}
            past = hidden[:, :context]
            if isinstance(mixer, SoftmaxAttention):
                # keys without the turn of their positions: no context this long need be attended to
                key = split_heads(mixer.k_proj(past), mixer.heads)
                remember(state, key, split_heads(mixer.v_proj(past), mixer.heads), None)
            else:
                mixer(past, state=state)
            states.append(state)
        taken = []
        for i in range(steps + 3):
            start, one = time.process_time(), hidden[:, i : i + 1]
            for mixer, state in zip(mixers, states, strict=True):
                one = mixer(one, state=state)
            taken.append(time.process_time() - start)
        found["milliseconds"].append(1000 * sorted(taken[3:])[steps // 4])
        numbers = sum(part.nbytes for state in states for part in state.values())
        found["kilobytes"].append(numbers / 1000)
    return found


def cumulative(contexts: list[int], cost: list[float]) -> list[float]:
    """Cost of all tokens up to each context: the integral of the straight lines between the contexts."""
    total = [contexts[0] * cost[0]]
    for i in range(1, len(contexts)):
        step = contexts[i] - contexts[i - 1]
        total.append(total[-1] + step * (cost[i] + cost[i - 1]) / 2)
    return total
