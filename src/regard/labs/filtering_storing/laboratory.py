"""The laboratory: a grid of worlds, each acquired by pre-training and extracted after fine-tuning."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from regard._errors import InputError
from regard.labs.filtering_storing.comparison import (
    Cell,
    acquisition_checks,
    extraction_checks,
    extraction_series,
)
from regard.labs.filtering_storing.facts import Facts, draw_facts
from regard.labs.filtering_storing.measures import (
    attention_shares,
    extraction,
    span_share,
    token_share,
    update_rank_profile,
)
from regard.labs.filtering_storing.models import AttentionMLP
from regard.labs.filtering_storing.training import finetune, pretrain
from regard.labs.results import Result
from regard.labs.settings import Lab, setting


@dataclass(frozen=True, kw_only=True)
class FilteringStoring(Lab):
    """The laboratory: how many facts that fine-tuning never touched can be extracted, over |R|, K and N."""

    name: ClassVar[str] = "filtering-storing"
    subjects: int = setting(60, "subjects S", low=4, high=2000)
    answers: int = setting(0, "answers, shared when fewer than subjects; 0 for S", low=0, high=2000)
    templates: tuple[int, ...] = setting(
        (8, 24), "sizes |R| of the template pool", low=1, high=500, most=16
    )
    multiplicities: tuple[int, ...] = setting(
        (1, 3, 8), "templates K of a subject", low=1, high=500, most=16
    )
    finetuned: tuple[int, ...] = setting(
        (4, 16), "subjects N of fine-tuning", low=1, high=2000, most=16
    )
    width: int = setting(128, "neurons of the MLP", low=1, high=4096)
    steps: int = setting(400, "steps of pre-training", low=1, high=100_000)
    rate: float = setting(0.01, "Adam's rate in pre-training", above=0, high=1)
    finetune_steps: int = setting(150, "steps of fine-tuning", low=1, high=100_000)
    finetune_rate: float = setting(1.0, "rate of descent in fine-tuning", above=0, high=100)
    noise: int = setting(4, "filtering: distractors between subject and template", low=1, high=64)
    distractors: int = setting(40, "filtering: distractors there are", low=1, high=1000)
    seeds: int = setting(3, "runs of each world", low=2, high=256)
    seed: int = setting(0, "first of the random seeds", low=0, high=2**31)

    def check(self) -> None:
        if max(self.finetuned) >= self.subjects:
            raise InputError.of(
                "finetuned",
                given=self.finetuned,
                expected=f"below {self.subjects}, the subjects",
                fix="the others are asked about",
            )
        if max(self.multiplicities) > min(self.templates):
            raise InputError.of(
                "multiplicities",
                given=self.multiplicities,
                expected=f"at most {min(self.templates)}, the smallest pool",
            )

    def run(self) -> Result:
        return self.report(
            [self.cell(pool, count) for pool in self.templates for count in self.multiplicities],
            self.filtering(self.templates[-1], self.multiplicities[-1]),
        )

    def facts(self, templates: int, multiplicity: int, distractors: int = 0) -> Facts:
        """The worlds of one cell, one for each seed."""
        generator = torch.Generator().manual_seed(self.seed + 1000 * templates + multiplicity)
        return draw_facts(
            self.seeds,
            subjects=self.subjects,
            templates=templates,
            multiplicity=multiplicity,
            answers=self.answers or self.subjects,
            distractors=distractors,
            generator=generator,
        )

    def acquire(self, facts: Facts, noise: int = 0) -> tuple[AttentionMLP, np.ndarray]:
        """A model after pre-training, and its losses."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        model = AttentionMLP(facts.runs, facts.vocabulary, self.width, generator=generator)
        losses = pretrain(
            model, facts, steps=self.steps, rate=self.rate, noise=noise, seed=self.seed + 2
        )
        return model, losses

    def cell(self, templates: int, multiplicity: int) -> Cell:
        """One world: acquired, then extracted after fine-tuning on each number of subjects."""
        facts = self.facts(templates, multiplicity)
        model, losses = self.acquire(facts)
        shares = attention_shares(model.attention, facts.after_template(0, torch.Generator()))
        tuned = [self.extract(model, facts, count) for count in self.finetuned]
        return {
            "templates": templates,
            "multiplicity": multiplicity,
            "after subject": losses[-1, 0].tolist(),
            "after template": losses[-1, 1].tolist(),
            "on subject": shares["subject"].tolist(),
            "tuned": tuned,
        }

    def extract(self, trained: AttentionMLP, facts: Facts, count: int) -> dict[str, Any]:
        """A copy of a trained model, fine-tuned on `count` subjects."""
        model = copy.deepcopy(trained)
        finetune(model, facts, count, [self.finetune_rate] * self.finetune_steps)
        found = extraction(model, facts, count)
        before, after = trained.features.detach(), model.features.detach()
        moved = (after - before)[:, facts.question]
        numbers: dict[str, Tensor] = {
            "seen": found.seen,
            "unseen": found.unseen,
            "unseen loss": found.unseen_loss,
            "first": update_rank_profile(before, after)[:, 0],
            "token": token_share(before, after, facts.question),
            "templates": span_share(moved, before, facts.template_tokens),
        }
        return {"finetuned": count} | {name: part.tolist() for name, part in numbers.items()}

    def filtering(self, templates: int, multiplicity: int) -> Cell:
        """Pre-training with distractors between subject and template: where attention goes at the template."""
        facts = self.facts(templates, multiplicity, self.distractors)
        model, losses = self.acquire(facts, self.noise)
        prompts = facts.after_template(self.noise, torch.Generator().manual_seed(self.seed + 3))
        shares = attention_shares(model.attention, prompts)
        return {
            "templates": templates,
            "multiplicity": multiplicity,
            "after subject": losses[-1, 0].tolist(),
            "after template": losses[-1, 1].tolist(),
        } | {name: part.tolist() for name, part in shares.items()}

    def report(self, cells: Sequence[Cell], filtered: Cell) -> Result:
        """Predictions beside what the cells measured."""
        checks = [
            *acquisition_checks(cells, filtered, self.noise),
            *extraction_checks(cells, self.width),
        ]
        return Result.of(self, (extraction_series(cells), checks))
