"""Experiments of `softmax-icl`: fixed predictors, trained networks, other covariances and several tasks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from regard.labs import linear_icl
from regard.labs.softmax_icl import (
    Networks,
    Prompts,
    SoftmaxICL,
    Task,
    Trained,
    best_preconditioner,
    debiased_gd,
    debiased_step,
    draw,
    effective_matrix,
    kernel_heads,
    measured_errors,
    pattern_scores,
    plain_gd,
    reduced_loss,
    ridge,
    single_head,
    task_scales,
    train,
)

PAIR = (0.13, 3.45)  # the authors' fit to a trained network of two heads
PRINTED = {  # the authors' errors at 10, 20, 40 and 100 examples
    "two heads": (0.604, 0.367, 0.243, 0.164),
    "debiased": (0.614, 0.369, 0.243, 0.163),
    "plain": (0.643, 0.371, 0.241, 0.162),
    "one head": (0.875, 0.586, 0.405, 0.284),
    "ridge": (0.194, 0.135, 0.115, 0.104),
}
PRINTED_LENGTHS = (10, 20, 40, 100)
USES = ((True, True, True, True, False, False), (False, False, True, True, True, True))


def predictors(count: int) -> dict[str, list[float]]:
    """Errors of the paper's predictors by length, as `PRINTED`; "bar" is the widest relative error bar of each length."""
    place = (5, 40, 0.1)
    alone, (eta, _) = single_head(*place), debiased_step(*place)
    kinds = {
        "two heads": lambda p: kernel_heads(
            (PAIR[0], -PAIR[0]), (PAIR[1], -PAIR[1]), p.x, p.y, p.query
        ),
        "debiased": lambda p: debiased_gd(p.x, p.y, p.query, eta),
        "plain": lambda p: plain_gd(p.x, p.y, p.query, eta),
        "one head": lambda p: kernel_heads(alone[:1], alone[1:2], p.x, p.y, p.query),
        "ridge": lambda p: ridge(p.x, p.y, p.query, 0.1 * 5),
    }
    found: dict[str, list[float]] = {name: [] for name in kinds} | {"bar": []}
    for length in PRINTED_LENGTHS:
        errors = measured_errors(kinds, Task.regression(5, length, 0.1), count, length)
        for name, (mean, _) in errors.items():
            found[name].append(float(mean))
        found["bar"].append(max(float(half / mean) for mean, half in errors.values()))
    return found


def gaps(count: int) -> dict[str, list[float]]:
    """Measured error minus the reduced formula for a pair and for a single head, as d and L grow."""
    found: dict[str, list[float]] = {"two heads": [], "one head": []}
    for d, examples in ((5, 40), (20, 160), (20, 400)):
        scale = math.sqrt(d / 5)
        omega, mu = PAIR[0] / scale, PAIR[1] * scale
        alone = single_head(d, examples, 0.1)
        pairs = {"two heads": ((omega, -omega), (mu, -mu)), "one head": (alone[:1], alone[1:2])}
        for name, (o, m) in pairs.items():
            predict = lambda p, o=o, m=m: kernel_heads(o, m, p.x, p.y, p.query)  # noqa: E731
            task = Task.regression(d, examples, 0.1)
            here = measured_errors({"a": predict}, task, count, d + examples)["a"][0]
            formula = reduced_loss(np.array(o), np.array(m), d, examples, 0.1)
            found[name].append(float(here) - float(formula))
    return found


def proportional(count: int) -> dict[str, float]:
    """Debiased descent beside the best possible at d / L = 0.2 with noise of variance 3."""
    d, examples, noise = 20, 100, 3.0
    eta, _ = debiased_step(d, examples, noise)
    kinds = {
        "descent": lambda p: debiased_gd(p.x, p.y, p.query, eta),
        "ridge": lambda p: ridge(p.x, p.y, p.query, noise * d),
    }
    errors = measured_errors(kinds, Task.regression(d, examples, noise), count, 0)
    return {name: float(mean) for name, (mean, _) in errors.items()}


def pack(trained: Trained) -> dict[str, Any]:
    """Trained networks as plain values, so that a long training can be kept."""
    networks = trained.networks
    return {
        "counts": list(networks.counts),
        "parameters": [part.tolist() for part in networks.parameters],
        "steps": trained.steps.tolist(),
        "omega": trained.omega.tolist(),
        "mu": trained.mu.tolist(),
    }


def unpack(kept: dict[str, Any]) -> Trained:
    """The networks that `pack` has made plain."""
    parts = [torch.tensor(part) for part in kept["parameters"]]
    return Trained(
        Networks(tuple(kept["counts"]), *parts),
        *(np.array(kept[key]) for key in ("steps", "omega", "mu")),
    )


