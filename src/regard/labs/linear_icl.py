"""One layer of linear attention learns linear regression in context (arXiv 2306.09927): the flow, its limit, and its risk.

The task: w ~ N(0, I_d); x_1 .. x_N and the query x_q ~ N(0, Lambda); y_i = <w, x_i>. A prompt is the matrix E with columns
(x_i; y_i) and last (x_q; 0). The layer

    f(E) = E + W_PV E (E^T W_KQ E) / N,        y_hat = f(E)[d + 1, N + 1],

is trained on L = 1/2 E (y_hat - <w, x_q>)^2. With Gamma = (1 + 1/N) Lambda + (tr Lambda / N) I, gradient flow from a small
balanced start ends in

    W_KQ = tr(Gamma^-2)^(-1/4) [Gamma^-1 0; 0 0],   W_PV = tr(Gamma^-2)^(1/4) [0 0; 0 1]:

the trained layer predicts x_q^T Gamma^-1 (1/M) sum_i y_i x_i on a prompt of any length M: one step of preconditioned descent.
Every function named `icl_...` is a prediction; `draw_prompts`, `predict` and `train` are the experiment; `LinearICL` puts them
side by side. Of the entries of W_PV only the last row, and of W_KQ only the first d columns, reach the prediction.

Risks are E (y_hat - y)^2 without the factor 1/2.

Source: Zhang, Frei, Bartlett 2024, "Trained Transformers Learn Linear Models In-Context", JMLR 25(49).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from regard._errors import InputError
from regard.labs._lab import Check, Lab, Result, Series, State, descend, flow, interval, setting

Matrix = Float[np.ndarray, "d d"]


def icl_gamma(covariance: Matrix, examples: int) -> Matrix:
    """`Gamma = (1 + 1/N) Lambda + (tr Lambda / N) I`.

    >>> icl_gamma(np.eye(2), 4)
    array([[1.75, 0.  ],
           [0.  , 1.75]])
    """
    trace = np.trace(covariance)
    return (1 + 1 / examples) * covariance + trace / examples * np.eye(len(covariance))


def icl_optimum(covariance: Matrix, examples: int) -> tuple[float, Matrix]:
    """The limit of gradient flow (theorem 1): `u = tr(Gamma^-2)^(1/4)` in the corner of W_PV, `U = Gamma^-1 / u` in W_KQ."""
    inverse = np.linalg.inv(icl_gamma(covariance, examples))
    u = float(np.trace(inverse @ inverse)) ** 0.25
    return u, inverse / u


def icl_largest_scale(covariance: Matrix, examples: int) -> float:
    """The start scale below which theorem 1 promises convergence: `sigma^2 ||Gamma||_op sqrt(d) < 2`."""
    gamma = icl_gamma(covariance, examples)
    return math.sqrt(2 / (np.linalg.norm(gamma, 2) * math.sqrt(len(gamma))))


def icl_velocity(
    u: Float[np.ndarray, "*runs"],
    matrix: Float[np.ndarray, "*runs d d"],
    covariance: Matrix,
    examples: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Minus the gradient of the population loss in the reduced variables u (corner of W_PV) and U (block of W_KQ).

    `l = 1/2 u^2 tr(Lambda U Gamma Lambda U^T) - u tr(Lambda^2 U^T) + 1/2 tr Lambda`, so
    `du/dt = tr(Lambda^2 U^T) - u tr(Lambda U Gamma Lambda U^T)` and `dU/dt = u Lambda^2 - u^2 Gamma Lambda U Lambda`.
    """
    square, kernel = covariance @ covariance, icl_gamma(covariance, examples) @ covariance
    pushed = kernel @ matrix @ covariance
    du = np.einsum("ij,...ij->...", square, matrix) - u * (pushed * matrix).sum((-2, -1))
    u_ = u[..., None, None]
    return np.asarray(du), u_ * square - u_**2 * pushed


