"""Experiments of `scan-and-snap` beyond the laboratory: the authors' small run and sweep, and real text."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor

from regard import texts
from regard.labs.scan_and_snap import (
    entropy,
    make_classes,
    sample_gradient,
    token_mass,
    train_sampled,
)

COMMON = [1.0] * 10
DISTINCT = np.linspace(0.1, 1, 10).tolist()


def small_run(seeds: int, steps: int = 100) -> dict[str, list[float]]:
    """The authors' run (2 last tokens, 1 next token each): mean losses by step, and z by kind of token at the end."""
    classes = make_classes(2, 1, COMMON, DISTINCT)
    one = np.ones(seeds)
    trained = train_sampled(
        classes, one, one, length=128, batch=128, steps=steps, momentum=0.9, seed=0
    )
    z = trained.attention[:, classes.last]
    own = np.stack([z[:, n][:, classes.distinct[n]] for n in range(2)], 1)
    start, end = (entropy(token_mass(part, classes.probability)).mean(1) for part in (0 * z, z))
    return {
        "losses": trained.losses.mean(0).tolist(),
        "common": z[..., classes.common].mean((0, 1)).tolist(),
        "distinct": own.mean((0, 1)).tolist(),
        "start": start.tolist(),
        "end": end.tolist(),
    }


def sweep(
    lasts: Sequence[int],
    attention: Sequence[float],
    ratios: Sequence[float],
    seeds: int,
    steps: int,
) -> dict[str, list[list[list[float]]]]:
    """Final entropy of c_n in nats, mean over classes: by number of last tokens, `[attention rates][ratios][seeds]`."""
    grid = list(itertools.product(attention, ratios, range(seeds)))
    eta_z, ratio = np.array([g[0] for g in grid]), np.array([g[1] for g in grid])
    found = {}
    for last in lasts:
        classes = make_classes(last, 2, COMMON, DISTINCT)
        trained = train_sampled(
            classes,
            eta_z * ratio,
            eta_z,
            length=128,
            batch=128,
            steps=steps,
            momentum=0.9,
            seed=last,
        )
        values = entropy(token_mass(trained.attention[:, classes.last], classes.probability)).mean(
            1
        )
        found[str(last)] = values.reshape(len(attention), len(ratios), seeds).tolist()
    return found


def windows(words: int, characters: int) -> tuple[np.ndarray, int]:
    """Python code as numbers of its `words` most frequent names and signs, all others left out; and how many it had."""
    text = re.findall(r"[A-Za-z_]\w*|[^\w\s]", texts.code(characters))
    known = {word: i for i, (word, _) in enumerate(Counter(text).most_common(words))}
    return np.array([known[word] for word in text if word in known]), len(text)


def text_fates(
    *,
    words: int,
    characters: int,
    length: int,
    batch: int,
    steps: int,
    rates: tuple[float, float],
    seed: int,
) -> dict[str, Any]:
    """Train Y and Z on windows of text; Spearman correlations of the learnt z with how distinct and how frequent a token is.

    z of a token is its mean over last tokens, weighted by their frequency. Distinctness is the entropy of the next word given
    that the token is in the window (low is distinct); the same with frequency partialled out, since rare words have few windows,
    which lowers a counted entropy.
    """
    ids, total = windows(words, characters)
    size, span = int(ids.max()) + 1, length - 1
    generator = torch.Generator().manual_seed(seed)
    text = torch.as_tensor(ids)
    decoder = torch.zeros(1, size, size, dtype=torch.float64)
    attention = torch.zeros(1, size, size, dtype=torch.float64)
    losses = []
    for _ in range(steps):
        at = torch.randint(span, len(text) - 1, (batch,), generator=generator)
        seen = _count(text, at, span, size)
        loss, (to_decoder, to_attention) = sample_gradient(
            decoder, attention, seen[None], text[at][None], text[at + 1][None]
        )
        decoder += rates[0] * to_decoder
        attention += rates[1] * to_attention
        losses.append(float(loss[0]))
    follows = torch.zeros(size, size, dtype=torch.float64)
    for at in torch.arange(span, len(text) - 1).split(2048):
        present = (_count(text, at, span, size) > 0).double()
        follows += present.mT @ torch.nn.functional.one_hot(text[at + 1], size).double()
    frequency = np.bincount(ids, minlength=size)
    spread = entropy((follows / follows.sum(1, keepdim=True)).numpy())
    z = attention[0].numpy()
    mean = (frequency / frequency.sum()) @ (z - z.mean(1, keepdims=True))
    counts = np.log(frequency)
    raw, with_count, between = (
        _spearman(*pair) for pair in ((spread, mean), (mean, counts), (spread, counts))
    )
    partial = (raw - with_count * between) / np.sqrt((1 - with_count**2) * (1 - between**2))
    return {
        "spearman": raw,
        "partial": float(partial),
        "with frequency": with_count,
        "spread": spread.tolist(),
        "z": mean.tolist(),
        "losses": [
            float(np.mean(losses[: max(1, steps // 20)])),
            float(np.mean(losses[-max(1, steps // 20) :])),
        ],
        "words": [len(ids), total],
    }


def _spearman(one: np.ndarray, other: np.ndarray) -> float:
    found: Any = spearmanr(one, other)
    return float(found.statistic)


def _count(text: Tensor, at: Tensor, span: int, size: int) -> Tensor:
    """How often each word is among the `span` before the places `at`."""
    inside = text[at[:, None] - 1 - torch.arange(span)]
    seen = torch.zeros(len(at), size, dtype=torch.float64)
    return seen.scatter_add_(1, inside, torch.ones_like(inside, dtype=torch.float64))
