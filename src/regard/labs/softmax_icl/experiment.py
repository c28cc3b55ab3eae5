"""The experiment: prompts, one-layer networks of several heads, their training, and what they have learnt."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

Number = float | int


@dataclass(frozen=True, slots=True)
class Task:
    """A law of prompts.

    Attributes:
        examples: L.
        inputs: `[d]`, standard deviation of each coordinate of x.
        weights: `[labels, d]`, standard deviation of each coefficient of each label.
        noise: `[labels]`, variance of each label's noise.
    """

    examples: int
    inputs: Float[Tensor, " d"]
    weights: Float[Tensor, "labels d"]
    noise: Float[Tensor, " labels"]

    @staticmethod
    def regression(
        d: int, examples: int, noise: Number, spectrum: Sequence[Number] | None = None
    ) -> Task:
        """One label with beta ~ N(0, I / d); x ~ N(0, diag(spectrum)), N(0, I) by default."""
        inputs = torch.ones(d) if spectrum is None else torch.tensor(spectrum).float().sqrt()
        return Task(examples, inputs, torch.full((1, d), d**-0.5), torch.tensor([float(noise)]))

    @staticmethod
    def several(uses: Sequence[Sequence[bool]], examples: int, noise: Number) -> Task:
        """A label for each row of `uses`, with beta ~ N(0, I) on those coordinates and noise `noise` a coordinate."""
        weights = torch.tensor(uses).float()
        return Task(examples, torch.ones(weights.shape[1]), weights, noise * weights.sum(1))

    def of_length(self, examples: int) -> Task:
        """The same law with prompts of another length."""
        return Task(examples, self.inputs, self.weights, self.noise)


@dataclass(frozen=True, slots=True)
class Prompts:
    """Examples, queries and the queries' labels, which carry noise as well."""

    x: Float[Tensor, "*batch examples d"]
    y: Float[Tensor, "*batch examples labels"]
    query: Float[Tensor, "*batch d"]
    answer: Float[Tensor, "*batch labels"]