def icl_loss(
    u: Float[np.ndarray, "*runs"],
    matrix: Float[np.ndarray, "*runs d d"],
    covariance: Matrix,
    examples: int,
) -> Float[np.ndarray, "*runs"]:
    """The population loss whose gradient `icl_velocity` follows."""
    kernel = icl_gamma(covariance, examples) @ covariance
    quadratic = ((kernel @ matrix @ covariance) * matrix).sum((-2, -1))
    linear = np.einsum("ij,...ij->...", covariance @ covariance, matrix)
    return np.asarray(0.5 * u**2 * quadratic - u * linear + 0.5 * np.trace(covariance))


def icl_risk(
    covariance: Matrix,
    examples: int,
    test_examples: int,
    noise: float = 0.0,
    test: Matrix | None = None,
) -> float:
    """The trained layer's risk on prompts of M examples with random tasks w ~ N(0, I) (theorems 2 and 3).

    With the prompt's covariance L (`test`; the training covariance by default), G = Gamma^-1 and label noise of variance s,

        R = s + (1/M) tr[((tr L + s) L + L^2) G L G] + tr[(G L - I)^T L (G L - I)].

    For L = Lambda the last term is O(1/N^2); for another L it stays.

    >>> round(icl_risk(np.diag([2.0, 1, 0.5, 0.25]), 20, 5), 3)
    2.327
    """
    inverse = np.linalg.inv(icl_gamma(covariance, examples))
    here = covariance if test is None else test
    spread = (np.trace(here) + noise) * here + here @ here
    bias = inverse @ here - np.eye(len(here))
    variance = np.trace(spread @ inverse @ here @ inverse) / test_examples
    return float(noise + variance + np.trace(bias.T @ here @ bias))


def icl_risk_of_labels(
    covariance: Matrix,
    examples: int,
    test_examples: int,
    best: float,
    coefficient: Float[np.ndarray, " d"],
    spread: Matrix,
) -> float:
    """The risk for one fixed law of labels, linear or not (theorem 2).

    With `best` = min_w E (y - <w, x>)^2, a = Lambda^-1 E[x y] and Sigma = Cov(x y),

        R = best + (1/M) tr(Sigma Gamma^-2 Lambda) + (1/N^2) a^T Gamma^-2 Lambda (Lambda + tr(Lambda) I)^2 a.
    """
    inverse = np.linalg.inv(icl_gamma(covariance, examples))
    twice = inverse @ inverse @ covariance
    shifted = covariance + np.trace(covariance) * np.eye(len(covariance))
    bias = coefficient @ twice @ shifted @ shifted @ coefficient / examples**2
    return float(best + np.trace(spread @ twice) / test_examples + bias)


def icl_random_covariance_limit(
    moments: Sequence[float | int], dimension: int, examples: int
) -> float:
    """What u U converges to, times I, when each prompt draws its own diagonal covariance with i.i.d. entries (theorem 4).

    `P = (E[Gamma Lambda^2])^-1 E[Lambda^2] = m2 / ((1 + 1/N) m3 + (m3 + (d - 1) m1 m2) / N)`, m1 .. m3 the moments of an entry.

    >>> icl_random_covariance_limit((1, 2, 6), 3, 40)
    0.3125
    """
    one, two, three = moments
    return two / ((1 + 1 / examples) * three + (three + (dimension - 1) * one * two) / examples)


def icl_random_covariance_risk(
    moments: Sequence[float | int], dimension: int, examples: int, test_examples: float | int
) -> float:
    """The risk after training on random covariances, on further ones; it does not vanish as N and M grow.

    `R = d [P^2 (m3 + (2 m3 + (d - 1) m1 m2) / M) - 2 P m2 + m1]`; for exponential entries it tends to d / 3.

    >>> round(icl_random_covariance_risk((1, 2, 6), 3, 10**9, math.inf), 6)
    1.0
    """
    one, two, three = moments
    p = icl_random_covariance_limit(moments, dimension, examples)
    second = three + (2 * three + (dimension - 1) * one * two) / test_examples
    return dimension * (p**2 * second - 2 * p * two + one)


@dataclass(frozen=True, slots=True)
class Prompts:
    """Prompts and the label of each query."""

    matrices: Float[Tensor, "*batch rows columns"]
    answers: Float[Tensor, "*batch"]


