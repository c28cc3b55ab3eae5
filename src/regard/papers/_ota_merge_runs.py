"""What the OTA experiment runs: one small base, an expert for each of three tasks, and every way to make one model of them.

* `tasks`: sums of two-digit numbers, strings turned round, strings sorted, all of the same ten digits;
* `family`: a base that knows a little of each, its experts with their optimisers' second moments, a model trained on all;
* `graft_scores`: what an expert keeps when only some of its edits stay, chosen by curvature, by size or at random;
* `merges`: the published merge, its parts alone, and what it is compared with;
* `through_files`: the same merge from files on disk to a file on disk.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from regard.labs.tasks import IGNORED, Samples, Task
from regard.nn import LanguageModel, LanguageModelConfig
from regard.weights import (
    capture_second_moments,
    compress_rank_one,
    curvature_rank_correlation,
    curvature_similarity,
    fast_fisher_graft,
    graft_masks,
    load_second_moments,
    mask_density,
    mask_density_by_layer,
    mask_structure,
    merge_dare,
    merge_files,
    merge_linear,
    merge_ota,
    merge_ties,
    save_second_moments,
)
from regard.weights.merge_reports import role_of

Weights = Mapping[str, Tensor]
PLUS, EQUALS, TURN, SORT, END = range(10, 15)
VOCABULARY, LENGTH, DIGITS = 15, 14, 6


@dataclass(frozen=True)
class Size:
    """Sizes of the models and of their training."""

    width: int = 48
    layers: int = 2
    heads: int = 4
    shares: tuple[int, int, int] = (32, 8, 8)
    base_steps: int = 450
    base_rate: float = 3e-3
    steps: int = 200
    rate: float = 3e-4
    asked: int = 500
    lost: float = 2.0


def tasks() -> dict[str, Task]:
    """`12+45=750`, `R314159=951413`, `S314159=113459`; the answers are asked. A tenth of the sums is held out.

    Sums are written with the units first, the order in which they are made: so small a model learns them in minutes then.
    """
    return {
        "addition": Task("addition", VOCABULARY, LENGTH, _sums),
        "reversal": Task("reversal", VOCABULARY, LENGTH, functools.partial(_strings, TURN)),
        "sorting": Task("sorting", VOCABULARY, LENGTH, functools.partial(_strings, SORT)),
    }


def _sums(count: int, generator: torch.Generator, held_out: bool) -> Samples:
    order = torch.randperm(10_000, generator=torch.Generator().manual_seed(0))
    among = order[:1000] if held_out else order[1000:]
    drawn = among[torch.randint(len(among), (count,), generator=generator)]
    first, second = drawn // 100, drawn % 100
    total = first + second
    plus, equals, end = (torch.full_like(drawn, mark) for mark in (PLUS, EQUALS, END))
    ids = torch.stack(
        [first // 10, first % 10, plus, second // 10, second % 10, equals]
        + [total % 10, total // 10 % 10, total // 100]
        + [end] * (LENGTH - 9),
        1,
    )
    labels = torch.full_like(ids, IGNORED)
    labels[:, 6:9] = ids[:, 6:9]
    return Samples(ids, labels)


def _strings(mark: int, count: int, generator: torch.Generator, held_out: bool) -> Samples:
    text = torch.randint(10, (count, DIGITS), generator=generator)
    answer = text.flip(1) if mark == TURN else text.sort(1).values
    edge = torch.ones(count, 1, dtype=torch.long)
    ids = torch.cat([mark * edge, text, EQUALS * edge, answer], 1)
    labels = torch.full_like(ids, IGNORED)
    labels[:, DIGITS + 2 :] = answer
    return Samples(ids, labels)


def fit(
    model: LanguageModel,
    chosen: Mapping[str, int],
    steps: int,
    size: Size,
    *,
    rate: float,
    seed: int,
) -> torch.optim.Optimizer:
    """AdamW with the published beta_2 = 0.999, warm-up and a straight line down; `chosen` has the rows of each task in a step."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.999), weight_decay=0.0)
    warm, every = max(1, steps // 20), tasks()
    model.train()
    for step in range(steps):
        share = min((step + 1) / warm, (steps - step) / (steps - warm + 1))
        optimiser.param_groups[0]["lr"] = rate * share
        parts = [every[name].draw(rows, seed * 1_000_003 + step) for name, rows in chosen.items()]
        ids, labels = (torch.cat([getattr(p, n) for p in parts]) for n in ("ids", "labels"))
        model(ids, labels=labels).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
    model.eval()
    return optimiser


@torch.no_grad()
def exact_match(model: nn.Module, task: Task, count: int, seed: int) -> float:
    """Percent of held-out samples whose whole answer is right, each digit predicted from what stands before it."""
    samples = task.draw(count, seed, held_out=True)
    output: Any = model(samples.ids)
    found = output.logits[:, :-1].argmax(-1)
    wanted = samples.labels[:, 1:]
    return 100 * float(((found == wanted) | (wanted == IGNORED)).all(1).double().mean())


def new_model(size: Size, seed: int) -> LanguageModel:
    torch.manual_seed(seed)
    return LanguageModel(
        LanguageModelConfig(
            vocab_size=VOCABULARY,
            hidden_size=size.width,
            num_hidden_layers=size.layers,
            num_attention_heads=size.heads,
        )
    )


def state(model: LanguageModel) -> dict[str, Tensor]:
    """The parameters, those that are tied once."""
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters()}