def lessons(lab: SoftmaxICL, trained: Trained, count: int) -> dict[str, np.ndarray]:
    """What the claims ask of trained networks, `[seeds, networks]` each.

    The scores of the pattern; `loss` and the debiased step's `step loss` on the same prompts of L examples; `correlation` of the
    answers with that step's; and for prompts of 10 examples, where the two steps differ most, the mean squared distance of the
    answers to the debiased step over that to the plain one (`nearer`).
    """
    eta, _ = debiased_step(*lab.place)
    found = pattern_scores(trained.networks)
    p = draw(lab.task, (count,), torch.Generator().manual_seed(lab.seed + 99))
    step, answers = debiased_gd(p.x, p.y, p.query, eta), trained.networks.predict(p)
    found["loss"] = (answers - p.answer).square().mean((-2, -1)).numpy()
    found["step loss"] = np.full_like(found["loss"], float((step - p.answer).square().mean()))
    found["correlation"] = np.array(
        [
            [float(torch.corrcoef(torch.stack([a[:, 0], step[:, 0]]))[0, 1]) for a in row]
            for row in answers
        ]
    )
    p = draw(lab.task.of_length(10), (count,), torch.Generator().manual_seed(lab.seed + 98))
    answers = trained.networks.predict(p)
    far = [
        (answers - f(p.x, p.y, p.query, eta)).square().mean((-2, -1))
        for f in (debiased_gd, plain_gd)
    ]
    found["nearer"] = (far[0] / far[1]).numpy()
    return found


def linear_layer(lab: SoftmaxICL, steps: int, batch: int) -> np.ndarray:
    """u U of linear attention trained on the same prompts, `[seeds, d, d]`; it divides by L."""
    root = torch.eye(lab.dimension, dtype=torch.float64)

    def prompts(shape: tuple[int, ...], generator: torch.Generator) -> linear_icl.Prompts:
        task = torch.randn(*shape, lab.dimension, generator=generator).double()
        task = task / math.sqrt(lab.dimension)
        return linear_icl.draw_prompts(
            root, lab.examples, shape, generator, noise=lab.noise, task=task
        )

    begin = linear_icl.start(lab.dimension, 0.5, lab.seeds, torch.Generator().manual_seed(5))
    trained = linear_icl.train(prompts, begin, steps=steps, rate=0.1, batch=batch, seed=6)
    return trained.product()[-1]


def by_length(
    lab: SoftmaxICL, trained: Trained, layer: np.ndarray, lengths: Sequence[int], count: int
) -> dict[str, np.ndarray]:
    """Errors on prompts of other lengths with the weights as trained: `[lengths, seeds, networks]` of the networks, and
    of linear attention that keeps its division by the trained length, `[lengths, seeds]`; of the debiased step, `[lengths]`."""
    eta, _ = debiased_step(*lab.place)
    weights = torch.as_tensor(layer).float()

    def linear(p: Prompts) -> Tensor:
        moment = (p.x * p.y).sum(-2) / lab.examples
        return torch.einsum("bi,sij,bj->sb", p.query, weights, moment)[..., None]

    kinds = {
        "network": trained.networks.predict,
        "linear": linear,
        "step": lambda p: debiased_gd(p.x, p.y, p.query, eta),
    }
    found = [measured_errors(kinds, lab.task.of_length(n), count, 500 + n) for n in lengths]
    return {name: np.stack([row[name][0] for row in found]) for name in kinds}


def anisotropic(
    spectrum: Sequence[float], seeds: int, steps: int, batch: int, rate: float
) -> dict[str, Any]:
    """Two heads trained on inputs of covariance diag(spectrum): their matrix W over the predicted diagonal, and off it."""
    examples, noise = 40, 0.1
    task = Task.regression(len(spectrum), examples, noise, spectrum)
    networks = Networks.start([2], task, seeds, torch.Generator().manual_seed(21))
    train(networks, task, steps=steps, batch=batch, rate=rate, seed=22)
    matrix = effective_matrix(networks, 0)
    diagonal = matrix.diagonal(axis1=-2, axis2=-1)
    goal = best_preconditioner(spectrum, examples, noise)
    off = np.abs(matrix - diagonal[..., None] * np.eye(len(spectrum)))
    d = len(spectrum)
    return {
        "diagonal": diagonal.tolist(),
        "goal": goal.tolist(),
        "off": (off.sum((-2, -1)) / (d * (d - 1)) / np.abs(diagonal).mean(-1)).tolist(),
    }


def several(
    heads: Sequence[int], seeds: int, steps: int, batch: int, rate: float, count: int
) -> dict[str, Any]:
    """Networks trained on two labels that use overlapping coordinates: their errors, and what each head adds to each label."""
    task = Task.several(USES, 48, 0.1)
    networks = Networks.start(heads, task, seeds, torch.Generator().manual_seed(31))
    train(networks, task, steps=steps, batch=batch, rate=rate, seed=32)
    weights = torch.tensor(USES).float() / (1 + 4.4 / 48)

    def own(p: Prompts) -> Tensor:
        steps = [debiased_gd(p.x, p.y, p.query * w, 1.0)[..., k] for k, w in enumerate(weights)]
        return torch.stack(steps, -1)

    errors = measured_errors({"network": networks.predict, "own": own}, task, count, 33)
    return {
        "errors": errors["network"][0].tolist(),
        "own": float(errors["own"][0]),
        "scales": [task_scales(networks, i).tolist() for i in range(len(heads))],
    }


def served(scales: np.ndarray) -> np.ndarray:
    """How many labels each head serves: those to which it adds at least a tenth of the largest head's part; `[..., heads]`."""
    size = np.abs(scales)
    return (size >= 0.1 * size.max(-2, keepdims=True)).sum(-1)
