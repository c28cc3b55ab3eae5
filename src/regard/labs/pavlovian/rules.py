"""Learning rules of an associative memory; one trial is a key and a value, and a rule says what the memory is afterwards."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

Memory = Float[Tensor, "*batch values dim"]
Key = Float[Tensor, "*batch dim"]
Value = Float[Tensor, "*batch values"]


@dataclass(frozen=True, slots=True)
class Rule(ABC):
    """Base of the learning rules.

    Attributes:
        rate: b.
    """

    rate: float

    @abstractmethod
    def learn(self, memory: Memory, key: Key, value: Value, threshold: Value) -> Memory:
        """The memory after one trial; `threshold` is the running mean of v^2 before it, which only BCM reads."""


@dataclass(frozen=True, slots=True)
class Hebbian(Rule):
    """`M + b v k^T`: contiguity is enough. Linear attention without normalisation."""

    def learn(self, memory: Memory, key: Key, value: Value, threshold: Value) -> Memory:
        return memory + self.rate * _outer(value, key)


@dataclass(frozen=True, slots=True)
class Decaying(Rule):
    """`g M + b v k^T`: every trial fades the trace of all earlier ones. Retention and gated linear attention.

    Attributes:
        keep: g.
    """

    keep: float

    def learn(self, memory: Memory, key: Key, value: Value, threshold: Value) -> Memory:
        return self.keep * memory + self.rate * _outer(value, key)


@dataclass(frozen=True, slots=True)
class RescorlaWagner(Rule):
    """`M + b (v - M k) k^T`: only what was not expected is learnt. DeltaNet; stable while b |k|^2 < 2."""

    def learn(self, memory: Memory, key: Key, value: Value, threshold: Value) -> Memory:
        expected = (memory @ key[..., None]).squeeze(-1)
        return memory + self.rate * _outer(value - expected, key)


@dataclass(frozen=True, slots=True)
class Oja(Rule):
    """`M + b (v k^T - v^2 M)`, row by row: each outcome also shrinks its own row, so that rows stay bounded.

    Oja's rule `dw = b y (x - y w)` with the outcome v in the place of the neuron's own activity y.
    """

    def learn(self, memory: Memory, key: Key, value: Value, threshold: Value) -> Memory:
        return memory + self.rate * (_outer(value, key) - value.square()[..., None] * memory)


@dataclass(frozen=True, slots=True)
class BCM(Rule):
    """`M + b v (v - theta) k^T`: outcomes above their own running mean strengthen, those below it weaken."""

    def learn(self, memory: Memory, key: Key, value: Value, threshold: Value) -> Memory:
        return memory + self.rate * _outer(value * (value - threshold), key)


def memories(
    rule: Rule,
    keys: Float[Tensor, "*batch trials dim"],
    values: Float[Tensor, "*batch trials values"],
    start: Memory | None = None,
) -> Float[Tensor, "*batch times values dim"]:
    """The memory before the first trial (zeros by default) and after each.

    Cost: O(trials x values x dim), one trial after the other: a definition, for protocols of a few trials.

    >>> keys, ones = torch.eye(2), torch.ones(2, 1)
    >>> memories(Hebbian(0.5), keys, ones)[-1]
    tensor([[0.5000, 0.5000]])
    """
    shape = (*keys.shape[:-2], values.shape[-1], keys.shape[-1])
    kept = [keys.new_zeros(shape) if start is None else start]
    threshold = torch.zeros_like(values[..., 0, :])
    for key, value in zip(keys.unbind(-2), values.unbind(-2), strict=True):
        kept.append(rule.learn(kept[-1], key, value, threshold))
        threshold = threshold + rule.rate * (value.square() - threshold)
    return torch.stack(kept, -3)


def responses(
    rule: Rule,
    keys: Float[Tensor, "trials dim"],
    outcomes: Float[Tensor, " trials"],
    probes: Float[Tensor, "probes dim"],
) -> Float[Tensor, "times probes"]:
    """What each probe predicts of a scalar outcome, before the first trial and after each.

    >>> responses(RescorlaWagner(0.5), torch.ones(2, 1), torch.ones(2), torch.ones(1, 1)).squeeze(1)
    tensor([0.0000, 0.5000, 0.7500])
    """
    return memories(rule, keys, outcomes[:, None])[:, 0] @ probes.mT


def _outer(value: Tensor, key: Tensor) -> Tensor:
    return value[..., :, None] * key[..., None, :]
