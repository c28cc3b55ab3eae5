"""Experiments of `pavlovian` beyond the laboratory: trained readers in the protocols, and the heads of a pretrained model."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from regard.engine import Method
from regard.labs.pavlovian import (
    DeltaReader,
    HebbianReader,
    Reader,
    SoftmaxReader,
    conditioned_responses,
    draw_streams,
    head_capacity_report,
    train_reader,
)
from regard.labs.pavlovian.capacity import cleaned_chain, cross_talk, redundant_heads
from regard.labs.pavlovian.learned import least_squares_error, prediction_error

if TYPE_CHECKING:
    from regard.engine.block import Block

READERS: dict[str, Callable[..., Reader]] = {
    "linear attention": HebbianReader,
    "DeltaNet": DeltaReader,
    "softmax": SoftmaxReader,
}


def clean_up(dimension: int, items: Sequence[int], draws: int) -> list[dict[str, float | int]]:
    """Error and clean-up accuracy by number of associations."""
    generator, found = torch.Generator().manual_seed(11), []
    for n in items:
        one = cross_talk(n, dimension, draws, generator=generator)
        found.append(
            {"n": n, "error": float(one.error.mean()), "accuracy": float(one.accuracy.mean())}
        )
    return found


def hops(items: int, dimension: int, depth: int, draws: int) -> dict[str, Any]:
    """Chains with a clean-up at every hop, and a majority of heads in place of one: measured, with one hop's failure."""
    generator = torch.Generator().manual_seed(12)
    right = cleaned_chain(items, dimension, depth, draws, generator=generator)
    votes = {}
    for heads in (3, 5, 9):
        alone, most = redundant_heads(items, dimension, draws, heads, generator=generator)
        votes[str(heads)] = {"alone": float(alone.mean()), "most": float(most.mean())}
    return {"right": right.mean(0).tolist(), "votes": votes}


@dataclass(frozen=True, slots=True)
class Size:
    """Streams, readers and their training."""

    dim: int = 16
    cues: int = 4
    trials: int = 16
    steps: int = 1500
    batch: int = 64
    rate: float = 0.01
    runs: int = 5
    triples: int = 500


