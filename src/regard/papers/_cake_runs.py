"""What CAKE's experiment measures: every method at every budget on one prefill of each text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from regard.bench.replay import Prefill
from regard.bench.scoring import branch, read
from regard.cache import Budget, Cache, Cake, Scorer
from regard.cache.budgets import CakePreference, Pyramid, Uniform
from regard.cache.scorers import CAKE, H2O, SnapKV, Streaming
from regard.metrics import negative_log_likelihood
from regard.texts import NeedlePrompt

METHODS: dict[str, tuple[Scorer, type[Budget]]] = {
    "CAKE": (CAKE(), CakePreference),
    "CAKE, equal layers": (CAKE(), Uniform),
    "SnapKV": (SnapKV(), Uniform),
    "SnapKV, CAKE's layers": (CAKE(gamma=0.0), CakePreference),
    "PyramidKV": (SnapKV(), Pyramid),
    "H2O": (H2O(), Uniform),
    "StreamingLLM": (Streaming(), Uniform),
}
BASELINES = ("SnapKV", "PyramidKV", "H2O", "StreamingLLM")
PROTECTED = 36  # sinks and window of CAKE's caches


def caches(prefill: Prefill, sizes: Sequence[int]) -> Iterator[tuple[str, int, Cache]]:
    """A compressed cache for each method and budget; scorers are asked to watch once each."""
    for scorer in dict.fromkeys(scorer for scorer, _ in METHODS.values()):
        watched = prefill.watched(scorer)
        for name, (own, rule) in METHODS.items():
            for size in sizes if own == scorer else ():
                cache, _ = watched.evicted(rule(size))
                yield name, size, cache
                cache.close()
        watched.close()


def next_tokens(model: Any, text: Tensor, context: int, sizes: Sequence[int]) -> dict[str, Any]:
    """Mean NLL of `text[context + 1:]` after a cache of `text[:context]`, full and compressed.

    The first token after the context is predicted by the prefill itself, so it is left out.
    """
    prefill = Prefill(model, text[:context])
    rest = text[context:]

    def loss(cache: Cache) -> float:
        logits = read(model, branch(cache), rest[None, :-1], len(rest) - 1)[0]
        return negative_log_likelihood(logits, rest[1:]).mean().item()

    found: dict[str, Any] = {"full": loss(prefill.full)}
    for name, size, cache in caches(prefill, sizes):
        found.setdefault(name, {})[str(size)] = loss(cache)
    prefill.close()
    return found


def needle(
    model: Any, prompt: NeedlePrompt, sizes: Sequence[int], most: int = 32
) -> dict[str, Any]:
    """For the full and each compressed cache: recall of the answer in greedy decoding, and its log-probability per token.

    The reply is begun for the model with the needle's own words up to the answer; it is as long as the answer, at most `most`
    tokens.
    """
    prefill = Prefill(model, prompt.ids)
    tokenizer, answer = model.tokenizer, prompt.answer_ids
    begun = tokenizer(prompt.needle.statement, add_special_tokens=False)["input_ids"]
    start = torch.tensor([begun])

    def grade(cache: Cache) -> list[float]:
        mine = branch(cache)
        logits = read(model, mine, start)[0]
        forced = read(model, branch(mine), answer[None, :-1], len(answer) - 1)[0]
        logprob = -negative_log_likelihood(torch.cat([logits, forced]), answer).mean()
        told: list[int] = []
        for _ in answer[:most]:
            told.append(int(logits[-1].argmax()))
            logits = read(model, mine, torch.tensor([told[-1:]]))[0]
        return [prompt.recall(tokenizer.decode(told)), logprob.item()]

    found: dict[str, Any] = {"full": grade(prefill.full)}
    for name, size, cache in caches(prefill, sizes):
        found.setdefault(name, {})[str(size)] = grade(cache)
    prefill.close()
    return found


def layer_slots(model: Any, ids: Tensor, size: int) -> list[float]:
    """Slots beside the protected ones that CAKE gives each layer for a prompt, in a real cascade."""
    with Cake(model, size) as cache:
        cache.prefill(ids[None])
        return [float(layer.lengths.float().mean()) - PROTECTED for layer in cache.held]


def identities(model: Any, ids: Tensor, size: int) -> dict[str, float]:
    """How far the exact statements are from holding on this model and prompt."""
    prefill = Prefill(model, ids)
    watched = prefill.watched(CAKE())
    once, _ = watched.evicted(CakePreference(size))
    differing, slots = 0, 0
    with Cake(model, size) as cascade:
        cascade.prefill(ids[None])
        for layer in range(len(cascade.held)):
            for head in range(cascade.held[layer].rows.heads):
                same = torch.equal(cascade.kept(layer, head), once.kept(layer, head))
                differing += not same
        slots = sum(int(layer.lengths[0, 0]) for layer in cascade.held) - size * len(cascade.held)
    with Cake(model, len(ids) + 8) as whole:
        kept = whole.prefill(ids[None]).logits[0, -1]
        following = ids[:8][None]
        after = read(model, whole, following, 8)
    full = read(model, branch(prefill.full), following, 8)
    gap = max(float((kept - prefill.logits).abs().max()), float((after - full).abs().max()))
    for held in (watched, once, prefill):
        held.close()
    return {
        "heads that a cascade and one selection fill differently": float(differing),
        "slots too many or too few": float(abs(slots)),
        "largest difference of logits when everything fits": gap,
    }