def draw_prompts(
    root: Float[Tensor, "... d d"],
    examples: int,
    batch: tuple[int, ...],
    generator: torch.Generator,
    *,
    noise: float = 0.0,
    label: Callable[[Tensor], Tensor] | None = None,
    task: Float[Tensor, "... d"] | None = None,
    query: Float[Tensor, "... d d"] | None = None,
) -> Prompts:
    """Prompts `[*batch, d + 1, N + 1]` of inputs with covariance `root root^T` (one root for all, or one a prompt), in float64.

    Args:
        root: a square root of the covariance.
        examples: N.
        batch: how many, as a shape.
        generator: draws everything.
        noise: variance added to every label, the query's too.
        label: maps <w, x> to the label before noise; the identity by default.
        task: w, drawn from N(0, I) by default.
        query: a root of the query's own covariance; the same by default.
    """
    size = root.shape[-1]

    def normal(*shape: int) -> Tensor:
        # single precision draws cost a quarter; all arithmetic on them is double
        return torch.randn(*shape, generator=generator).double()

    x = normal(*batch, examples + 1, size)
    inputs = x @ root.mT
    if query is not None:
        inputs = torch.cat([inputs[..., :-1, :], x[..., -1:, :] @ query.mT], -2)
    w = normal(*batch, size) if task is None else task
    y = (inputs * w[..., None, :]).sum(-1)
    y = y if label is None else label(y)
    if noise:
        y = y + math.sqrt(noise) * normal(*y.shape)
    shown = torch.cat([y[..., :-1], torch.zeros_like(y[..., :1])], -1)
    return Prompts(torch.cat([inputs, shown[..., None]], -1).mT, y[..., -1])


def predict(
    value: Float[Tensor, "*runs rows rows"],
    key: Float[Tensor, "*runs rows rows"],
    prompts: Float[Tensor, "*runs batch rows columns"],
) -> Float[Tensor, "*runs batch"]:
    """The layer's `y_hat` for W_PV = `value` and W_KQ = `key`: the last entry of W_PV (E E^T / N) W_KQ (x_q; 0).

    The division is by the labelled examples in these very prompts, one less than the columns.
    """
    read = prompts[..., -1] @ key.mT  # W_KQ (x_q; 0)
    moment = prompts @ prompts.mT / (prompts.shape[-1] - 1)
    # products of such small matrices are faster as sums
    mixed = (moment * read[..., None, :]).sum(-1)
    return (mixed * value[..., None, -1, :]).sum(-1)


@dataclass(frozen=True, slots=True)
class Trained:
    """Weights after training and at logged steps; the first axis of each is time.

    Attributes:
        steps: `[times]`.
        value, key: W_PV and W_KQ, `[times, seeds, d + 1, d + 1]`.
    """

    steps: np.ndarray
    value: Float[np.ndarray, "times seeds rows rows"]
    key: Float[np.ndarray, "times seeds rows rows"]

    def product(self) -> Float[np.ndarray, "times seeds d d"]:
        """u U, which decides the prediction whatever the balance of the two matrices."""
        return self.value[..., -1, -1, None, None] * self.key[..., :-1, :-1]

    def stray(self) -> float:
        """At the end, the largest entry that theory keeps at zero (w21 of W_PV, w12 of W_KQ) over the largest of all."""
        value, key = np.abs(self.value[-1]), np.abs(self.key[-1])
        stray = max(value[:, -1, :-1].max(), key[:, -1, :-1].max())
        return float(stray / max(value.max(), key.max()))


def start(
    dimension: int, scale: float, seeds: int, generator: torch.Generator
) -> tuple[Float[Tensor, "seeds rows rows"], Float[Tensor, "seeds rows rows"]]:
    """The theorem's start: W_PV = sigma [0 0; 0 1], W_KQ = sigma [Theta Theta^T 0; 0 0], `||Theta Theta^T||_F = 1`."""
    theta = torch.randn(seeds, dimension, dimension, dtype=torch.float64, generator=generator)
    square = theta @ theta.mT
    square = square / square.flatten(1).norm(dim=1)[:, None, None]
    value = torch.zeros(seeds, dimension + 1, dimension + 1, dtype=torch.float64)
    key = value.clone()
    value[:, -1, -1] = scale
    key[:, :-1, :-1] = scale * square
    return value, key