def reader(name: str, size: Size, seed: int = 0) -> dict[str, Any]:
    """Trains one kind of reader, `size.runs` at once: its error on new streams beside the floor, and its responses."""
    model = READERS[name](size.runs, size.dim, generator=torch.Generator().manual_seed(seed))
    losses = train_reader(
        model,
        steps=size.steps,
        batch=size.batch,
        trials=size.trials,
        cues=size.cues,
        rate=size.rate,
        seed=seed + 1,
    )
    generator = torch.Generator().manual_seed(seed + 2)
    fresh = draw_streams(
        size.runs, 500, trials=size.trials, cues=size.cues, dim=size.dim, generator=generator
    )
    with torch.no_grad():
        error = prediction_error(model, fresh)
    answers = conditioned_responses(model, size.triples, seed=seed + 3)
    return {
        "error": error.tolist(),
        "floor": least_squares_error(fresh).tolist(),
        "losses": losses.mean(1)[:: max(1, size.steps // 100)].tolist(),
        "responses": {key: part.tolist() for key, part in answers.items()},
    }


def indices(responses: dict[str, list[float]]) -> dict[str, list[float]]:
    """For each run, the share of a response that an effect takes away: blocking, overshadowing, extinction."""
    pairs = {
        "blocking": ("blocked", "control"),
        "overshadowing": ("shadowed", "alone"),
        "extinction": ("extinguished", "acquired"),
    }
    return {
        name: [1 - a / b for a, b in zip(responses[less], responses[more], strict=True)]
        for name, (less, more) in pairs.items()
    }


class SlotReader(Method):
    """How much the last query of each head attends to one given slot of each row, mean over rows."""

    reads_only = True

    def __init__(self, slots: Tensor) -> None:
        self.slots = slots
        self.mass: dict[int, Tensor] = {}

    def weights(self, block: Block) -> None:
        if int(block.rows[-1]) != block.call.queries - 1:
            return
        last = block.weights[:, :, -1]
        at = (self.slots - block.keys.start)[:, None, None].expand(-1, last.shape[1], 1)
        self.mass[block.call.site.layer] = last.gather(-1, at).squeeze(-1).mean(0)


def pairs_in_context(model: Any, pairs: int, prompts: int, seed: int = 0) -> dict[str, Any]:
    """Prompts of n lines "k: v" and then "k:" again, k one of the keys: how often its value follows, and what heads do.

    Keys and values are different common words of one token.

    Returns:
        `right`, the share of prompts whose likeliest next word is the value, and `among`, the share whose likeliest of all
        stored values is; for each head `mass`, the mean attention from the last token to the value that should follow, and
        `safe`, the square root of the effective dimension of its KV head's keys at the values.
    """
    from regard.attach import attach  # loads transformers, which nothing else here needs

    dealer, words = random.Random(seed), common_words(model.tokenizer)
    rows, slots, asked, stored, places = [], [], [], [], []
    for _ in range(prompts):
        drawn = dealer.sample(words, 2 * pairs)
        keys, values = drawn[::2], drawn[1::2]
        at = dealer.randrange(pairs)
        ids, places = lines(model.tokenizer, keys, values, keys[at])
        rows.append(ids)
        slots.append(places[at])
        asked.append(at)
        stored.append(values)
    ids, target = torch.tensor(rows), torch.tensor(asked)
    looking = SlotReader(torch.tensor(slots))
    with torch.no_grad(), attach(model, looking):
        logits = model(ids).logits[:, -1]
    of_values = logits.gather(1, torch.tensor(stored))
    best = of_values.gather(1, target[:, None]).squeeze(1)
    mass = [part for _, heads in sorted(looking.mass.items()) for part in heads.tolist()]
    report = head_capacity_report(model, ids, torch.tensor(places))
    group = len(mass) // len(report)
    return {
        "pairs": pairs,
        "prompts": prompts,
        "right": float((best == logits.amax(1)).float().mean()),
        "among": float((best == of_values.amax(1)).float().mean()),
        "mass": mass,
        "safe": [one.safe for one in report for _ in range(group)],
    }


def lines(
    tokenizer: Any, keys: Sequence[int], values: Sequence[int], asked: int
) -> tuple[list[int], list[int]]:
    """The tokens of a prompt, which begins with an empty line for attention to rest on, and where its values are."""
    (colon,), (end,) = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ":\n")
    ids, places = [end], []
    for key, value in zip(keys, values, strict=True):
        ids += [key, colon, value, end]
        places.append(len(ids) - 2)
    return [*ids, asked, colon], places


def common_words(tokenizer: Any, count: int = 2000) -> list[int]:
    """The first tokens that are a space and four or more lower-case letters; merges are numbered by how common they are."""
    found = [
        number
        for text, number in tokenizer.get_vocab().items()
        if text[:1] == "Ġ"
        and len(word := text[1:]) >= 4
        and word.isascii()
        and word.isalpha()
        and word.islower()
    ]
    return sorted(found)[:count]


def rank_correlation(x: Sequence[float], y: Sequence[float], draws: int = 2000) -> dict[str, float]:
    """Spearman's correlation with a bootstrap interval over the points (95 %); NaN for fewer than five."""
    import numpy as np
    from scipy.stats import spearmanr

    if len(x) < 5:
        return {"rho": math.nan, "low": math.nan, "high": math.nan}
    rng, values = np.random.default_rng(0), np.array([x, y])
    samples = []
    for _ in range(draws):
        pick = values[:, rng.integers(0, len(x), len(x))]
        if (pick.std(1) > 0).all():
            found: Any = spearmanr(*pick)
            samples.append(found[0])
    low, high = np.quantile(samples, [0.025, 0.975])
    whole: Any = spearmanr(x, y)
    return {"rho": float(whole[0]), "low": float(low), "high": float(high)}
