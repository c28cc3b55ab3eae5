"""Measurements of the vision-transformer experiment: training, pruning, patterns, and the regression that links them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from regard.instruments.vision import (
    METRICS,
    Importance,
    ViTAnalyzer,
    area,
    cluster,
    fit_patterns,
    head_importance,
    pca_error,
    pruning_curve,
)
from regard.papers._digits_vit import digits, train_vit
from regard.papers._planted_vit import TRUTH, lights, planted_vit


def planted_numbers() -> dict[str, Any]:
    """What the analysis says about the model whose heads are set by hand."""
    generator = torch.Generator().manual_seed(0)
    analyzer = ViTAnalyzer(
        planted_vit(), lights(64), torch.randint(0, 10, (64,), generator=generator)
    )
    names = analyzer.names()
    hops = analyzer.hops()["", 0]
    content = analyzer.strength()["content_dependence"].values["", 0]
    silent = max(abs(float(m.matrix()[0, -1])) for m in analyzer.importance().measures().values())
    here = {
        "names right": sum(a == b for a, b in zip(names, TRUTH, strict=True)),
        "S_1 of right": float(hops.share[0, 1]),
        "S_0 of self": float(hops.share[1, 0]),
        "content dependence of the first four": float(content[:4].max()),
        "content dependence of content": float(content[4]),
        "importance without output": silent,
    }
    right = (
        here["names right"] == len(TRUTH) and min(here["S_1 of right"], here["S_0 of self"]) > 0.99
    )
    return {
        "here": here,
        "holds": right and content[:4].max() < 0.01 and float(content[4]) > 0.5 and silent < 1e-6,
        "names": names,
    }


def train_and_measure(seed: int, *, quick: bool) -> dict[str, Any]:
    """Trains one model; importance on the ranking images, pruning curves on held-out ones, strength and patterns."""
    data = digits(seed)
    train, rank, held = data.train, data.rank, data.held
    if quick:
        train, rank, held = ((x[:n], y[:n]) for (x, y), n in ((train, 300), (rank, 64), (held, 64)))
    else:
        held = (held[0][:256], held[1][:256])
    model = train_vit(*train, seed=seed, epochs=4 if quick else 28, batch=50, rate=2e-3)
    analyzer = ViTAnalyzer(model, *rank)
    importance = analyzer.importance()
    layers, heads = 4, 4
    sizes = [0, 8, 16] if quick else list(range(0, layers * heads + 1, 2))

    def curve(order: list[Any]) -> list[float]:
        inner = pruning_curve(model, *held, order, sizes=sizes[1:-1], batch=256).tolist()
        return [whole, *inner, none]

    everything = importance.order("divergence")
    whole, none = pruning_curve(
        model, *held, everything, sizes=(0, layers * heads), batch=256
    ).tolist()
    curves = {
        metric: {
            "ascending": curve(importance.order(metric)),
            "descending": curve(importance.order(metric)[::-1]),
        }
        for metric in METRICS
    }
    generator = np.random.default_rng(seed)
    random = [
        curve([everything[i] for i in generator.permutation(len(everything))])
        for _ in range(2 if quick else 50)
    ]
    shares = torch.stack([h.share for h in analyzer.hops().values()])
    specials = torch.stack([h.special for h in analyzer.hops().values()])
    alone = head_importance(model, *rank, alone=True)
    return {
        "seed": seed,
        "accuracy": whole,
        "ranked": len(rank[0]),
        "pruned": len(held[0]),
        "sizes": sizes,
        "curves": curves,
        "area": {
            m: {k: area(torch.tensor(c), sizes) for k, c in v.items()} for m, v in curves.items()
        },
        "random_curves": random,
        "random": [area(torch.tensor(c), sizes) for c in random],
        "importance": {m: importance.measure(m).matrix().tolist() for m in METRICS},
        "alone": alone.measure("accuracy").matrix().tolist(),
        "correlations": correlations(importance),
        "halves": {m: split_half(importance, m) for m in METRICS},
        "strength": {name: m.matrix().tolist() for name, m in analyzer.strength().items()},
        "share": shares.tolist(),
        "sum_error": float((shares.sum(-1) + specials - 1).abs().max()),
        "names": analyzer.names(),
        "relative": analyzer.relative()[:, : 16 if quick else 64].tolist(),
    }


def _ranks(a: Tensor, b: Tensor) -> float:
    from scipy.stats import spearmanr

    if a.std() == 0 or b.std() == 0:
        return 0.0  # a metric that is the same for all heads ranks nothing
    return float(np.asarray(spearmanr(a.flatten().numpy(), b.flatten().numpy()))[0])


def correlations(importance: Importance) -> dict[str, float]:
    """Rank correlation of every pair of metrics over heads."""
    tables = {metric: importance.measure(metric).matrix() for metric in METRICS}
    names = list(tables)
    return {
        f"{a} ~ {b}": _ranks(tables[a], tables[b])
        for i, a in enumerate(names)
        for b in names[i + 1 :]
    }


def split_half(importance: Importance, metric: str, draws: int = 20) -> float:
    """Rank correlation of a metric between two random halves of the images, mean over draws."""
    table = torch.cat(list(importance.images[metric].values()))
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(draws):
        order = torch.randperm(table.shape[1], generator=generator)
        half = table.shape[1] // 2
        found.append(_ranks(table[:, order[:half]].mean(1), table[:, order[half:]].mean(1)))
    return float(np.mean(found))


def pattern_numbers(models: list[dict[str, Any]], *, quick: bool) -> dict[str, Any]:
    """Codes and groups of the maps of all models' heads."""
    from sklearn.metrics import adjusted_rand_score

    maps = torch.cat([torch.tensor(m["relative"]) for m in models])  # [heads, images, 15, 15]
    heads, images = maps.shape[:2]
    train, held = maps[:, : images // 2].flatten(0, 1), maps[:, images // 2 :].flatten(0, 1)
    epochs = 2 if quick else 50
    fits = [fit_patterns(train, epochs=epochs, seed=seed) for seed in (0, 1)]
    scaled = [fits[0].scaled(part).flatten(1) for part in (train, held)]
    linear = pca_error(scaled[0], scaled[1])
    ratios = [fit.error(held) / linear for fit in fits]
    groups = range(3, 5) if quick else range(6, 13)
    everything = maps.flatten(0, 1)
    found = [cluster(fit.codes(everything), groups=groups, seed=s) for s, fit in enumerate(fits)]
    label = found[0].label.view(heads, images).mode(1).values.numpy()
    profiles = np.array([h for m in models for layer in m["share"] for h in layer])
    distance = np.abs(profiles[:, None] - profiles[None]).sum(-1) / 2
    p, within, across = permutation(distance, label)
    names: dict[str, int] = {}
    for name in (n for m in models for n in m["names"]):
        names[name] = names.get(name, 0) + 1
    return {
        "maps": int(heads * images),
        "ratio": float(np.mean(ratios)),
        "ratios": ratios,
        "silhouette": found[0].silhouette,
        "groups": len(found[0].label.unique()),
        "rand": float(adjusted_rand_score(found[0].label.numpy(), found[1].label.numpy())),
        "p": p,
        "within": within,
        "across": across,
        "names": ", ".join(f"{name} {count}" for name, count in sorted(names.items())),
        "group": label.tolist(),
        "pictures": maps.mean(1).tolist(),
    }


def permutation(
    distance: np.ndarray, label: np.ndarray, draws: int = 1000
) -> tuple[float, float, float]:
    """Whether distances are smaller within groups than across: p value, mean within, mean across."""
    generator = np.random.default_rng(0)
    pairs = np.triu_indices(len(label), 1)

    def gap(groups: np.ndarray) -> tuple[float, float]:
        same = groups[pairs[0]] == groups[pairs[1]]
        values = distance[pairs]
        inside = values[same].mean() if same.any() else values.mean()
        outside = values[~same].mean() if (~same).any() else values.mean()
        return float(inside), float(outside)

    within, across = gap(label)
    drawn = [gap(generator.permutation(label)) for _ in range(draws)]
    smaller = sum(outside - inside >= across - within for inside, outside in drawn)
    return (smaller + 1) / (draws + 1), within, across


def linking(models: list[dict[str, Any]]) -> dict[str, Any]:
    """Cross-validated R2 of importance on mean hop, S_0, CLS share and content dependence, over heads of all models."""
    names = ("mean_hop", "self_share", "cls_share", "content_dependence")
    columns = [
        np.concatenate([np.array(m["strength"][n]).flatten() for m in models]) for n in names
    ]
    target = np.concatenate([np.array(m["importance"]["divergence"]).flatten() for m in models])
    target = np.log(target + 1e-6)
    layer = np.concatenate(
        [np.indices(np.array(m["importance"]["divergence"]).shape)[0].flatten() for m in models]
    )
    features = np.stack(columns, 1)
    found = _folds(features, target)
    wide = _folds(np.column_stack([features, layer]), target)
    spread = features.std(0) + 1e-12
    design = np.column_stack([np.ones(len(target)), (features - features.mean(0)) / spread])
    weights = np.linalg.lstsq(design, target, rcond=None)[0][1:]
    return {
        "r2": float(np.mean(found)),
        "interval": (float(np.percentile(found, 5)), float(np.percentile(found, 95))),
        "with_layer": float(np.mean(wide)),
        "heads": len(target),
        "coefficients": ", ".join(f"{n} {w:+.2f}" for n, w in zip(names, weights, strict=True)),
    }


def _folds(features: np.ndarray, target: np.ndarray, draws: int = 50) -> list[float]:
    """R2 of ridge regression (penalty 1 on standardised features) on held-out fifths, for each random division."""
    generator, found = np.random.default_rng(0), []
    for _ in range(draws):
        guess = np.empty_like(target)
        for fold in np.array_split(generator.permutation(len(target)), 5):
            rest = np.setdiff1d(np.arange(len(target)), fold)
            mean, spread = features[rest].mean(0), features[rest].std(0) + 1e-12
            x, y = (features[rest] - mean) / spread, target[rest] - target[rest].mean()
            weights = np.linalg.solve(x.T @ x + np.eye(x.shape[1]), x.T @ y)
            guess[fold] = (features[fold] - mean) / spread @ weights + target[rest].mean()
        found.append(1 - ((target - guess) ** 2).sum() / ((target - target.mean()) ** 2).sum())
    return found