@dataclass(frozen=True)
class Family:
    """One base and what was trained from it; `together` learnt from all tasks, in as many steps as the experts took in all."""

    model: LanguageModel
    base: Weights
    experts: list[Weights]
    moments: list[Weights]
    together: Weights

    def score(self, weights: Weights, task: Task, asked: int, seed: int) -> float:
        self.model.load_state_dict(weights, strict=False)  # the tied head follows its embedding
        return exact_match(self.model, task, asked, seed)

    def scores(self, weights: Weights, asked: int, seed: int) -> list[float]:
        return [self.score(weights, task, asked, seed) for task in tasks().values()]


def family(size: Size, seed: int) -> Family:
    """Trains a base on all tasks for a while, an expert for each, and one model on all."""
    model, batch = new_model(size, seed), dict(zip(tasks(), size.shares, strict=True))
    fit(model, batch, size.base_steps, size, rate=size.base_rate, seed=seed)
    base, experts, moments = state(model), [], []
    for number, name in enumerate(tasks()):
        model.load_state_dict(base, strict=False)
        own, whole = 100 * (seed + 1) + number, {name: sum(size.shares)}
        optimiser = fit(model, whole, size.steps, size, rate=size.rate, seed=own)
        experts.append(state(model))
        moments.append(capture_second_moments(optimiser, model))
    model.load_state_dict(base, strict=False)
    fit(model, batch, len(batch) * size.steps, size, rate=size.rate, seed=100 * (seed + 1) + 50)
    return Family(model, base, experts, moments, state(model))


VALIDATION, TEST = 10**6, 2 * 10**6
GRID = (0.05, 0.1, 0.2, 0.3, 0.4, 0.6, 1.0)
SCALES = (0.2, 0.3, 0.4, 0.5, 0.7, 1.0)


def grafts(found: Family, number: int, kind: str, density: float) -> dict[str, Tensor]:
    """An expert with a share of its edits, kept by curvature, by size or at random."""
    base, expert, moments = found.base, found.experts[number], found.moments[number]
    if kind == "curvature":
        return fast_fisher_graft(base, expert, moments, density)
    if kind == "size":
        return fast_fisher_graft(
            base, expert, {n: torch.ones_like(v) for n, v in moments.items()}, density
        )
    generator = torch.Generator().manual_seed(number)
    masks = {n: torch.rand(v.shape, generator=generator) < density for n, v in moments.items()}
    return {n: torch.where(masks[n], expert[n], tensor) for n, tensor in base.items()}


KINDS = ("curvature", "size", "random")


