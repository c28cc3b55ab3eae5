"""The text that is learnt: English and code that ship with Python, cut into tokens, and windows of it as each arm wants them."""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from regard import texts
from regard.labs.sink_emergence.arms import Arm

GAP = "\n\n"


@dataclass(frozen=True, slots=True)
class Corpus:
    """Documents one after the other.

    Attributes:
        ids: token ids, all below `vocabulary`.
        edge: tokens of the training part; the rest, a tenth of the documents, is held out.
        vocabulary: size of the vocabulary. The id `vocabulary` itself occurs nowhere: it is the fixed token.
    """

    ids: Int[Tensor, "tokens"]
    edge: int
    vocabulary: int


@functools.cache
def corpus(vocabulary: int = 256) -> Corpus:
    """About 100,000 characters of English paragraphs and 600,000 of Python definitions, in a fixed random order.

    Tokens are byte pairs, merged until there are `vocabulary` of them; 256 are the bytes themselves.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    documents = texts.prose(100_000).split("\n\n") + texts.code(600_000).split("\n\n\n")
    random.Random(0).shuffle(documents)
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = split  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, initial_alphabet=split.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(documents, trainer)
    ids, starts = [], []
    for document in documents:
        starts.append(len(ids))
        ids += tokenizer.encode(document + GAP).ids
    edge = starts[len(documents) * 9 // 10]
    return Corpus(torch.tensor(ids), edge, vocabulary)


def windows(
    text: Corpus,
    arm: Arm,
    places: Float[Tensor, "batch"],
    length: int,
    generator: torch.Generator,
    *,
    held_out: bool = False,
) -> Int[Tensor, "batch length"]:
    """Sequences of `length` tokens as `arm` trains on them; `places` in [0, 1) says where in the text.

    Held-out text is treated in the same way, whole, whatever share of the training text the arm uses.
    """
    low, high = (text.edge, len(text.ids)) if held_out else (0, int(arm.share * text.edge))
    starts = low + (places * (high - length + 1 - low)).long()
    found = text.ids[starts[:, None] + torch.arange(length)]
    noise = torch.randint(text.vocabulary, found.shape, generator=generator)
    if arm.random:
        found[:, : arm.random] = noise[:, : arm.random]
    if arm.fixed:
        found[:, arm.fixed - 1] = text.vocabulary
    return found


def batch(
    text: Corpus, arms: Sequence[Arm], seeds: Sequence[int], step: int, count: int, length: int
) -> Int[Tensor, "runs count length"]:
    """What the runs see at a step: runs of one seed see the same places of the text, as far as their arms allow."""
    drawn = []
    for arm, seed in zip(arms, seeds, strict=True):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        places = torch.rand(count, generator=generator, dtype=torch.float64)
        drawn.append(windows(text, arm, places, length, generator))
    return torch.stack(drawn)


def probes(
    text: Corpus, arms: Sequence[Arm], count: int, length: int, seed: int
) -> Int[Tensor, "runs count length"]:
    """Held-out sequences, the same places for all runs."""
    drawn = []
    for arm in arms:
        generator = torch.Generator().manual_seed(seed)
        places = torch.rand(count, generator=generator, dtype=torch.float64)
        drawn.append(windows(text, arm, places, length, generator, held_out=True))
    return torch.stack(drawn)
