"""What the Titans experiment runs: the memory by itself, untrained, and small models asked for a value told once.

* `by_the_token`: the memory's equations one token at a time, against which the chunked form is compared and timed;
* `recall_curve`: pairs stored in a memory that no training has touched, and asked for again;
* `overwritten`: keys that are told again, with new values;
* `told_once`: a value is told once and asked for later, the answer never shown;
* `fit`: a small language model of one mixer, trained on that.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from regard.labs.tasks import IGNORED, Samples, Task
from regard.labs.training import train
from regard.nn import LanguageModel, LanguageModelConfig
from regard.ops import FastWeights, fast_weight_scan, inner_gradient, read_memory

VOCABULARY = 32
HALF = VOCABULARY // 2


def by_the_token(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    step: Tensor,
    initial: Sequence[Tensor],
    *,
    momentum: Tensor,
    decay: Tensor,
    chunk: int,
) -> Tensor:
    """The same as `fast_weight_scan`, with the weights of every token formed in turn."""
    weights = [weight.expand(len(key), *weight.shape) for weight in initial]
    surprise = [torch.zeros_like(weight) for weight in weights]
    start, read = weights, []
    for t in range(key.shape[2]):
        if t % chunk == 0:
            start = weights
        now = slice(t, t + 1)
        gradient = inner_gradient(start, key[:, :, now], value[:, :, now])
        eta, theta, alpha = (g[:, :, now, None] for g in (momentum, step, decay))
        surprise = [
            eta * s - theta * (error.mT @ before)
            for s, (error, before) in zip(surprise, gradient, strict=True)
        ]
        weights = [(1 - alpha) * w + s for w, s in zip(weights, surprise, strict=True)]
        read.append(read_memory(weights, query[:, :, now]))
    return torch.cat(read, 2)


def told(
    tokens: int, dim: int, *, batch: int, heads: int, double: bool = False
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Random tokens with gates as a memory gets them, and first weights of two layers."""
    kind = torch.float64 if double else torch.float32
    query, key, value = torch.randn(3, batch, heads, tokens, dim, dtype=kind).unbind()
    step, momentum, decay = torch.rand(3, batch, heads, tokens, dtype=kind).unbind()
    parts = {
        "query": normalize(query, dim=-1),
        "key": normalize(key, dim=-1),
        "value": value,
        "step": 0.05 * step,
        "momentum": 0.9 * momentum,
        "decay": 0.1 * decay,
    }
    first = torch.randn(heads, 4 * dim, dim, dtype=kind) / dim**0.5
    second = torch.randn(heads, dim, 4 * dim, dtype=kind) / (4 * dim) ** 0.5
    return parts, [first, second]


