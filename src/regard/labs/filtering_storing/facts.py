"""The world: subjects, their templates and answers, and the prompts that ask about them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from regard._errors import InputError


@dataclass(frozen=True, slots=True)
class Prompts:
    """Token rows, and the tokens that may follow each, equally likely.

    Attributes:
        tokens: `[runs, prompts, length]`.
        targets: `[runs, prompts, choices]`.
    """

    tokens: Int[Tensor, "runs prompts length"]
    targets: Int[Tensor, "runs prompts choices"]

    def first(self, count: int) -> Prompts:
        """The first `count` prompts of every run."""
        return Prompts(self.tokens[:, :count], self.targets[:, :count])


@dataclass(frozen=True, slots=True)
class Facts:
    """One world for each run. Subject s is token s; then come templates, answers, the question token and distractors.

    Attributes:
        stored: the K template tokens of each subject.
        templates: size of the pool, |R|.
        answers: how many; the answer of subject s is number s modulo that.
        distractors: tokens without meaning.
    """

    stored: Int[Tensor, "runs subjects multiplicity"]
    templates: int
    answers: int
    distractors: int = 0

    @property
    def runs(self) -> int:
        return self.stored.shape[0]

    @property
    def subjects(self) -> int:
        return self.stored.shape[1]

    @property
    def multiplicity(self) -> int:
        return self.stored.shape[2]

    @property
    def template_tokens(self) -> Int[Tensor, " templates"]:
        return torch.arange(self.subjects, self.subjects + self.templates)

    @property
    def question(self) -> int:
        """p, the token that turns a subject into a question."""
        return self.subjects + self.templates + self.answers

    @property
    def vocabulary(self) -> int:
        return self.question + 1 + self.distractors

    def answer(self) -> Int[Tensor, " subjects"]:
        """The answer token of each subject."""
        return self.subjects + self.templates + torch.arange(self.subjects) % self.answers

    def after_subject(self, noise: int, generator: torch.Generator) -> Prompts:
        """`s` and then `noise` distractors, one prompt a subject: any of its templates may follow."""
        subject = torch.arange(self.subjects).expand(self.runs, -1)[..., None]
        return Prompts(
            torch.cat([subject, self._noise(self.subjects, noise, generator)], -1), self.stored
        )

    def after_template(self, noise: int, generator: torch.Generator) -> Prompts:
        """`s`, `noise` distractors, `r`, one prompt for each stored pair: the answer follows."""
        subject = torch.arange(self.subjects).repeat_interleave(self.multiplicity)
        subject = subject.expand(self.runs, -1)
        between = self._noise(subject.shape[1], noise, generator)
        tokens = torch.cat([subject[..., None], between, self.stored.flatten(1)[..., None]], -1)
        return Prompts(tokens, self.answer()[subject][..., None])

    def questions(self) -> Prompts:
        """`s, p`, one prompt a subject: the answer follows."""
        subject = torch.arange(self.subjects)
        tokens = torch.stack([subject, torch.full_like(subject, self.question)], -1)
        shape = (self.runs, -1, -1)
        return Prompts(tokens.expand(shape), self.answer()[:, None].expand(shape))

    def _noise(self, prompts: int, length: int, generator: torch.Generator) -> Tensor:
        shape = (self.runs, prompts, length)
        if not length:
            return torch.empty(shape, dtype=torch.long)
        return torch.randint(self.question + 1, self.vocabulary, shape, generator=generator)


def draw_facts(
    runs: int,
    *,
    subjects: int,
    templates: int,
    multiplicity: int,
    answers: int,
    distractors: int = 0,
    generator: torch.Generator,
) -> Facts:
    """Worlds whose subjects each have `multiplicity` different templates of the pool.

    Raises:
        InputError: more templates a subject than there are.

    >>> world = draw_facts(1, subjects=5, templates=3, multiplicity=2, answers=5, generator=torch.Generator())
    >>> world.vocabulary, world.stored.shape
    (14, torch.Size([1, 5, 2]))
    """
    if multiplicity > templates:
        raise InputError.of(
            "multiplicity", given=multiplicity, expected=f"at most {templates}, the templates"
        )
    order = torch.rand(runs, subjects, templates, generator=generator)
    return Facts(order.topk(multiplicity).indices + subjects, templates, answers, distractors)