def graft_scores(found: Family, asked: int, densities: Sequence[float]) -> dict[str, Any]:
    """Exact match of each expert on its own task by what decides and by density; mean over the experts."""
    every = list(tasks().values())
    return {
        kind: [
            sum(
                found.score(grafts(found, n, kind, density), task, asked, TEST)
                for n, task in enumerate(every)
            )
            / len(every)
            for density in densities
        ]
        for kind in KINDS
    }


def smallest_densities(
    found: Family, asked: int, grid: Sequence[float], lost: float
) -> list[float]:
    """For each expert the least density whose graft is within `lost` points of the whole expert, on validation samples."""
    chosen = []
    for number, task in enumerate(tasks().values()):
        whole = found.score(found.experts[number], task, asked, VALIDATION)
        enough = (
            density
            for density in grid
            if found.score(grafts(found, number, "curvature", density), task, asked, VALIDATION)
            >= whole - lost
        )
        chosen.append(next(enough, 1.0))
    return chosen


def merges(found: Family, densities: list[float], asked: int) -> dict[str, dict[str, Tensor]]:
    """One model of three, in every way; task arithmetic takes the scale that is best on validation samples."""
    base, experts, moments = found.base, found.experts, found.moments
    grafted = [
        fast_fisher_graft(base, expert, v, density)
        for expert, v, density in zip(experts, moments, densities, strict=True)
    ]
    small = [compress_rank_one(v) for v in moments]
    count = len(experts)

    def arithmetic(scale: float) -> dict[str, Tensor]:
        return merge_linear(base, experts, scale=count * scale)

    best = max(SCALES, key=lambda scale: sum(found.scores(arithmetic(scale), asked, VALIDATION)))
    return {
        "linear": merge_linear(base, experts),
        "task arithmetic": arithmetic(best),
        "TIES": merge_ties(base, experts, density=densities),
        "DARE-TIES": merge_dare(base, experts, density=densities),
        "Fisher": merge_ota(base, experts, moments, power=1.0),
        "OTA": merge_ota(base, experts, moments),
        "FFG + linear": merge_linear(base, grafted),
        "FFG + TIES": merge_ties(base, grafted, density=1.0),
        "OTA + FFG": merge_ota(base, experts, moments, densities=densities),
        "OTA + FFG, rank 1": merge_ota(base, experts, small, densities=densities),
        "OTA + FFG, scale-free": merge_ota(
            base, experts, moments, densities=densities, scale_free=True
        ),
    }


def masks_of(found: Family, densities: Sequence[float]) -> dict[str, Any]:
    """Densities by role and by layer, ranks and empty lines of the masks, mean over the experts."""
    parts = zip(found.experts, found.moments, densities, strict=True)
    every = [graft_masks(found.base, expert, v, density) for expert, v, density in parts]
    roles, layers = [mask_density(m) for m in every], [mask_density_by_layer(m) for m in every]
    matrices = [
        mask_structure(mask)
        for masks in every
        for name, mask in masks.items()
        if mask.ndim == 2 and role_of(name) != "embedding"
    ]
    count = len(matrices)
    return {
        "roles": {role: sum(d[role] for d in roles) / len(roles) for role in roles[0]},
        "layers": [
            {role: sum(d[(layer, role)] for d in layers) / len(layers) for role in MATRICES}
            for layer in range(found.model.config.num_hidden_layers)
        ],
        "rank": sum(m.effective_rank / max(m.chance_rank, 1e-9) for m in matrices) / count,
        "empty": sum(m.empty for m in matrices) / count,
        "chance empty": sum(m.chance_empty for m in matrices) / count,
    }


MATRICES = ("query", "key", "value", "output", "feed-forward")