def speed(tokens: int, dim: int, chunk: int, repeats: int) -> dict[str, float]:
    """Milliseconds of both forms, the median of several runs in turn, forward and backward."""
    parts, initial = told(tokens, dim, batch=1, heads=1)
    leaves = [weight.requires_grad_() for weight in initial]

    def chunked() -> Tensor:
        memory = FastWeights.begin(leaves, 1)
        return fast_weight_scan(memory=memory, chunk=chunk, **parts)[0]  # pyright: ignore[reportArgumentType]

    def single() -> Tensor:
        return by_the_token(initial=leaves, chunk=chunk, **parts)

    took: dict[str, list[float]] = {"chunked": [], "by the token": []}
    for _ in range(repeats):
        for name, form in (("chunked", chunked), ("by the token", single)):
            begun = time.perf_counter()
            torch.autograd.grad(form().square().mean(), leaves)
            took[name].append(1000 * (time.perf_counter() - begun))
    return {name: sorted(times)[len(times) // 2] for name, times in took.items()}


def recall_curve(
    counts: Sequence[int],
    *,
    depth: int,
    dim: int = 32,
    rows: int = 8,
    passes: int = 1,
    momentum: float = 0.0,
    decay: float = 0.0,
) -> list[float]:
    """Mean cosine between stored values and what their keys give, for each number of pairs.

    One step writes a lone pair whole (2 theta times the squared norm of what the last layer sees is 1, less with momentum).
    """
    found = []
    for count in counts:
        key = normalize(torch.randn(rows, 1, count, dim), dim=-1)
        value = normalize(torch.randn(rows, 1, count, dim), dim=-1)
        initial, rate = untrained(depth, key, momentum)
        all_of = torch.ones(rows, 1, count)
        memory = FastWeights.begin(initial, rows)
        for _ in range(passes):
            _, memory = fast_weight_scan(
                key,
                key,
                value,
                rate * all_of,
                memory,
                momentum=momentum * all_of if momentum else None,
                decay=decay * all_of if decay else None,
                chunk=1,
            )
        recalled = read_memory(memory.weights, key)
        found.append(float(torch.cosine_similarity(recalled, value, dim=-1).mean()))
    return found


def forgetting(count: int, decay: float, momentum: float) -> tuple[list[float], list[float]]:
    """What is left of a value by its age with orthonormal keys, measured and by the closed form."""
    key = torch.eye(count, dtype=torch.float64).view(1, 1, count, count)
    value = torch.randn(1, 1, count, count, dtype=torch.float64)
    full = torch.ones(1, 1, count, dtype=torch.float64)
    memory = FastWeights.begin([torch.zeros(1, count, count, dtype=torch.float64)], 1)
    _, memory = fast_weight_scan(
        key, key, value, full / 2, memory, momentum=momentum * full, decay=decay * full, chunk=1
    )
    recalled = read_memory(memory.weights, key)
    left = ((recalled * value).sum(-1) / value.square().sum(-1)).flatten().flip(0)
    expected = [
        sum((1 - decay) ** (age - lag) * momentum**lag for lag in range(age + 1))
        for age in range(count)
    ]
    return left.tolist(), expected


def overwritten(
    options: dict[str, Any], *, rows: int, keys: int = 8, dim: int = 32
) -> tuple[float, float]:
    """Keys told twice in random order, with two values: mean cosine of what they give with the first and the last value."""
    options = dict(options)
    depth, chunk, momentum = (
        options.pop(name, other) for name, other in (("depth", 1), ("chunk", 1), ("momentum", 0.0))
    )
    key = normalize(torch.randn(rows, 1, keys, dim), dim=-1)
    values = normalize(torch.randn(2, rows, 1, keys, dim), dim=-1)
    order = torch.rand(2, rows, keys).argsort(-1)[:, :, None, :, None].expand(-1, -1, -1, -1, dim)
    told_keys = torch.cat([key.gather(2, order[turn]) for turn in range(2)], 2)
    told_values = torch.cat([values[turn].gather(2, order[turn]) for turn in range(2)], 2)
    initial, rate = untrained(depth, key, momentum)
    full = torch.ones(rows, 1, 2 * keys)
    _, memory = fast_weight_scan(
        told_keys,
        told_keys,
        told_values,
        rate * full,
        FastWeights.begin(initial, rows),
        momentum=momentum * full if momentum else None,
        chunk=chunk,
    )
    recalled = read_memory(memory.weights, key)
    first, last = (
        float(torch.cosine_similarity(recalled, value, dim=-1).mean()) for value in values
    )
    return first, last


def untrained(depth: int, key: Tensor, momentum: float) -> tuple[list[Tensor], float]:
    """First weights that say nothing, and the step that writes a lone pair whole."""
    dim = key.shape[-1]
    if depth == 1:
        return [torch.zeros(1, dim, dim)], (1 - momentum) / 2
    first = torch.randn(1, 4 * dim, dim)
    seen = torch.nn.functional.silu(key @ first.mT).square().sum(-1).mean()
    return [first, torch.zeros(1, dim, 4 * dim)], (1 - momentum) / (2 * float(seen))


def told_once(length: int, questions: int, *, values: int = HALF) -> Task:
    """A mark (1) and a value in the first quarter, filler, and questions (2) from the middle to the end.

    What follows a question is filler, so that an answer cannot be handed on by tokens that have seen it.
    """

    def make(count: int, generator: torch.Generator, held_out: bool) -> Samples:
        ids = torch.randint(3, HALF, (count, length), generator=generator)
        value = torch.randint(HALF, HALF + values, (count, 1), generator=generator)
        place = torch.randint(0, length // 4 - 1, (count, 1), generator=generator)
        ids.scatter_(1, place, 1).scatter_(1, place + 1, value)
        labels = torch.full_like(ids, IGNORED)
        spread = torch.rand(count, length // 2 - 2, generator=generator).argsort(-1)
        asked = torch.cat(
            [spread[:, : questions - 1] + length // 2, place.new_full((count, 1), length - 2)], 1
        )
        ids.scatter_(1, asked, 2)
        labels.scatter_(1, asked + 1, value.expand_as(asked))
        return Samples(ids, labels)

    return Task("told_once", VOCABULARY, length, make)


def fit(mixer: str, options: dict[str, Any], task: Task, *, steps: int, seed: int) -> LanguageModel:
    """A language model of one layer, trained on a task."""
    torch.manual_seed(seed)
    config = LanguageModelConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=1,
        mixers=[(mixer, options)],
        intermediate_size=64,
    )
    model = LanguageModel(config)
    train(model, task, steps, batch=8, rate=1e-2, seed=seed)
    return model.eval()


def silence(model: LanguageModel) -> None:
    """Takes the memory's part out of a model of `memory_as_gate`: reads give zeros, which gate everything by a half."""
    for layer in model.mixers:
        memory: Any = layer.memory
        memory.register_forward_hook(lambda module, given, read: torch.zeros_like(read))