def draw(task: Task, batch: tuple[int, ...], generator: torch.Generator) -> Prompts:
    """`batch` prompts, as a shape."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*batch, *shape, generator=generator)

    labels, d = task.weights.shape
    x = normal(task.examples + 1, d) * task.inputs
    y = x @ (normal(labels, d) * task.weights).mT
    y = y + normal(task.examples + 1, labels) * task.noise.sqrt()
    return Prompts(x[..., :-1, :], y[..., :-1, :], x[..., -1, :], y[..., -1, :])


@dataclass(slots=True)
class Networks:
    """Networks with `counts` heads, each from several seeds; the heads of all networks in one row.

    Attributes:
        counts: heads of each network.
        query, key, value: `[seeds, heads, d + labels, d + labels]`.
        output: `[seeds, heads, labels, d + labels]`.
    """

    counts: tuple[int, ...]
    query: Float[Tensor, "seeds heads rows rows"]
    key: Float[Tensor, "seeds heads rows rows"]
    value: Float[Tensor, "seeds heads rows rows"]
    output: Float[Tensor, "seeds heads labels rows"]

    @staticmethod
    def start(
        counts: Sequence[int], task: Task, seeds: int, generator: torch.Generator
    ) -> Networks:
        """The usual start of linear maps, uniform within 1 / sqrt(inputs); the output map reads all heads of its network."""
        labels, d = task.weights.shape
        rows, heads = d + labels, sum(counts)

        def uniform(*shape: int) -> Tensor:
            return 2 * torch.rand(seeds, heads, *shape, generator=generator) - 1

        query, key, value = (uniform(rows, rows) / math.sqrt(rows) for _ in range(3))
        fan = torch.tensor([count * rows for count in counts for _ in range(count)])
        output = uniform(labels, rows) / fan.sqrt()[:, None, None]
        return Networks(tuple(counts), query, key, value, output)

    @property
    def parameters(self) -> list[Tensor]:
        return [self.query, self.key, self.value, self.output]

    def circuits(
        self,
    ) -> tuple[Float[Tensor, "seeds heads rows rows"], Float[Tensor, "seeds heads labels rows"]]:
        """`K^T Q / sqrt(d + labels)` (omega on its diagonal) and `O V` (mu on its label) of each head."""
        return self.key.mT @ self.query / math.sqrt(self.query.shape[-1]), self.output @ self.value

    def predict(self, prompts: Prompts) -> Float[Tensor, "seeds networks batch labels"]:
        """Every network's answers to prompts `[batch]`, the same for all seeds, or `[seeds, batch]`.

        Cost: O(seeds x batch x heads x L x d).
        """
        seen = torch.cat([prompts.x, prompts.y], -1)
        asked = torch.cat([prompts.query, torch.zeros_like(prompts.answer)], -1)
        pair, read = self.circuits()
        wanted = (asked[..., None, :, :] @ pair.mT).transpose(1, 2)  # [seeds, batch, heads, rows]
        mixed = torch.softmax(wanted @ seen.mT, -1) @ seen
        answers = (mixed.transpose(1, 2) @ read.mT).split(self.counts, 1)
        return torch.stack([heads.sum(1) for heads in answers], 1)


@dataclass(frozen=True, slots=True)
class Trained:
    """Networks after training, and their scales at logged steps.

    Attributes:
        networks: as they are at the end.
        steps: `[times]`.
        omega: `[times, seeds, heads]`, mean of the x block's diagonal.
        mu: `[times, seeds, heads]`, the first label's scale.
    """

    networks: Networks
    steps: np.ndarray
    omega: Float[np.ndarray, "times seeds heads"]
    mu: Float[np.ndarray, "times seeds heads"]

    def eta(self, network: int) -> Float[np.ndarray, "times seeds"]:
        """`sum_h omega_h mu_h` of one network: the step of descent that it takes."""
        own = heads_of(self.networks.counts, network)
        return (self.omega[..., own] * self.mu[..., own]).sum(-1)


def heads_of(counts: Sequence[int], network: int) -> slice:
    """Where the heads of a network are."""
    first = sum(counts[:network])
    return slice(first, first + counts[network])


def train(
    networks: Networks,
    task: Task,
    *,
    steps: int,
    batch: int,
    rate: float,
    seed: int,
    logs: int = 40,
) -> Trained:
    """Adam on fresh prompts, for every network and seed at once; networks of one seed see the same prompts.

    For the last fifth of the steps the rate falls to zero, so that the noise of the batches settles.

    Cost: O(steps x seeds x batch x heads x L x d).
    """
    generator = torch.Generator().manual_seed(seed)
    parameters = [part.requires_grad_() for part in networks.parameters]
    optimizer = torch.optim.Adam(parameters, rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, 5 * (1 - step / steps))
    )
    marks = set(np.unique(np.rint(np.geomspace(1, steps, logs)).astype(int)).tolist())
    kept = [(0, *scales(networks))]
    for step in range(1, steps + 1):
        prompts = draw(task, (len(networks.query), batch), generator)
        wrong = networks.predict(prompts) - prompts.answer[:, None]
        optimizer.zero_grad()
        wrong.square().mean((-2, -1)).sum().backward()
        optimizer.step()
        schedule.step()
        if step in marks:
            kept.append((step, *scales(networks)))
    for part in parameters:
        part.requires_grad_(False)
    times, omega, mu = zip(*kept, strict=True)
    return Trained(networks, np.array(times), np.stack(omega), np.stack(mu))


def scales(networks: Networks) -> tuple[np.ndarray, np.ndarray]:
    """omega and mu of each head: the mean of the x block's diagonal, and what the first label counts in the first output."""
    pair, read = (part.detach() for part in networks.circuits())
    labels = read.shape[-2]
    diagonal = pair.diagonal(dim1=-2, dim2=-1)[..., :-labels]
    return diagonal.mean(-1).numpy(), read[..., 0, -labels].numpy()


