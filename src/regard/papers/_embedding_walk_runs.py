"""Experiments of `embedding-walk` on a pretrained decoder: walks, choices by vectors, replaced attention."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from regard import attach, texts
from regard._errors import InputError
from regard.instruments.context_walk import context_walk, order_effect
from regard.instruments.domains import cut
from regard.instruments.walk import (
    arrival,
    final_norm,
    measure_walk,
    nearest_tokens,
    record_walk,
)
from regard.labs.embedding_walk import (
    DistanceWeights,
    ReplacedWeights,
    SelfWeights,
    UniformWeights,
    activated,
    aggregate,
    choose,
    counted,
    layer_states,
    mean_by_distance,
    normalise,
    padded,
    parameterless_logits,
    prefix_scores,
    unrelated_displacement,
)


@dataclass(frozen=True, slots=True)
class Item:
    """A text, four endings by their places in the list of endings, and which is its own."""

    context: str
    endings: tuple[int, ...]
    answer: int


def items(count: int, seed: int) -> tuple[list[Item], list[str]]:
    """Sentences of Python's reference of 16 to 28 words, cut at 60 %, each with its ending and three of other sentences.

    Raises:
        InputError: more items than there are sentences.
    """
    text = texts.prose(115_000, seed=0)
    found = dict.fromkeys(re.split(r"(?<=[.!?])\s+(?=[A-Z])", text))
    sentences = [one for one in found if 16 <= len(one.split()) <= 28 and "\n" not in one]
    if count > len(sentences):
        raise InputError.of("count", given=count, expected=f"at most {len(sentences)}")
    draw = random.Random(seed)
    chosen = draw.sample(sentences, count)
    cuts = [(words := one.split(" "), round(0.6 * len(words))) for one in chosen]
    endings = [" " + " ".join(words[place:]) for words, place in cuts]
    made = []
    for own, (words, place) in enumerate(cuts):
        others = draw.sample([i for i in range(count) if endings[i] != endings[own]], 3)
        order = [own, *others]
        draw.shuffle(order)
        made.append(Item(" ".join(words[:place]), tuple(order), order.index(own)))
    return made, endings


def bag_of_words(made: Sequence[Item], endings: Sequence[str]) -> list[bool]:
    """Whether the ending that shares most words with the text, by the cosine of word counts, is its own.

    A tie of n endings that holds the right one counts when a fair draw says so.
    """
    draw = random.Random(0)
    bags = [Counter(re.findall(r"\w+", ending.lower())) for ending in endings]
    right = []
    for item in made:
        text = Counter(re.findall(r"\w+", item.context.lower()))
        scores = [
            sum(text[word] * bags[i][word] for word in bags[i])
            / max(1e-9, sum(n * n for n in bags[i].values())) ** 0.5
            for i in item.endings
        ]
        best = [i for i, score in enumerate(scores) if score > max(scores) - 1e-9]
        right.append(draw.choice(best) == item.answer)
    return right


@dataclass(frozen=True, slots=True)
class Cell:
    """One way to make a vector of a text."""

    layer: int
    act: str
    words: str
    norm: str
    drop_first: bool = True

    def __str__(self) -> str:
        where = {0: "E", -1: "top"}.get(self.layer, str(self.layer))
        parts = [where, self.words, self.norm, "" if self.act == "identity" else self.act]
        return " ".join(filter(None, parts)) + ("" if self.drop_first else ", first kept")


def cells(layers: Sequence[int]) -> list[Cell]:
    """The grid: all layers, two activations, three aggregations, two norms; "last" takes no norm."""
    return [
        Cell(layer, act, words, norm)
        for layer in layers
        for act in ("identity", "-act")
        for words in ("mean", "w1mean", "last")
        for norm in ("none", "z")
        if (words, norm) != ("last", "z")
    ]


def choices_by_similarity(
    model: Any,
    made: Sequence[Item],
    endings: Sequence[str],
    layers: Sequence[int],
    more: Sequence[Cell] = (),
) -> dict[str, list[bool]]:
    """T2, for each cell of the grid and `more`: whether the ending with the largest product with the text's vector is its own.

    Texts and endings are read one by one; each ending is read once, though several items offer it.
    """
    encode = lambda lines: model.tokenizer(lines, add_special_tokens=False)["input_ids"]  # noqa: E731
    read, seen = layer_states(model, encode([item.context for item in made]), layers, batch=32)
    of_endings, seen_endings = layer_states(model, encode(list(endings)), layers, batch=32)
    offered = torch.tensor([item.endings for item in made])
    answer = torch.tensor([item.answer for item in made])
    found = {}
    for cell in [*cells(layers), *more]:
        at = layers.index(cell.layer)
        vectors = [
            aggregate(
                activated(states[at], cell.act),
                valid,
                cell.words,
                norm=cell.norm,
                drop_first=cell.drop_first,
            )
            for states, valid in ((read, seen), (of_endings, seen_endings))
        ]
        scores = choose(vectors[0], vectors[1][:, 0][offered])
        found[str(cell)] = (scores.argmax(-1) == answer).tolist()
    return found


@torch.no_grad()
def choices_by_generation(
    model: Any, made: Sequence[Item], endings: Sequence[str], batch: int = 20
) -> dict[str, list[bool]]:
    """T1: whether an item's own ending is the likeliest, summed over its tokens, behind vectors in place of the text.

    "cross" has the text's input embeddings, which is ordinary scoring. The others: the mean of -act(-h) at the input embeddings,
    the mean of top states, and all of them, each vector rescaled to the mean length of input embeddings; "bare" has all input
    embeddings before a decoder without parameters.
    """
    encode = lambda lines: model.tokenizer(lines, add_special_tokens=False)["input_ids"]  # noqa: E731
    table = model.get_input_embeddings().weight
    length = float(table.norm(dim=-1).mean())
    scaled = lambda vectors: length * normalise(vectors, "L2")  # noqa: E731
    found: dict[str, list[bool]] = {}
    for start in range(0, len(made), batch):
        part = made[start : start + batch]
        states, valid = layer_states(model, encode([item.context for item in part]), [0, -1])
        flat = encode([endings[i] for item in part for i in item.endings])
        ids, known = padded(flat)
        ids, known = ids.unflatten(0, (len(part), 4)), known.unflatten(0, (len(part), 4))
        every = counted(valid, True)
        one = torch.ones(len(part), 1, dtype=torch.bool)
        # the first state is left out: places move one to the front
        rest = states[1][:, 1:], every[:, 1:]
        prefixes = {
            "cross": (states[0], valid),
            "embedding mean": (
                scaled(aggregate(activated(states[0], "-act"), valid, "mean", drop_first=True)),
                one,
            ),
            "top mean": (scaled(aggregate(states[1], valid, "mean", drop_first=True)), one),
            "top all": (scaled(rest[0]), rest[1]),
        }
        answer = torch.tensor([item.answer for item in part])
        for name, (prefix, counts) in prefixes.items():
            scores = prefix_scores(model, prefix, counts, ids, known)
            found.setdefault(name, []).extend((scores.argmax(-1) == answer).tolist())
        output = model.get_output_embeddings().weight
        for row in range(len(part)):
            front = states[0, row, valid[row]]
            scores = torch.stack(
                [
                    bare_score(front, table, output, torch.tensor(flat[4 * row + c]))
                    for c in range(4)
                ]
            )
            found.setdefault("bare", []).append(bool(scores.argmax() == answer[row]))
    return found


def bare_score(front: Tensor, table: Tensor, output: Tensor, tokens: Tensor) -> Tensor:
    """Log-likelihood of tokens behind vectors in the decoder without parameters."""
    inputs = torch.cat([front, table[tokens[:-1]]])[None]
    odds = parameterless_logits(inputs, output)[0, len(front) - 1 :].log_softmax(-1)
    return odds.gather(-1, tokens[:, None]).sum()


@torch.no_grad()
def walks(model: Any, count: int, length: int, seed: int) -> dict[str, Any]:
    """Passages as walks, the first token aside: lengths, straightness, arrival, order."""
    ids = cut(model, texts.prose(8 * count * length + 2000, seed=seed), length)[:count]
    walk = record_walk(model, ids)
    found = measure_walk(walk)
    nearest = nearest_tokens(walk, final_norm(model), model.get_output_embeddings())
    steps = walk.steps()[:, :, 1:].double().norm(dim=-1)
    expected = torch.tensor(unrelated_displacement(steps.movedim(0, -1).numpy())[..., -1])
    straight = found.displacement[:, 1:].double() / expected
    generator = torch.Generator().manual_seed(seed)
    order = torch.cat([torch.randperm(length - 1, generator=generator), torch.tensor([length - 1])])
    odds = context_walk(model, ids)
    return {
        "gap": walk.gap(),
        "tortuosity": found.tortuosity[:, 1:].median(1).values.tolist(),
        "straight": straight.median(1).values.tolist(),
        "arrival": arrival(nearest)[:, 1:].flatten().tolist(),
        "attention": found.attention[..., 1:].flatten(1).median(1).values.tolist(),
        "mlp": found.mlp[..., 1:].flatten(1).median(1).values.tolist(),
        "share": found.attention_share(1).tolist(),
        "turning": found.turning[..., 1:].flatten(1).median(1).values.tolist(),
        "order": order_effect(model, ids, order).tolist(),
        "nats": float(-odds.log_probability.mean()),
    }


def replaced_attention(
    model: Any, count: int, length: int, layers: Sequence[int], mixes: Sequence[float], seed: int
) -> dict[str, Any]:
    """Nats by window as weights are replaced: in one layer at a time, and in all.

    "clean" is untouched; "by layer" a running mean in each layer; "all" by kind of weights; "mixed" by share of a running mean in
    all layers. The mean by distance is taken on other windows.
    """
    ids = cut(model, texts.prose(16 * count * length + 2000, seed=seed), length)
    ids, others = ids[:count], ids[count : 2 * count]
    tables = mean_by_distance(model, others)

    def nats(method: ReplacedWeights | None = None) -> list[float]:
        with torch.no_grad(), attach(model, *([] if method is None else [method])):
            logits = model(ids).logits[:, :-1]
        lost = cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        return lost.view(count, -1).mean(1).tolist()

    return {
        "clean": nats(),
        "by layer": [nats(UniformWeights([layer])) for layer in layers],
        "all": {
            "running mean": nats(UniformWeights()),
            "mean by distance": nats(DistanceWeights(tables)),
            "self only": nats(SelfWeights()),
        },
        "mixed": [nats(UniformWeights(mix=mix)) for mix in mixes],
    }


def chance_band(count: int, odds: float = 0.25) -> tuple[float, float]:
    """Where 95 % of guesses lie."""
    from scipy.stats import binom

    low, high = binom.ppf([0.025, 0.975], count, odds) / count
    return float(low), float(high)


def share(right: Sequence[bool | float], seed: int = 0) -> tuple[float, tuple[float, float]]:
    """Mean of answers and its 95 % bootstrap interval."""
    return resampled(np.asarray(right, float), seed)


def resampled(values: np.ndarray, seed: int = 0) -> tuple[float, tuple[float, float]]:
    """Mean and 95 % bootstrap interval over entries."""
    draw = np.random.default_rng(seed).integers(len(values), size=(4000, len(values)))
    low, high = np.quantile(values[draw].mean(1), [0.025, 0.975])
    return float(values.mean()), (float(low), float(high))


def best_cell(found: Mapping[str, Sequence[bool]], choosing: int) -> str:
    """The cell with most right answers among the first `choosing` items; cells that keep the first token are controls."""
    names = [name for name in found if "first kept" not in name]
    return max(names, key=lambda name: sum(found[name][:choosing]))
