"""Grading a cache: the same text and the same questions, with what it still holds.

Every part is read by a branch of the cache, so one prefill answers everything and nothing that is
asked is seen by the next question. Tokens are teacher-forced in one call; regard's caches give the numbers
that feeding them one by one gives.
"""

from __future__ import annotations

import copy
from itertools import groupby
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from regard.attach.cache_names import cache_argument, takes
from regard.bench.exam import Exam, Question
from regard.cache import Cache
from regard.metrics import kl_divergence, negative_log_likelihood, top1_agreement

BATCH_BYTES = 512e6


def branch(cache: Any) -> Any:
    """A copy of a cache for one call: nothing more is scored or evicted, which could only change what comes after it."""
    if not isinstance(cache, Cache):
        return copy.deepcopy(cache)
    twin = cache.branch()
    twin.scorer = twin.budget = None
    return twin


@torch.inference_mode()
def read(
    model: nn.Module, cache: Any, tokens: Int[Tensor, "batch tokens"], logits: int = 1
) -> Float[Tensor, "batch kept vocabulary"]:
    """Feeds tokens to the model on top of `cache`, which grows; the last `logits` rows of logits."""
    device = next(model.parameters()).device
    arguments: dict[str, Any] = {cache_argument(model): cache, "use_cache": True}
    if takes(model, "logits_to_keep"):
        arguments["logits_to_keep"] = logits
    return model(input_ids=tokens.to(device), **arguments).logits[:, -logits:]


def continuation(model: nn.Module, cache: Any, exam: Exam) -> Float[Tensor, "following vocabulary"]:
    """Logits after each token of the continuation but the last: predictions of all but its first token.

    The first one is left out because it is predicted by the prefill, before anything is evicted.
    """
    tokens = exam.continuation[:-1]
    return read(model, branch(cache), tokens[None], len(tokens))[0]


def agreement(
    logits: Float[Tensor, "following vocabulary"],
    reference: Float[Tensor, "following vocabulary"],
    exam: Exam,
) -> dict[str, float]:
    """KL, NLL and top-1 agreement, averaged over the continuation; `reference` is the full cache's."""
    targets = exam.continuation[1:].to(logits.device)
    return {
        "kl": kl_divergence(reference, logits).mean().item(),
        "nll": negative_log_likelihood(logits, targets).mean().item(),
        "top1": top1_agreement(reference, logits).float().mean().item(),
    }


def answers(model: nn.Module, cache: Any, exam: Exam) -> list[tuple[str, float, float]]:
    """For each question: its measure, the depth of its answer, and the log-probability per answer token.

    Questions of a kind are read as one batch, as many at a time as 512 MB of copies of the cache allow.
    """
    at_once = max(1, int(BATCH_BYTES // max(1, held_bytes(cache))))
    graded = []
    for _, alike in groupby(exam.questions, key=lambda one: one.measure):
        questions = list(alike)
        for start in range(0, len(questions), at_once):
            graded += _grade(model, cache, questions[start : start + at_once])
    return graded


def _grade(
    model: nn.Module, cache: Any, questions: list[Question]
) -> list[tuple[str, float, float]]:
    texts = [torch.tensor(one.prompt + one.answer) for one in questions]
    longest = max(map(len, texts))
    batch = torch.stack([nn.functional.pad(text, (0, longest - len(text))) for text in texts])
    first = min(len(one.prompt) for one in questions) - 1  # before it, no prediction is graded
    copies = branch(cache)
    copies.batch_repeat_interleave(len(questions))
    logits = read(model, copies, batch, longest - first)  # padding comes last, so nobody sees it
    graded = []
    for row, one in zip(logits, questions, strict=True):
        asked = row[len(one.prompt) - 1 - first :][: len(one.answer)]
        nll = negative_log_likelihood(asked, torch.tensor(one.answer, device=asked.device))
        graded.append((one.measure, one.depth, -nll.mean().item()))
    return graded


def held_bytes(cache: Any) -> int:
    """Bytes of everything a cache holds, of regard or of transformers."""
    if isinstance(cache, Cache):
        return cache.memory()
    return sum(
        tensor.nbytes
        for layer in cache.layers
        for tensor in vars(layer).values()
        if isinstance(tensor, Tensor)
    )