def pattern_scores(networks: Networks) -> dict[str, Float[np.ndarray, "seeds networks"]]:
    """How far each network of one label has the learnt pattern; heads count by their share of |mu|.

    `off`: mean size of K^T Q's entries beside the diagonal over those on it, of all that meet the query's x;
    `label`: share of |O V| on the label; `sum`: |sum mu| / sum |mu|; `signs`: share of heads with sign(omega) = sign(mu);
    `equal`: spread of |omega| over its mean; `eta`: sum of omega mu.
    """
    pair, read = (part.detach().double() for part in networks.circuits())
    block, d = pair[..., :-1], pair.shape[-1] - 1
    diagonal = pair.diagonal(dim1=-2, dim2=-1)[..., :-1].abs().mean(-1)
    off = (block.abs().sum((-2, -1)) - d * diagonal) / (d * d) / diagonal
    label = read[..., 0, -1].abs() / read[..., 0, :].abs().sum(-1)
    omega, mu = (torch.as_tensor(part).double() for part in scales(networks))
    scores: dict[str, list[Tensor]] = {
        key: [] for key in ("off", "label", "sum", "signs", "equal", "eta")
    }
    for network in range(len(networks.counts)):
        own = heads_of(networks.counts, network)
        size, o = mu[:, own].abs(), omega[:, own]
        weight = size / size.sum(1, keepdim=True)
        mean = (weight * o.abs()).sum(1)
        scores["off"].append((weight * off[:, own]).sum(1))
        scores["label"].append((weight * label[:, own]).sum(1))
        scores["sum"].append(mu[:, own].sum(1).abs() / size.sum(1))
        scores["signs"].append((weight * (o * mu[:, own] > 0)).sum(1))
        spread = (weight * (o.abs() - mean[:, None]).square()).sum(1)
        scores["equal"].append(spread.sqrt() / mean)
        scores["eta"].append((o * mu[:, own]).sum(1))
    return {key: torch.stack(values, 1).numpy() for key, values in scores.items()}


def effective_matrix(networks: Networks, network: int) -> Float[np.ndarray, "seeds d d"]:
    """`sum_h mu_h omega_h` with omega_h a matrix: W of the descent step that a network of one label takes."""
    own = heads_of(networks.counts, network)
    pair, read = (part.detach()[:, own] for part in networks.circuits())
    return (read[..., 0, -1, None, None] * pair[..., :-1, :-1]).sum(1).mT.numpy()


def task_scales(networks: Networks, network: int) -> Float[np.ndarray, "seeds heads labels"]:
    """What each head adds to each output, from that output's own label."""
    read = networks.circuits()[1].detach()[:, heads_of(networks.counts, network)]
    labels = read.shape[-2]
    return read[..., -labels:].diagonal(dim1=-2, dim2=-1).numpy()


def measured_errors(
    predictors: dict[str, Callable[[Prompts], Tensor]], task: Task, count: int, seed: int
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Mean squared error (mean over labels) of each predictor on the same `count` prompts, and half of its 95 % interval."""
    generator, left = torch.Generator().manual_seed(seed), count
    most = max(1, 60_000 // task.examples)
    squares: dict[str, list[Tensor]] = {name: [] for name in predictors}
    while left > 0:
        prompts = draw(task, (min(left, most),), generator)
        for name, predict in predictors.items():
            squares[name].append((predict(prompts) - prompts.answer).square().mean(-1))
        left -= most
    found = {}
    for name, parts in squares.items():
        errors = torch.cat(parts, -1).double()
        half = 1.96 * errors.std(-1).numpy() / math.sqrt(errors.shape[-1])
        found[name] = (errors.mean(-1).numpy(), np.asarray(half))
    return found
