"""What the Hydra experiment runs: products in float64, time by length, and small models on data that each part is meant for.

* `differences`: what the future changes, step by step against at once, product keys against all pairs;
* `milliseconds`: a token of Hydra and of a transformer of equal size, by length, and what both remember;
* `carried`: a value to be remembered over a distance;
* `domains`: text whose Markov chain changes every few chunks; `agreement` of experts with chains;
* `facts`: pairs of tokens with a random token each, to be known by heart.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from regard.labs.tasks import IGNORED, Samples, Task
from regard.labs.training import train
from regard.nn import (
    ChunkMoE,
    HydraLanguageModel,
    LanguageModel,
    LanguageModelConfig,
    Mamba,
    WholeChunkMoE,
    hydra_mixers,
)
from regard.ops import product_key_search

MEMORIES = {"workspace": {}, "product_keys": {}}


def build(mixers: Sequence[Any], *, layers: int, width: int, **more: Any) -> HydraLanguageModel:
    """A model of these mixers, with the memories that `more` names; no feed-forward layers unless it gives their width.

    Convolutions of Mamba blocks start 3 times and its B, C and Delta' 4 times as large as published: at a width of 32 what the
    published start writes to the state is so small that a block learns nothing for hundreds of steps.
    """
    options = {"vocab_size": 256, "num_attention_heads": 4, "intermediate_size": 0, **more}
    config = LanguageModelConfig(
        hidden_size=width, num_hidden_layers=layers, mixers=list(mixers), **options
    )
    model = HydraLanguageModel(config)
    with torch.no_grad():
        for block in model.modules():
            if isinstance(block, Mamba):
                block.convolution.weight.mul_(3)
                block.x_proj.weight.mul_(4)
    return model


def transformer_like(model: LanguageModel) -> HydraLanguageModel:
    """A transformer of the same width and vocabulary with as many parameters: its feed-forward layers take up the rest."""
    config = model.config

    def sized(inner: int) -> HydraLanguageModel:
        return build(
            ["softmax"],
            layers=config.num_hidden_layers,
            width=config.hidden_size,
            vocab_size=config.vocab_size,
            intermediate_size=inner,
        )

    one, two = (parameters(sized(inner)) for inner in (1, 2))
    return sized(max(1, 1 + round((parameters(model) - one) / (two - one))))


def parameters(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def fit(
    model: LanguageModel, task: Task, *, steps: int, seed: int, batch: int = 16, rate: float = 1e-2
) -> None:
    train(model, task, steps, batch=batch, rate=rate, seed=seed)
    model.eval()


# exactness


@torch.no_grad()
def differences(tokens: int, width: int = 32) -> dict[str, float]:
    """Largest differences of logits or scores in float64 that should be nought."""
    options: dict[str, Any] = {
        "attention": {"window": 7, "stride": 16},
        "experts": {"chunk": 8, "inner": 32},
    }
    memories = {"workspace": {"chunk": 8}, "product_keys": {"keys": 16}}
    model = build(hydra_mixers(4, **options), layers=4, width=width, **memories)
    model = model.double().eval()
    ids = torch.randint(256, (2, tokens))
    cut = tokens * 2 // 3
    other = ids.clone()
    other[:, cut:] = (ids[:, cut:] + 1) % 256
    whole, states = model(ids).logits, model.states()
    steps = torch.cat([model(one, past_key_values=states).logits for one in ids.split(1, 1)], 1)
    query = torch.randn(64, 128, dtype=torch.float64)
    first, second = torch.randn(2, 64, 64, dtype=torch.float64).unbind()
    found = product_key_search(query, first, second, half_k=4, picked=4)
    pairs = (query[:, :64] @ first.T)[:, :, None] + (query[:, 64:] @ second.T)[:, None]
    return {
        "future": float((model(other).logits - whole)[:, :cut].abs().max()),
        "step by step": float((steps - whole).abs().max()),
        "product keys": float((pairs.flatten(1).topk(4).values - found.scores).abs().max()),
    }


@torch.no_grad()
def look_ahead() -> dict[str, float]:
    """How much the last tokens of a chunk change its first ones, in shares of the output's norm, by router."""
    found = {}
    for name, kind in (("published", WholeChunkMoE), ("causal", ChunkMoE)):
        torch.manual_seed(0)
        layer = kind(32, 4, inner=64).double().eval()
        hidden = torch.randn(4, 64, 32, dtype=torch.float64)
        other = hidden.clone()
        other[:, 48:] *= -2
        before, after = (layer(states)[:, 32:48] for states in (hidden, other))
        found[name] = float((after - before).norm() / before.norm())
    return found


# time and memory


