"""Experiments of `filtering-storing` beyond the laboratory: ablations of one world, and a language model of countries."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regard.labs.filtering_storing import (
    AttentionOnly,
    FilteringStoring,
    LowRank,
    extraction,
    finetune,
    pretrain,
    pretraining_floor,
)
from regard.nn import LanguageModel, LanguageModelConfig
from regard.papers._filtering_storing_facts import CAPITALS, QUESTION, TEMPLATES


def without_mlp(lab: FilteringStoring, templates: int, multiplicity: int) -> dict[str, Any]:
    """The same facts and training with and without an MLP: losses above the least one, and extraction."""
    facts = lab.facts(templates, multiplicity)
    count = max(lab.finetuned)
    bare = AttentionOnly(facts.runs, facts.vocabulary)
    losses = pretrain(bare, facts, steps=lab.steps, rate=lab.rate)
    whole, whole_losses = lab.acquire(facts)
    found: dict[str, Any] = {}
    for name, model, reached in (("attention", bare, losses), ("mlp", whole, whole_losses)):
        finetune(model, facts, count, [lab.finetune_rate] * lab.finetune_steps)
        asked = extraction(model, facts, count)
        found[name] = {
            "after subject": (reached[-1, 0] - pretraining_floor(multiplicity)).tolist(),
            "after template": reached[-1, 1].tolist(),
            "seen": asked.seen.tolist(),
            "unseen": asked.unseen.tolist(),
        }
    return found


def variants(
    lab: FilteringStoring, templates: int, multiplicity: int, count: int, ranks: Sequence[int]
) -> dict[str, Any]:
    """One acquired world, fine-tuned in different ways: by low-rank updates, by falling rates, and by Adam.

    The falling rate is the constant one for the first third of the steps and a tenth of it afterwards.
    """
    facts = lab.facts(templates, multiplicity)
    trained, _ = lab.acquire(facts)
    steps = lab.finetune_steps
    constant = [lab.finetune_rate] * steps
    falling = [lab.finetune_rate * (1.0 if i < steps // 3 else 0.1) for i in range(steps)]

    def tuned(
        model: torch.nn.Module, rates: Sequence[float], **options: Any
    ) -> dict[str, list[float]]:
        course = finetune(model, facts, count, rates, **options)
        found = extraction(model, facts, count)
        return {
            "seen": found.seen.tolist(),
            "unseen": found.unseen.tolist(),
            "unseen loss": found.unseen_loss.tolist(),
            "course": course[:, 1].mean(-1).tolist(),
        }

    new = lambda: copy.deepcopy(trained)  # noqa: E731
    found = {"full": tuned(new(), constant), "falling": tuned(new(), falling)}
    for rank in ranks:
        generator = torch.Generator().manual_seed(lab.seed + rank)
        found[f"rank {rank}"] = tuned(LowRank(new(), rank, generator=generator), constant)
    found["adam"] = tuned(new(), [lab.rate] * steps, optimiser=torch.optim.Adam)
    return found


@dataclass(frozen=True, slots=True)
class Size:
    """The language model of countries and its training."""

    layers: int = 4
    width: int = 64
    heads: int = 4
    steps: int = 250
    rate: float = 2e-3
    batch: int = 48
    tuning_steps: int = 150
    tuning_rate: float = 0.1
    asked: int = 50
    countries: int = len(CAPITALS)


class Words:
    """A vocabulary of whole words, country and capital names among them; 0 is padding."""

    def __init__(self) -> None:
        texts = (*TEMPLATES, QUESTION)
        words = {word for text in texts for word in text.split() if not word.startswith("{")}
        names = [name for pair in CAPITALS for name in pair]
        self.number = {word: i for i, word in enumerate(["", *sorted(words), *names])}

    def __len__(self) -> int:
        return len(self.number)

    def encode(self, text: str, country: str, capital: str) -> list[int]:
        """The words of a template with the names in their places."""
        fill = {"{country}": country, "{capital}": capital}
        return [self.number[fill.get(word, word)] for word in text.split()]

    def batch(self, rows: Sequence[list[int]]) -> Tensor:
        """Rows as one tensor, padded on the right."""
        longest = max(map(len, rows))
        return torch.tensor([row + [0] * (longest - len(row)) for row in rows])


def countries(size: Size, multiplicity: int, seed: int) -> dict[str, float]:
    """A language model reads each capital in `multiplicity` of the templates, and is taught to answer about some countries.

    Returns:
        Accuracies in completing the sentences of pre-training (`stored`), in answering about the countries of fine-tuning
        (`seen`) and about all others (`unseen`), by the likeliest of all words; the losses at the end of both trainings.
    """
    dealer, words = random.Random(seed), Words()
    pairs = list(CAPITALS)
    dealer.shuffle(pairs)
    pairs = pairs[: size.countries]
    sentences = [
        words.encode(text, *pair)
        for pair in pairs
        for text in dealer.sample(TEMPLATES, multiplicity)
    ]
    questions = [words.encode(QUESTION, *pair) for pair in pairs]
    torch.manual_seed(seed)
    model = LanguageModel(
        LanguageModelConfig(
            vocab_size=len(words),
            hidden_size=size.width,
            num_hidden_layers=size.layers,
            num_attention_heads=size.heads,
        )
    )
    optimiser = torch.optim.AdamW(model.parameters(), lr=size.rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min(1.0, (step + 1) / 20, 1.05 - step / size.steps)
    )
    read = 0.0
    for _ in range(size.steps):
        read = _step(model, words.batch(dealer.choices(sentences, k=size.batch)), optimiser)
        schedule.step()
    stored = _right(model, sentences)
    descent = torch.optim.SGD(model.parameters(), lr=size.tuning_rate)
    asked, taught = words.batch(questions[: size.asked]), 0.0
    for _ in range(size.tuning_steps):
        taught = _step(model, asked, descent, only_last=True)
    return {
        "stored": stored,
        "seen": _right(model, questions[: size.asked]),
        "unseen": _right(model, questions[size.asked :]),
        "pre-training loss": read,
        "fine-tuning loss": taught,
    }


def _step(
    model: LanguageModel, ids: Tensor, optimiser: torch.optim.Optimizer, only_last: bool = False
) -> float:
    labels = ids.masked_fill(ids == 0, -100)
    if only_last:
        labels[:, :-1] = -100
    loss = model(ids, labels=labels).loss
    optimiser.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimiser.step()
    return float(loss.detach())


@torch.no_grad()
def _right(model: LanguageModel, rows: Sequence[list[int]]) -> float:
    """Share of rows whose last word is the likeliest after the others."""
    lengths, right = {len(row) for row in rows}, 0
    model.eval()
    for length in sorted(lengths):
        ids = torch.tensor([row for row in rows if len(row) == length])
        right += int((model(ids[:, :-1]).logits[:, -1].argmax(-1) == ids[:, -1]).sum())
    model.train()
    return right / len(rows)
