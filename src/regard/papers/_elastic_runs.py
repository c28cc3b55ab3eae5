"""What the Elastic-Cache experiment measures: drift without a cache, and decoding under every policy."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

import regard
from regard.cache.diffusion import (
    BlockCache,
    Blocks,
    DiffusionCache,
    ElasticCache,
    FixedIntervalCache,
    NoCache,
)
from regard.instruments.kv_drift import COLUMNS, KVDrift
from regard.models.language import MaskedDiffusionLM
from regard.models.language.char_tasks import decode, right_parts, text_samples
from regard.models.language.masked_diffusion import answers

GAMMAS = (0.5, 0.7, 0.8, 0.9, 0.95, 0.99)
WINDOWS = (4, 8, 16, 32)
INTERVALS = (2, 4, 8)
BLOCKS = (8, 16, 32)


class FullRefresh(ElasticCache):
    """Elastic-Cache with r = -1 in every step."""

    def restart(self, canvas: Any) -> torch.Tensor:
        return torch.ones_like(canvas.step, dtype=torch.bool)


def policies(quick: bool) -> Iterator[tuple[str, DiffusionCache]]:
    """Name and policy of every run; each reference comes before what is compared with it."""
    windows, gammas = ((16,), (0.5, 0.9)) if quick else (WINDOWS, GAMMAS)
    for window in windows:
        yield f"none/{window}", NoCache(window=window)
        for gamma in gammas:
            yield f"elastic/{window}/{gamma}", ElasticCache(window=window, gamma=gamma)
        for interval in INTERVALS[:1] if quick else INTERVALS:
            yield f"interval/{window}/{interval}", FixedIntervalCache(window, interval)
    for block in (16,) if quick else BLOCKS:
        yield f"none/block/{block}", NoCache(window=Blocks(block))
        yield f"block/{block}", BlockCache(window=Blocks(block))


def decoding(model: MaskedDiffusionLM, prompts: list[str], cache: DiffusionCache) -> dict[str, Any]:
    """Answers, steps and rows of each prompt, and the CPU seconds of the whole."""
    began = time.process_time()
    found = model.generate(prompts, cache)
    return {
        "seconds": time.process_time() - began,
        "texts": answers(found, prompts),
        "steps": found.steps.tolist(),
        "projected": found.projected.tolist(),
        "fraction": found.rows_fraction,
        "updates": found.update_fraction,
    }


def speed(model: MaskedDiffusionLM, prompts: list[str], repeats: int) -> list[float]:
    """CPU time without a cache over that with gamma = 0.9 and window 16, once for each of several interleaved repeats."""
    return [
        decoding(model, prompts, NoCache(16))["seconds"]
        / decoding(model, prompts, ElasticCache(16))["seconds"]
        for _ in range(repeats)
    ]


def compare(
    run: dict[str, Any], reference: dict[str, Any], prompts: list[str]
) -> dict[str, np.ndarray]:
    """Per prompt: right parts of the answer, agreement with the reference's characters, rows of both, steps."""
    agreement = [
        float(
            np.mean(
                [
                    a == b
                    for a, b in zip(text.ljust(len(wanted) + 1, "\0"), wanted + "\0", strict=False)
                ]
            )
        )
        for text, wanted in zip(run["texts"], reference["texts"], strict=True)
    ]
    right = [right_parts(text, p) for text, p in zip(run["texts"], prompts, strict=True)]
    return {
        "agreement": np.array(agreement),
        "right": np.array(right),
        "projected": np.array(run["projected"], dtype=float),
        "reference": np.array(reference["projected"], dtype=float),
        "steps": np.array(run["steps"], dtype=float),
    }


def summary(table: dict[str, np.ndarray]) -> tuple[float, float]:
    """Work (rows projected / rows of the cache-free decoder) and mean agreement."""
    return table["projected"].sum() / table["reference"].sum(), float(table["agreement"].mean())


def front_at(points: list[tuple[float, float]], work: float) -> float | None:
    """The agreement of a policy at some work, between its settings; None outside of them. Full work agrees entirely."""
    ordered = sorted([*points, (1.0, 1.0)])
    if not ordered[0][0] <= work <= 1:
        return None
    works, agreements = zip(*ordered, strict=True)
    return float(np.interp(work, works, agreements))


def drift_profile(
    model: MaskedDiffusionLM, tasks: list[str], prose: int, window: int = 16
) -> dict[str, Any]:
    """`KVDrift` of the cache-free decoder on task prompts and held-out prose: `[layers][prompts]` of each quantity."""
    samples = text_samples(prose, seed=7, held_out=True)
    texts = [
        decode(row[: int(count)])
        for row, count in zip(samples.tokens, samples.prompts, strict=True)
    ]
    drift = KVDrift(window)
    with regard.attach(model, drift):
        model.generate([*tasks, *texts], NoCache(window), before_step=drift.before_step)
    profile = drift.compute()
    return {name: getattr(profile, name).tolist() for name in COLUMNS}


@torch.no_grad()
def exactness(model: MaskedDiffusionLM, prompts: list[str], window: int) -> dict[str, float]:
    """Full refresh through the cached path against the plain forward of the same tokens, in every step."""
    worst, steps = 0.0, 0

    def after(canvas: Any, logits: torch.Tensor, places: torch.Tensor, cost: Any) -> None:
        nonlocal worst, steps
        plain = model(canvas.tokens)
        at = places[..., None].expand(-1, -1, plain.shape[-1])
        worst = max(worst, float((plain.gather(1, at) - logits).abs().max()))
        steps += len(canvas.sequences)

    cached = model.generate(prompts, FullRefresh(window=window), after_step=after)
    plain = model.generate(prompts, NoCache(window=window))
    differ = int((cached.tokens != plain.tokens).sum() + (cached.steps != plain.steps).sum())
    return {"logits": worst, "differ": differ, "steps": steps}