def train(
    draw: Callable[[tuple[int, ...], torch.Generator], Prompts],
    begin: tuple[Tensor, Tensor],
    *,
    steps: int,
    rate: float,
    batch: int,
    seed: int,
    logs: int = 40,
) -> Trained:
    """Stochastic gradient descent on all entries of both matrices, every seed at once, fresh prompts at every step.

    For the last third of the steps the rate falls to a tenth, so that the noise of the batches settles.

    Cost: O(steps x seeds x batch x d x N).
    """
    value, key = (part.clone().requires_grad_() for part in begin)
    generator = torch.Generator().manual_seed(seed)
    marks = sorted(set(np.unique(np.rint(np.geomspace(1, steps, logs)).astype(int)).tolist()))
    kept = [(0, value.detach().clone(), key.detach().clone())]
    for step in range(1, steps + 1):
        prompts = draw((len(value), batch), generator)
        wrong = predict(value, key, prompts.matrices) - prompts.answers
        gradients = torch.autograd.grad(0.5 * wrong.square().mean(-1).sum(), (value, key))
        late = max(0.0, step / steps - 2 / 3) * 3
        with torch.no_grad():
            for part, gradient in zip((value, key), gradients, strict=True):
                part -= rate * 0.1**late * gradient
        if step in marks:
            kept.append((step, value.detach().clone(), key.detach().clone()))
    steps_, values, keys = zip(*kept, strict=True)
    return Trained(np.array(steps_), torch.stack(values).numpy(), torch.stack(keys).numpy())


def measured_risk(
    weight: Matrix, prompts: Callable[[int, torch.Generator], Prompts], count: int, seed: int
) -> tuple[float, float]:
    """Mean squared error of the layer with u U = `weight` over `count` prompts, and half of its 95 % interval."""
    size = len(weight) + 1
    value, key = (torch.zeros(size, size, dtype=torch.float64) for _ in range(2))
    value[-1, -1] = 1.0
    key[:-1, :-1] = torch.as_tensor(weight)
    generator, errors, left = torch.Generator().manual_seed(seed), [], count
    while left > 0:
        drawn = prompts(min(left, 5000), generator)
        errors.append((predict(value, key, drawn.matrices) - drawn.answers).square())
        left -= 5000
    squares = torch.cat(errors)
    return float(squares.mean()), 1.96 * float(squares.std()) / math.sqrt(count)