def shared_curvature(moments: Sequence[Weights]) -> dict[str, float]:
    """How alike the moments of two experts are, mean over pairs, and how alike when each tensor of one is shuffled."""
    pairs = [(a, b) for n, a in enumerate(moments) for b in moments[n + 1 :]]
    generator = torch.Generator().manual_seed(0)

    def shuffled(second: Weights) -> dict[str, Tensor]:
        return {
            n: v.flatten()[torch.randperm(v.numel(), generator=generator)].view(v.shape)
            for n, v in second.items()
        }

    def mean(
        measure: Callable[[Weights, Weights], float], other: Callable[[Weights], Weights]
    ) -> float:
        return sum(measure(a, other(b)) for a, b in pairs) / len(pairs)

    return {
        "cosine": mean(curvature_similarity, lambda v: v),
        "cosine, shuffled": mean(curvature_similarity, shuffled),
        "ranks": mean(curvature_rank_correlation, lambda v: v),
        "ranks, shuffled": mean(curvature_rank_correlation, shuffled),
    }


def through_files(found: Family, densities: list[float], place: Path) -> dict[str, float]:
    """The merge from files to a file: largest difference from the merge in memory; bytes of moments, whole and compressed."""
    experts, moments, small = [], [], []
    base = _saved(found, found.base, place / "base")
    for number, (expert, second) in enumerate(zip(found.experts, found.moments, strict=True)):
        experts.append(_saved(found, expert, place / f"expert{number}"))
        moments.append(save_second_moments(second, place / f"v{number}.safetensors"))
        small.append(
            save_second_moments(second, place / f"small{number}.safetensors", compress=True)
        )
    out = merge_files(base, experts, place / "merged", moments=moments, densities=densities)
    merged = state(LanguageModel.from_pretrained(out))
    direct = merge_ota(found.base, found.experts, found.moments, densities=densities)
    read = [load_second_moments(path) for path in small]
    expected = [compress_rank_one(v) for v in found.moments]
    return {
        "merged": max(float((merged[n] - direct[n]).abs().max()) for n in direct),
        "moments": max(
            float((one[n] - two[n]).norm() / two[n].norm().clamp_min(1e-30))
            for one, two in zip(read, expected, strict=True)
            for n in two
        ),
        "whole": _kept(moments[0]),
        "compressed": _kept(small[0]),
    }


def _saved(found: Family, weights: Weights, place: Path) -> Path:
    found.model.load_state_dict(weights, strict=False)
    found.model.save_pretrained(place)
    return place


def _kept(path: Path) -> int:
    """Bytes of the tensors in a file."""
    return sum(tensor.nbytes for tensor in load_file(path).values())


def measure(size: Size, seed: int) -> dict[str, Any]:
    """Everything about one family, in plain numbers."""
    found = family(size, seed)
    densities = smallest_densities(found, size.asked, GRID, size.lost)
    made = merges(found, densities, size.asked)
    alone = {"base": found.base, "trained on all": found.together}
    alone |= {f"{name} expert": w for name, w in zip(tasks(), found.experts, strict=True)}
    with tempfile.TemporaryDirectory() as place:
        files = through_files(found, densities, Path(place))
    return {
        "densities": densities,
        "scores": {n: found.scores(w, size.asked, TEST) for n, w in (alone | made).items()},
        "grafts": graft_scores(found, size.asked, GRID),
        "masks": masks_of(found, densities),
        "curvature": shared_curvature(found.moments),
        "files": files,
        "parameters": sum(tensor.numel() for tensor in found.base.values()),
    }


def quadratic_gaps(seed: int) -> dict[str, float]:
    """Distance of the merge from the least sum of diagonal quadratic losses whose curvature is the moment."""
    generator = torch.Generator().manual_seed(seed)
    experts = torch.randn(3, 1000, dtype=torch.float64, generator=generator)
    curvature = torch.randn(3, 1000, dtype=torch.float64, generator=generator).square() + 1e-3
    least = torch.linalg.solve(curvature.sum(0).diag(), (curvature * experts).sum(0))
    return {
        f"power {power:g}": float((merged_quadratic(experts, curvature, power) - least).abs().max())
        for power in (1.0, 0.5)
    }


def merged_quadratic(experts: Tensor, curvature: Tensor, power: float) -> Tensor:
    base = torch.zeros_like(experts[0])
    merged = merge_ota(
        {"w": base},
        [{"w": expert} for expert in experts],
        [{"w": one} for one in curvature],
        power=power,
    )
    return merged["w"]