@torch.no_grad()
def milliseconds(
    models: dict[str, LanguageModel], lengths: Sequence[int], repeats: int
) -> dict[str, list[float]]:
    """Processor time of a token of one text, the shortest of several runs in turn; one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    took: dict[str, list[float]] = {name: [] for name in models}
    try:
        for length in lengths:
            ids = torch.randint(256, (1, length))
            best = dict.fromkeys(models, float("inf"))
            for _ in range(repeats):
                for name, model in models.items():
                    begun = time.process_time()
                    model(ids)
                    best[name] = min(best[name], time.process_time() - begun)
            for name in models:
                took[name].append(1000 * best[name] / length)
    finally:
        torch.set_num_threads(threads)
    return took


@torch.no_grad()
def remembered(model: LanguageModel, tokens: int) -> float:
    """Megabytes that the model keeps of a text to go on from."""
    states = model.states()
    model(torch.randint(256, (1, tokens)), past_key_values=states)
    return states.memory() / 1e6


# a value that is carried over a distance


def carried(length: int, questions: int, *, values: int = 8) -> Task:
    """A value in the first quarter, blanks (0), and questions (1) in the second half; each asks for the value, never shown."""

    def make(count: int, generator: torch.Generator, held_out: bool) -> Samples:
        ids = torch.zeros(count, length, dtype=torch.long)
        value = torch.randint(2, 2 + values, (count, 1), generator=generator)
        place = torch.randint(length // 4, (count, 1), generator=generator)
        ids.scatter_(1, place, value)
        later = torch.rand(count, (length - 1) // 2, generator=generator).argsort(-1)
        asked = length - 2 - later[:, :questions]
        ids.scatter_(1, asked, 1)
        labels = torch.full_like(ids, IGNORED).scatter_(1, asked + 1, value.expand_as(asked))
        return Samples(ids, labels)

    return Task("carried", 2 + values, length, make)


# experts


def domains(
    length: int, *, vocabulary: int = 64, chains: int = 4, stretch: int = 64, seed: int = 0
) -> Task:
    """Text of first-order Markov chains with Dirichlet(0.1) rows, another chain every `stretch` tokens."""
    rows = chain_rows(vocabulary, chains, seed)

    def make(count: int, generator: torch.Generator, held_out: bool) -> Samples:
        domain = which_chain(count, length, generator, chains=chains, stretch=stretch)
        ids = torch.randint(vocabulary, (count, length), generator=generator)
        for t in range(1, length):
            likely = rows[domain[:, t], ids[:, t - 1]]
            ids[:, t] = torch.multinomial(likely, 1, generator=generator)[:, 0]
        labels = ids.clone()
        labels[:, 0] = IGNORED
        return Samples(ids, labels)

    return Task("domains", vocabulary, length, make)


def chain_rows(vocabulary: int, chains: int, seed: int) -> Float[Tensor, "chains from to"]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        concentration = torch.full((vocabulary,), 0.1)
        return torch.distributions.Dirichlet(concentration).sample((chains, vocabulary))  # pyright: ignore[reportArgumentType]


def which_chain(
    count: int, length: int, generator: torch.Generator, *, chains: int, stretch: int
) -> Int[Tensor, "count length"]:
    """The chain of every token: the first numbers that `domains` draws."""
    drawn = torch.randint(chains, (count, -(-length // stretch)), generator=generator)
    return drawn.repeat_interleave(stretch, 1)[:, :length]


@torch.no_grad()
def agreement(model: LanguageModel, task: Task, count: int, seed: int, *, stretch: int) -> float:
    """Normalised mutual information of the chain of a token and the expert with the largest gate."""
    ids = task.draw(count, seed).ids
    chain = which_chain(
        count, task.length, torch.Generator().manual_seed(seed), chains=4, stretch=stretch
    )
    kept: list[Tensor] = []
    (layer,) = (module for module in model.modules() if isinstance(module, ChunkMoE))
    hook = layer.register_forward_pre_hook(
        lambda module, given: kept.append(layer.gates(given[0]).argmax(-1))
    )
    try:
        model(ids)
    finally:
        hook.remove()
    return mutual_information(chain.flatten(), kept[0].flatten())


def mutual_information(first: Int[Tensor, " n"], second: Int[Tensor, " n"]) -> float:
    """Of two labellings, over the mean of their entropies: 1 when each tells the other, 0 when neither says a thing."""
    table = torch.zeros(int(first.max()) + 1, int(second.max()) + 1, dtype=torch.float64)
    table.index_put_((first, second), torch.ones(len(first), dtype=torch.float64), accumulate=True)
    table /= table.sum()
    entropy = lambda p: float(-torch.xlogy(p, p).sum())  # noqa: E731
    one, two, both = entropy(table.sum(1)), entropy(table.sum(0)), entropy(table)
    return 2 * (one + two - both) / (one + two) if one + two > 0 else 0.0


# product keys


def facts(number: int, *, vocabulary: int = 512, seed: int = 0) -> Task:
    """`number` different pairs of tokens, each with a random third token that has to be known by heart."""
    generator = torch.Generator().manual_seed(seed)
    pair = torch.randperm(vocabulary**2, generator=generator)[:number]
    value = torch.randint(vocabulary, (number,), generator=generator)
    table = torch.stack([pair // vocabulary, pair % vocabulary, value], 1)

    def make(count: int, generator: torch.Generator, held_out: bool) -> Samples:
        ids = table[torch.randint(number, (count,), generator=generator)]
        labels = ids.clone()
        labels[:, :2] = IGNORED
        return Samples(ids, labels)

    return Task("facts", vocabulary, 3, make)