@dataclass(frozen=True, kw_only=True)
class LinearICL(Lab):
    """The laboratory: gradient flow and descent, the trained layer, and its risk under shifts."""

    name: ClassVar[str] = "linear-icl"
    spectrum: tuple[float, ...] = setting(
        (2.0, 1.0, 0.5, 0.25),
        "eigenvalues of the covariance Lambda; d is their number",
        above=0,
        high=100,
        most=32,
    )
    examples: int = setting(20, "labelled examples N of a training prompt", low=1, high=10_000)
    test_examples: tuple[int, ...] = setting(
        (5, 10, 20, 50, 200), "labelled examples M of a test prompt", low=1, high=10_000, most=32
    )
    training_lengths: tuple[int, ...] = setting(
        (5, 10, 20, 40, 80), "values of N for the 1/N^2 law", low=1, high=10_000, most=32
    )
    scales: tuple[float, ...] = setting(
        (0.5, 0.75, 1.0, 1.5, 2.0, 3.0),
        "covariance shifts c: prompts and queries of covariance c Lambda",
        above=0,
        high=100,
        most=32,
    )
    init_scale: float = setting(0.1, "sigma, the scale of the start", above=0, high=100)
    noise: float = setting(0.0, "variance of label noise at test", low=0, high=100)
    horizon: float = setting(100.0, "time of the gradient flow", above=0, high=100_000)
    rate: float = setting(0.02, "learning rate of descent", above=0, high=1)
    training_rate: float = setting(0.005, "learning rate of training on prompts", above=0, high=1)
    steps: int = setting(1200, "steps of training on prompts", low=10, high=1_000_000)
    batch: int = setting(128, "prompts in a training step", low=1, high=100_000)
    seeds: int = setting(4, "runs trained at once", low=2, high=1024)
    prompts: int = setting(10_000, "prompts for each measured risk", low=100, high=10_000_000)
    random_dimension: int = setting(
        3, "d for random covariances with Exp(1) eigenvalues", low=1, high=32
    )
    random_examples: int = setting(40, "N for random covariances", low=1, high=10_000)
    seed: int = setting(0, "first of the random seeds", low=0, high=2**31)

    def check(self) -> None:
        covariance = np.diag(self.spectrum)
        u, matrix = icl_optimum(covariance, self.examples)
        top = np.linalg.norm(icl_gamma(covariance, self.examples), 2) * max(self.spectrum) ** 2
        curvature = float(u**2 + (matrix**2).sum()) * top  # bounds the Hessian at the limit
        if self.rate * curvature >= 2:
            raise InputError.of(
                "rate",
                given=self.rate,
                expected=f"below {2 / curvature:.3g} for this spectrum",
                fix="descent would not be stable at the limit",
            )

    @property
    def covariance(self) -> Matrix:
        """Lambda."""
        return np.diag(self.spectrum)

    def run(self) -> Result:
        series: list[Series] = []
        checks: list[Check] = []
        for part in (self._flow, self._train, self._risk, self._shift, self._random):
            found, compared = part()
            series += found
            checks += compared
        return Result(
            self.name,
            self.values(),
            {one.name: one for one in series},
            {one.name: one for one in checks},
        )

    def _begin(self) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        return start(len(self.spectrum), self.init_scale, self.seeds, generator)

    def _flow(self) -> tuple[list[Series], list[Check]]:
        """The reduced dynamics from random starts: SciPy's solver, gradient descent, and the limit."""
        value, key = self._begin()
        begin: State = (value[:, -1, -1].numpy(), key[:, :-1, :-1].numpy())
        velocity = lambda u, m: icl_velocity(u, m, self.covariance, self.examples)  # noqa: E731
        times = (
            np.unique(np.rint(np.r_[0, np.geomspace(self.rate, self.horizon, 40)] / self.rate))
            * self.rate
        )
        solved = flow(velocity, begin, times)
        walked = descend(velocity, begin, times, self.rate)
        u, matrix = icl_optimum(self.covariance, self.examples)
        far = lambda state: np.abs(state[1] - matrix).max((-2, -1)) + np.abs(state[0] - u)  # noqa: E731
        balance = lambda state: state[0] ** 2 - (state[1] ** 2).sum((-2, -1))  # noqa: E731
        mean, half = interval(walked[0], 1)
        distance, spread = interval(far(walked), 1)
        loss = lambda state: icl_loss(state[0], state[1], self.covariance, self.examples).mean(1)  # noqa: E731
        slowest = self._slowest()
        left = 2 * float(far((begin[0], begin[1])).max()) * math.exp(-slowest * self.horizon)
        series = [
            Series(
                "u",
                times,
                mean,
                half,
                solved[0].mean(1),
                "time",
                "u, corner of W_PV",
                panel="gradient flow",
                log="x",
            ),
            Series(
                "loss",
                times,
                loss(walked),
                np.zeros(len(times)),
                loss(solved),
                "time",
                "population loss",
                log="x",
            ),
            Series(
                "distance",
                times,
                distance,
                spread,
                far(solved).mean(1),
                "time",
                "distance to the closed form",
                log="xy",
            ),
        ]
        checks = [
            Check(
                "limit",
                "Gradient flow ends in the closed form: largest distance over the starts",
                float(far(solved)[-1].max()),
                0.0,
                tolerance=max(1e-4, left),
                why=f"1e-4, or what the slowest mode (rate {slowest:.3g}) leaves at time {self.horizon:g}",
            ),
            Check(
                "descent",
                "Gradient descent follows the flow: largest difference in u over all times",
                float(np.abs(solved[0] - walked[0]).max()),
                0.0,
                tolerance=2
                * self.rate
                * float(np.abs(np.gradient(solved[0], times, axis=0)).max()),
                why="Euler's method is a step of time late at most: two steps at the highest speed of u",
            ),
            Check(
                "balance",
                "u^2 - ||U||_F^2 is conserved: largest drift along the flow",
                float(np.abs(balance(solved) - balance(solved)[0]).max()),
                0.0,
                tolerance=1e-6,
                why="the solver's accuracy, 1e-9 a step",
            ),
        ]
        return series, checks

    def _slowest(self) -> float:
        """The rate at which the last mode of U approaches the limit: `u^2 gamma_i lambda_i lambda_j`, the smallest."""
        u, _ = icl_optimum(self.covariance, self.examples)
        gamma = np.diag(icl_gamma(self.covariance, self.examples))
        small = np.array(self.spectrum)
        return float(u**2 * np.outer(gamma * small, small).min())

    def _train(self) -> tuple[list[Series], list[Check]]:
        """All entries of both matrices, trained on prompts."""
        root = torch.as_tensor(np.sqrt(self.covariance))
        begin = self._begin()
        trained = train(
            lambda batch, generator: draw_prompts(root, self.examples, batch, generator),
            begin,
            steps=self.steps,
            rate=self.training_rate,
            batch=self.batch,
            seed=self.seed + 1,
        )
        optimum = np.linalg.inv(icl_gamma(self.covariance, self.examples))
        # the rate falls in the last third, so time is the integral of the rate
        step = np.arange(1, self.steps + 1)
        late = np.clip(step / self.steps - 2 / 3, 0, None) * 3
        clock = np.r_[0, np.cumsum(self.training_rate * 0.1**late)]
        times = clock[trained.steps]
        solved = flow(
            lambda u, m: icl_velocity(u, m, self.covariance, self.examples),
            (begin[0][:, -1, -1].numpy(), begin[1][:, :-1, :-1].numpy()),
            times,
        )
        expected = (solved[0][..., None, None] * solved[1]).mean(1)
        product = trained.product()
        series = []
        for i, eigenvalue in enumerate(self.spectrum[:6]):
            mean, half = interval(product[:, :, i, i], 1)
            series.append(
                Series(
                    f"lambda = {eigenvalue:g}",
                    times,
                    mean,
                    half,
                    expected[:, i, i],
                    "time, steps x rate",
                    "u U, diagonal entries",
                    panel="training on prompts",
                    log="x",
                )
            )
        predicted = (solved[0][-1][:, None, None] * solved[1][-1]).mean(0)
        mean, half = interval(product[-1], 0)
        scale = float(np.abs(optimum).max())
        off = np.abs(mean - predicted) / scale
        worst = np.unravel_index(off.argmax(), off.shape)
        checks = [
            Check(
                "trained",
                "u U of the fully trained layer, its worst entry, against the flow at the same time (as a share of "
                "the largest entry)",
                float(mean[worst]) / scale,
                float(predicted[worst]) / scale,
                tolerance=0.03,
                error=float(half[worst]) / scale,
                why="3 %: the noise of the batches at these rates",
            ),
            Check(
                "blocks",
                "The blocks w21 and w12 stay at zero: largest entry after training, over the largest of all",
                trained.stray(),
                0.0,
                tolerance=0.02,
                why="2 %: the noise of the batches",
            ),
        ]
        return series, checks

    def _risk(self) -> tuple[list[Series], list[Check]]:
        """Risk against M for the training N, and against N for a long test prompt."""
        root = torch.as_tensor(np.sqrt(self.covariance))
        best = np.linalg.inv(icl_gamma(self.covariance, self.examples))
        fine = np.geomspace(min(self.test_examples), max(self.test_examples), 60)
        found = [self._measure(best, root, m, i) for i, m in enumerate(self.test_examples)]
        theory = [
            icl_risk(self.covariance, self.examples, m, self.noise) for m in self.test_examples
        ]
        # along the line M is not a whole number; the law is affine in 1/M
        ends = [icl_risk(self.covariance, self.examples, m, self.noise) for m in (1, 10**12)]
        line = (fine, ends[1] + (ends[0] - ends[1]) / fine)
        series = [
            _series(
                "risk",
                self.test_examples,
                found,
                theory,
                "M, examples of a test prompt",
                "risk",
                line=line,
                log="xy",
            )
        ]
        worst = max(
            range(len(found)), key=lambda i: abs(found[i][0] - theory[i]) / max(found[i][1], 1e-12)
        )
        checks = [
            _agree(
                "risk",
                f"Risk on prompts of {self.test_examples[worst]} examples, the worst of all lengths",
                found[worst],
                theory[worst],
            )
        ]
        # the part that stays at M -> infinity, exactly: x_q^T (Gamma^-1 Lambda - I) w
        excess, exact = [], []
        for i, n in enumerate(self.training_lengths):
            bias = np.linalg.inv(icl_gamma(self.covariance, n)) @ self.covariance - np.eye(
                len(best)
            )
            generator = torch.Generator().manual_seed(self.seed + 100 + i)
            kind = {"dtype": torch.float64, "generator": generator}
            x = torch.randn(self.prompts, len(best), **kind) @ root.mT
            w = torch.randn(self.prompts, len(best), **kind)
            squares = ((x @ torch.as_tensor(bias)) * w).sum(-1).square()
            excess.append(
                (float(squares.mean()), 1.96 * float(squares.std()) / math.sqrt(self.prompts))
            )
            exact.append(icl_risk(self.covariance, n, 10**12))
        series.append(
            _series(
                "risk, long prompts",
                self.training_lengths,
                excess,
                exact,
                "N, examples of a training prompt",
                "risk for M -> infinity",
                log="xy",
            )
        )
        if len(self.training_lengths) > 1:
            far = sorted(self.training_lengths)[-2:]
            index = [self.training_lengths.index(n) for n in far]
            slope = lambda values: math.log(values[1] / values[0]) / math.log(far[1] / far[0])  # noqa: E731
            bar = math.hypot(*(excess[i][1] / excess[i][0] for i in index)) / math.log(
                far[1] / far[0]
            )
            checks.append(
                Check(
                    "slope",
                    f"Exponent of the risk in N between {far[0]} and {far[1]} (-2 in the limit)",
                    slope([excess[i][0] for i in index]),
                    slope([exact[i] for i in index]),
                    tolerance=max(0.1, bar),
                    error=bar,
                    why="0.1, or the error bar; the formula at these N, not only its limit, is the prediction",
                )
            )
        return series, checks

    def _measure(
        self, weight: Matrix, root: Tensor, examples: int, index: int
    ) -> tuple[float, float]:
        return measured_risk(
            weight,
            lambda count, generator: draw_prompts(
                root, examples, (count,), generator, noise=self.noise
            ),
            self.prompts,
            self.seed + 10 + index,
        )

    def _shift(self) -> tuple[list[Series], list[Check]]:
        """Prompts and queries of covariance c Lambda."""
        best = np.linalg.inv(icl_gamma(self.covariance, self.examples))
        examples = self.examples
        root = torch.as_tensor(np.sqrt(self.covariance))
        found, theory = [], []
        for i, c in enumerate(self.scales):
            found.append(self._measure(best, math.sqrt(c) * root, examples, 50 + i))
            theory.append(
                icl_risk(self.covariance, self.examples, examples, self.noise, c * self.covariance)
            )
        fine = np.linspace(min(self.scales), max(self.scales), 80)
        line = (
            fine,
            np.array(
                [
                    icl_risk(
                        self.covariance, self.examples, examples, self.noise, c * self.covariance
                    )
                    for c in fine
                ]
            ),
        )
        worst = max(
            range(len(found)), key=lambda i: abs(found[i][0] - theory[i]) / max(found[i][1], 1e-12)
        )
        series = [
            _series(
                "covariate shift",
                self.scales,
                found,
                theory,
                "c, covariance of the test over training",
                "risk",
                line=line,
                log="y",
            )
        ]
        return series, [
            _agree(
                "shift",
                f"Risk at a covariance {self.scales[worst]:g} times as large, the worst of all shifts",
                found[worst],
                theory[worst],
            )
        ]

    def _random(self) -> tuple[list[Series], list[Check]]:
        """A new diagonal covariance in each prompt, its entries exponential."""
        size, moments = self.random_dimension, (1.0, 2.0, 6.0)
        begin = start(
            size, self.init_scale, self.seeds, torch.Generator().manual_seed(self.seed + 2)
        )

        def draw(batch: tuple[int, ...], generator: torch.Generator, examples: int = 0) -> Prompts:
            entries = torch.empty(*batch, size, dtype=torch.float64).exponential_(
                generator=generator
            )
            root = torch.diag_embed(entries.sqrt())
            return draw_prompts(root, examples or self.random_examples, batch, generator)

        trained = train(
            draw,
            begin,
            steps=self.steps,
            rate=self.training_rate,
            batch=self.batch,
            seed=self.seed + 3,
        )
        limit = icl_random_covariance_limit(moments, size, self.random_examples)
        entries = np.diagonal(trained.product(), axis1=-2, axis2=-1).mean(-1)
        mean, half = interval(entries, 1)
        steps = np.maximum(trained.steps, 1)
        series = [
            Series(
                "random covariance",
                steps,
                mean,
                half,
                np.full(len(mean), limit),
                "step",
                "u U, mean of the diagonal",
                log="x",
            )
        ]
        found = []
        for i, examples in enumerate(self.test_examples):
            found.append(
                measured_risk(
                    limit * np.eye(size),
                    lambda count, generator, m=examples: draw((count,), generator, m),
                    self.prompts,
                    self.seed + 200 + i,
                )
            )
        theory = [
            icl_random_covariance_risk(moments, size, self.random_examples, m)
            for m in self.test_examples
        ]
        fine = np.geomspace(min(self.test_examples), max(self.test_examples), 60)
        line = (
            fine,
            np.array(
                [icl_random_covariance_risk(moments, size, self.random_examples, m) for m in fine]
            ),
        )
        series.append(
            _series(
                "random covariance, risk",
                self.test_examples,
                found,
                theory,
                "M, examples of a test prompt",
                "risk",
                line=line,
                log="x",
            )
        )
        worst = max(
            range(len(found)), key=lambda i: abs(found[i][0] - theory[i]) / max(found[i][1], 1e-12)
        )
        return series, [
            Check(
                "random",
                "u U after training on random covariances, mean of the diagonal",
                float(mean[-1]),
                limit,
                tolerance=0.03 * limit,
                error=float(half[-1]),
                why="3 %: the noise of the batches",
            ),
            _agree(
                "random risk",
                f"Risk on random covariances at {self.test_examples[worst]} examples, the worst of all",
                found[worst],
                theory[worst],
            ),
        ]


def _series(
    name: str,
    x: Sequence[float | int],
    found: list[tuple[float, float]],
    theory: list[float],
    x_label: str,
    y_label: str,
    *,
    line: tuple[np.ndarray, np.ndarray] | None = None,
    log: str = "",
) -> Series:
    measured, error = np.array(found).T
    return Series(
        name,
        np.array(x, float),
        measured,
        error,
        np.array(theory),
        x_label,
        y_label,
        line=line,
        log=log,
    )


def _agree(name: str, says: str, found: tuple[float, float], theory: float) -> Check:
    """A measured risk equals its formula; the chosen one is the worst of several, so twice its error bar is allowed."""
    return Check(
        name,
        says,
        found[0],
        theory,
        tolerance=max(found[1], 0.01 * theory),
        error=found[1],
        why="1 % of the risk or its 95 % interval, whichever is wider, beside that interval: the worst of several is shown",
    )
