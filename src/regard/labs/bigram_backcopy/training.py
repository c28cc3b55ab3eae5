"""Trains the models of all seeds at once on fresh sequences and watches sink, drain, peak and entropy on the way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from regard._errors import InputError
from regard.engine import AttentionCall, Pipeline, Site, State, attend
from regard.instruments import Entropy, ResidualPeaks, ValueDrain
from regard.labs.bigram_backcopy.data import Backcopy
from regard.labs.bigram_backcopy.models import Models, Size, Trace, softmax_attention

FIRST = 4
"""Queries before this place see too few keys to be asked where they look."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """How an arm is trained. AdamW has betas (0.9, 0.99) and weight decay 1e-4, SGD momentum 0.9."""

    size: Size
    attention: str = "softmax"
    optimiser: str = "adamw"
    steps: int = 2000
    rate: float | int = 3e-3
    batch: int = 32
    logs: int = 16


@dataclass(frozen=True, slots=True)
class Course:
    """What was seen at each logged step; arrays `[times, seeds, ...]`, layers next where there is one.

    Attributes:
        steps: `[times]`.
        measures: by name: "ordinary to <s>", "trigger to <s>", "trigger to previous" (shares of a row's sum), "delta logit",
            its "spread" over symbols, "drain", "entropy" (softmax arms) by layer; "peak" by site, the embedding first;
            "ordinary excess" and "trigger excess" (nats over the best possible) without.
        maps: attention of one held-out sequence in the first layer by the first seed, `[times, n, n]`.
    """

    steps: np.ndarray
    measures: dict[str, np.ndarray]
    maps: np.ndarray


def train(recipe: Recipe, language: Backcopy, seeds: list[int]) -> tuple[Course, Models]:
    """The models of `seeds` after training, and their course.

    Raises:
        InputError: an optimiser of another name.
    """
    models = Models(seeds, recipe.size, len(language.marginal) + 1, recipe.attention)
    if recipe.optimiser == "adamw":
        optimiser: torch.optim.Optimizer = torch.optim.AdamW(
            models.parameters(), lr=recipe.rate, betas=(0.9, 0.99), weight_decay=1e-4
        )
    elif recipe.optimiser == "sgd":
        optimiser = torch.optim.SGD(models.parameters(), lr=recipe.rate, momentum=0.9)
    else:
        raise InputError.of("optimiser", given=recipe.optimiser, expected="adamw or sgd")
    n = recipe.size.length
    generator = torch.Generator().manual_seed(1000 + seeds[0])
    held = language.draw(64, n + 1, torch.Generator().manual_seed(10**6)).expand(len(seeds), -1, -1)
    marks = set(
        np.rint(np.geomspace(max(1, recipe.steps / 50), recipe.steps, recipe.logs))
        .astype(int)
        .tolist()
    )
    marks = sorted({0} | marks)
    seen, chunk = [], torch.empty(0)
    for step in range(recipe.steps + 1):
        if step in marks:
            seen.append(look(models, held, language))
        if step == recipe.steps:
            break
        if step % 50 == 0:
            drawn = language.draw(50 * len(seeds) * recipe.batch, n + 1, generator)
            chunk = drawn.view(50, len(seeds), recipe.batch, n + 1)
        ids = chunk[step % 50]
        optimiser.zero_grad()
        # seeds share nothing, so the gradient of the sum is each seed's own
        nats(models(ids[..., :-1]), ids).mean((1, 2)).sum().backward()
        optimiser.step()
    measures = {name: np.stack([one[name] for one, _ in seen]) for name in seen[0][0]}
    return Course(np.array(marks), measures, np.stack([image for _, image in seen])), models


def nats(
    logits: Float[Tensor, "seeds batch n vocabulary"], ids: Int[Tensor, "seeds batch longer"]
) -> Float[Tensor, "seeds batch n"]:
    """Cross-entropy of every query."""
    flat = nn.functional.cross_entropy(
        logits.flatten(0, 2), ids[..., 1:].flatten(), reduction="none"
    )
    return flat.view(logits.shape[:3])


def queries(ids: Int[Tensor, "seeds batch longer"], language: Backcopy) -> tuple[Tensor, Tensor]:
    """Which queries are ordinary and which are triggers, those before `FIRST` left out; `[seeds, batch, n]`."""
    trigger = language.is_trigger[ids[..., :-1]]
    late = torch.arange(trigger.shape[-1]) >= FIRST
    return ~trigger & late, trigger & late


def average(
    values: Float[Tensor, "seeds batch n"], chosen: Bool[Tensor, "seeds batch n"]
) -> Float[Tensor, " seeds"]:
    """Mean over the chosen queries of each seed."""
    return (values * chosen).sum((1, 2)) / chosen.sum((1, 2))


def excess(
    models: Models, ids: Tensor, language: Backcopy, **how: object
) -> dict[str, Float[np.ndarray, " seeds"]]:
    """Loss over the best possible at ordinary and at trigger queries; `how` goes to the model."""
    with torch.no_grad():
        over = nats(models(ids[..., :-1], **how), ids) - language.surprise(ids)
    ordinary, trigger = queries(ids, language)
    return {"ordinary": average(over, ordinary).numpy(), "trigger": average(over, trigger).numpy()}


@torch.no_grad()
def look(
    models: Models, ids: Tensor, language: Backcopy
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """One row of a course and the map that goes with it."""
    traces: list[Trace] = []
    models(ids[..., :-1], traces=traces)
    ordinary, trigger = queries(ids, language)
    found: dict[str, list[Tensor]] = {}
    for trace in traces:
        whole = trace.weights.sum(-1).clamp_min(1e-9)
        first = trace.weights[..., 0] / whole
        before = torch.zeros_like(first)
        before[..., 1:] = trace.weights.diagonal(-1, -2, -1) / whole[..., 1:]
        gap = sink_gap(trace.scores)
        row = {
            "ordinary to <s>": average(first, ordinary),
            "trigger to <s>": average(first, trigger),
            "trigger to previous": average(before, trigger),
            "delta logit": average(gap, ordinary),
            "spread": spread(gap, ids[..., :-1], ordinary),
        }
        for name, value in row.items():
            found.setdefault(name, []).append(value)
    measures = {name: torch.stack(values, 1).numpy() for name, values in found.items()}
    measures |= instruments(models, ids[..., :-1], traces)
    measures |= {f"{name} excess": value for name, value in excess(models, ids, language).items()}
    return measures, traces[0].weights[0, 0].numpy()


def sink_gap(scores: Float[Tensor, "*batch n n"]) -> Float[Tensor, "*batch n"]:
    """Delta logit of each query: z_i0 minus the mean of z_ij over the other visible keys, 0 < j <= i; 0 at the first."""
    others = scores.tril().sum(-1) - scores[..., 0]
    return scores[..., 0] - others / torch.arange(scores.shape[-1]).clamp_min(1)


def spread(gap: Tensor, ids: Tensor, chosen: Tensor) -> Float[Tensor, " seeds"]:
    """Standard deviation over ordinary symbols of the mean gap of each symbol, the symbols weighted by how often they came."""
    found = []
    for one, symbols, kept in zip(gap, ids, chosen, strict=True):
        which, values = symbols[kept], one[kept]
        count = torch.bincount(which)
        mean = torch.bincount(which, weights=values) / count.clamp_min(1)
        found.append(((count * (mean - values.mean()) ** 2).sum() / count.sum()).sqrt())
    return torch.stack(found)


def instruments(models: Models, ids: Tensor, traces: list[Trace]) -> dict[str, np.ndarray]:
    """The library's instruments on each seed: drain and entropy by layer, residual peak by site."""
    rows = torch.arange(len(ids))[:, None, None]
    start = (
        models.weights["tokens"][rows, ids] + models.weights["positions"][:, None, : ids.shape[-1]]
    )
    found: dict[str, list[list[float]]] = {"drain": [], "entropy": [], "peak": []}
    for seed in range(len(ids)):
        drain, entropy, peaks = ValueDrain(), Entropy(), ResidualPeaks()
        peaks.residual(State("embed", 0, "", start[seed, :16]))
        for layer, trace in enumerate(traces):
            query, key, value = (
                part[seed][:, None] for part in (trace.query, trace.key, trace.value)
            )
            call = AttentionCall.make(query, key, value, site=Site(layer))
            attend(call, Pipeline([drain, entropy]))
            peaks.residual(State("block", layer, "", trace.hidden[seed, :16]))
        layers = range(len(traces))
        for name, table in (
            ("drain", drain.compute()["value drain"]),
            ("entropy", entropy.compute()["entropy"]),
        ):
            found[name].append([float(table[f"L{layer}H0"]) for layer in layers])
        found["peak"].append(peaks.compute()[""].ratio.tolist())
    if models.weigh is not softmax_attention:
        del found["entropy"]  # the engine's weights are not the ones that were used
    return {name: np.array(values) for name, values in found.items()}


def intervene(
    models: Models, language: Backcopy, *, count: int = 256
) -> dict[str, dict[str, np.ndarray]]:
    """Change of the loss of ordinary and of trigger queries, nats, `[seeds]`, when the heads' attention is rewritten.

    "zero": nothing is read; "park": everything on <s>; "ideal": ordinary queries on <s>, triggers on the token before;
    "drained": the value of <s> is exactly 0.
    """
    n, seeds = models.size.length, len(models.weights["tokens"])
    ids = language.draw(count, n + 1, torch.Generator().manual_seed(10**6 + 1)).expand(
        seeds, -1, -1
    )
    trigger = language.is_trigger[ids[..., :-1]]
    parked = torch.zeros(n, n)
    parked[:, 0] = 1
    back = torch.eye(n).roll(-1, 1)
    back[0] = parked[0]
    ideal = torch.where(trigger[..., None], back, parked)
    edits: dict[str, Callable[[Tensor], Tensor]] = {
        "zero": torch.zeros_like,
        "park": lambda weights: parked.expand_as(weights),
        "ideal": lambda weights: ideal,
    }
    plain = excess(models, ids, language)
    changed = {name: excess(models, ids, language, edit=edit) for name, edit in edits.items()}
    changed["drained"] = excess(models, ids, language, drop_first_value=True)
    return {
        name: {kind: one[kind] - plain[kind] for kind in plain} for name, one in changed.items()
    }
