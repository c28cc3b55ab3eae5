"""Experiments of `linear-icl` beyond the laboratory: starts, laws of labels and queries, and a softmax transformer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from regard.labs.flows import flow
from regard.labs.linear_icl import (
    draw_prompts,
    icl_gamma,
    icl_largest_scale,
    icl_optimum,
    icl_risk,
    icl_risk_of_labels,
    icl_velocity,
    measured_risk,
)


def starts(
    spectrum: Sequence[float], examples: int, factors: Sequence[float], seeds: int, horizon: float
) -> dict[str, list[float]]:
    """Share of random starts that reach the global minimum, by start scale over the theorem's bound.

    "theorem" are the theorem's starts (U a positive semi-definite matrix), "indefinite" ones with a random symmetric U. A start
    counts when u U is within 1 % of Gamma^-1, so that the mirrored minimum (-u, -U) counts as well.
    """
    covariance, rng = np.diag(spectrum), np.random.default_rng(0)
    size, bound = len(spectrum), icl_largest_scale(np.diag(spectrum), examples)
    goal = np.linalg.inv(icl_gamma(covariance, examples))
    found: dict[str, list[float]] = {"theorem": [], "indefinite": []}
    for kind, shares in found.items():
        for factor in factors:
            draw = rng.standard_normal((seeds, size, size))
            square = draw @ draw.swapaxes(1, 2) if kind == "theorem" else draw + draw.swapaxes(1, 2)
            square /= np.linalg.norm(square, axis=(1, 2), keepdims=True)
            scale = factor * bound
            u, matrix = flow(
                lambda u, m: icl_velocity(u, m, covariance, examples),
                (np.full(seeds, scale), scale * square),
                np.array([0.0, horizon]),
                accuracy=1e-7,
            )
            product = u[-1][:, None, None] * matrix[-1]
            near = np.abs(product - goal).max((1, 2)) < 0.01 * np.abs(goal).max()
            shares.append(100 * float(near.mean()))
    return found


def cubic_labels(
    spectrum: Sequence[float], examples: int, test: int, count: int, noise: float
) -> dict[str, float]:
    """Labels `<w, x>^3 + noise` for one fixed w: the risk measured and by theorem 2.

    With s = w^T Lambda w: a = 3 s w, E[y^2] = 15 s^3 + noise, so the best linear risk is 6 s^3 + noise, and
    `Cov(x y) = (15 s^3 + noise) Lambda + 81 s^2 Lambda w w^T Lambda`.
    """
    covariance = np.diag(spectrum)
    w = np.array([0.6, -0.4, 0.5, 0.3, 0.2])[: len(spectrum)]
    s = float(w @ covariance @ w)
    outer = np.outer(covariance @ w, covariance @ w)
    # E[x x^T z^6] = 15 s^3 Lambda + 90 s^2 (Lambda w)(Lambda w)^T, minus the square of the mean 3 s Lambda w
    spread = (15 * s**3 + noise) * covariance + (90 - 9) * s**2 * outer
    theory = icl_risk_of_labels(covariance, examples, test, 6 * s**3 + noise, 3 * s * w, spread)
    root, best = (
        torch.as_tensor(np.sqrt(covariance)),
        np.linalg.inv(icl_gamma(covariance, examples)),
    )
    here, bar = measured_risk(
        best,
        lambda size, generator: draw_prompts(
            root,
            test,
            (size,),
            generator,
            noise=noise,
            label=lambda y: y**3,
            task=torch.as_tensor(w).expand(size, -1),
        ),
        count,
        7,
    )
    return {"here": here, "bar": bar, "theory": theory}


def other_queries(spectrum: Sequence[float], count: int) -> dict[str, float]:
    """Queries of another law than the prompt's: independent of the prompt, and orthogonal to all of it.

    The first has an exact risk, `tr[(G E[S S] - 2 Lambda) G Q] + tr Q` with Q the queries' covariance and G = Gamma^-1, which
    vanishes as N and M grow. The second is at Lambda = I with fewer examples than dimensions, where the prediction is exactly 0.
    """
    covariance = np.diag(spectrum)
    size, query = len(spectrum), np.diag(np.linspace(3, 0.5, len(spectrum)))
    found: dict[str, float] = {}
    for examples in (20, 200, 2000):
        inverse = np.linalg.inv(icl_gamma(covariance, examples))
        second = icl_gamma(covariance, examples) @ covariance
        theory = (
            np.trace(inverse @ second @ inverse @ query)
            - 2 * np.trace(inverse @ covariance @ query)
            + np.trace(query)
        )
        here, bar = measured_risk(
            inverse,
            lambda n, generator, m=examples: draw_prompts(
                torch.as_tensor(np.sqrt(covariance)),
                m,
                (n,),
                generator,
                query=torch.as_tensor(np.sqrt(query)),
            ),
            max(500, count // max(1, examples // 20)),
            11,
        )
        found |= {
            f"N = M = {examples}": here,
            f"{examples} bar": bar,
            f"{examples} theory": float(theory),
        }
    generator = torch.Generator().manual_seed(12)
    drawn = draw_prompts(torch.eye(size, dtype=torch.float64), size - 1, (200,), generator)
    inputs = drawn.matrices[:, :-1, :-1]
    normal = torch.linalg.svd(inputs).U[..., -1]
    weight = torch.as_tensor(np.linalg.inv(icl_gamma(np.eye(size), 20)))
    mean = (inputs * drawn.matrices[:, -1:, :-1]).mean(-1)
    found["orthogonal"] = float(((normal @ weight.mT) * mean).sum(-1).abs().max())
    return found


@dataclass(frozen=True, slots=True)
class Size:
    """The softmax transformer and its training."""

    dimension: int = 5
    examples: int = 20
    width: int = 32
    layers: int = 2
    heads: int = 2
    steps: int = 1200
    batch: int = 32
    rate: float = 2e-3


class Reader(nn.Module):
    """A causal softmax transformer that reads examples (x_i; y_i) and answers queries (x; 0), with learnt positions as GPT-2 has.

    Queries stand after a given number of examples: each sees those and itself, so one pass answers several.
    """

    def __init__(self, size: Size, longest: int) -> None:
        super().__init__()
        self.read = nn.Linear(size.dimension + 1, size.width)
        self.places = nn.Parameter(0.02 * torch.randn(longest + 1, size.width))
        layer = nn.TransformerEncoderLayer(
            size.width, size.heads, 4 * size.width, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.body = nn.TransformerEncoder(
            layer, size.layers, norm=nn.LayerNorm(size.width), enable_nested_tensor=False
        )
        self.answer = nn.Linear(size.width, 1)

    def forward(self, examples: Tensor, queries: Tensor, after: Tensor) -> Tensor:
        """Answers `[batch, queries]`; query j stands after the first `after[j]` examples."""
        shown, asked = examples.shape[1], queries.shape[1]
        blank = torch.cat([queries, torch.zeros_like(queries[..., :1])], -1)
        x = self.read(torch.cat([examples, blank], 1))
        x = x + self.places[torch.cat([torch.arange(shown), after])]
        sees = torch.eye(shown + asked, dtype=torch.bool)
        sees[:shown, :shown] = torch.ones(shown, shown, dtype=torch.bool).tril()
        sees[shown:, :shown] = torch.arange(shown) < after[:, None]
        return self.answer(self.body(x, mask=~sees))[:, shown:, 0]


def _data(
    size: Size, batch: int, examples: int, asked: int, scale: float, generator: torch.Generator
) -> tuple[Tensor, ...]:
    x = math.sqrt(scale) * torch.randn(batch, examples + asked, size.dimension, generator=generator)
    w = torch.randn(batch, size.dimension, 1, generator=generator)
    y = x @ w
    shown = torch.cat([x[:, :examples], y[:, :examples]], -1)
    return shown, x[:, examples:], y[:, examples:, 0]


def reader(
    size: Size, scales: Sequence[float], lengths: Sequence[int], count: int, seed: int
) -> dict[str, Any]:
    """Train the softmax transformer at Lambda = I; its risks by covariance scale (at the trained length) and by length."""
    torch.manual_seed(seed)
    model = Reader(size, max(lengths))
    generator = torch.Generator().manual_seed(seed + 1)
    optimizer = torch.optim.Adam(model.parameters(), size.rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 100, 1.05 - step / size.steps)
    )
    n = size.examples
    after, losses = torch.tensor([n // 4, n // 2, 3 * n // 4, n, n, n]), []
    for _ in range(size.steps):
        shown, queries, wanted = _data(size, size.batch, n, len(after), 1.0, generator)
        loss = (model(shown, queries, after) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    model.eval()

    @torch.no_grad()
    def risk(examples: int, scale: float, seed: int) -> float:
        generator, parts = torch.Generator().manual_seed(seed), []
        for _ in range(max(1, count // 250)):
            shown, queries, wanted = _data(size, 250, examples, 4, scale, generator)
            parts.append(
                (model(shown, queries, torch.full((4,), examples)) - wanted).square().mean()
            )
        return float(torch.stack(parts).mean())

    return {
        "scales": [risk(n, c, 1000 + i) for i, c in enumerate(scales)],
        "lengths": [risk(m, 1.0, 2000 + i) for i, m in enumerate(lengths)],
        "loss": losses[:: max(1, size.steps // 100)],
    }


def linear(size: Size, scales: Sequence[float], lengths: Sequence[int]) -> dict[str, list[float]]:
    """The trained linear layer's exact risks at the same settings."""
    eye = np.eye(size.dimension)
    return {
        "scales": [icl_risk(eye, size.examples, size.examples, test=c * eye) for c in scales],
        "lengths": [icl_risk(eye, size.examples, m) for m in lengths],
    }


def limit_error(
    spectrum: Sequence[float], examples: int, scale: float, rate: float, horizon: float
) -> dict[str, float]:
    """Reduced gradient descent from U proportional to I: where u ends, and how far u U is from Gamma^-1."""
    from regard.labs.flows import descend

    covariance = np.diag(spectrum)
    size = len(spectrum)
    u, matrix = descend(
        lambda u, m: icl_velocity(u, m, covariance, examples),
        (np.array(scale), scale * np.eye(size) / math.sqrt(size)),
        np.array([horizon]),
        rate,
    )
    goal, block = icl_optimum(covariance, examples)
    return {
        "u": float(u[-1]),
        "u*": goal,
        "product": float(np.abs(u[-1] * matrix[-1] - goal * block).max()),
    }
