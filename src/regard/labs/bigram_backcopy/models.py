"""Transformers of a few layers with one head each, every seed's model side by side: the first axis is the seed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from regard._errors import InputError

Edit = Callable[[Tensor], Tensor]
"""Rewrites the attention `[seeds, batch, queries, keys]` of a layer."""


@dataclass(frozen=True, slots=True)
class Size:
    """Layers, width, and the longest sequence."""

    layers: int = 1
    width: int = 32
    length: int = 32


@dataclass(slots=True)
class Trace:
    """What one layer did: query, key and value (behind the norm that feeds them), its attention, the stream after the block."""

    query: Tensor
    key: Tensor
    value: Tensor
    scores: Tensor
    weights: Tensor
    hidden: Tensor


def relu_attention(scores: Float[Tensor, "*batch n n"]) -> Float[Tensor, "*batch n n"]:
    """A_ij = max(z_ij, 0) / i with the queries counted from 1, and nothing ahead of the query."""
    n = scores.shape[-1]
    rank = torch.arange(1, n + 1, dtype=scores.dtype, device=scores.device)
    return (scores.relu() / rank[:, None]).tril()


def softmax_attention(scores: Float[Tensor, "*batch n n"]) -> Float[Tensor, "*batch n n"]:
    """Causal softmax."""
    n = scores.shape[-1]
    ahead = torch.ones(n, n, dtype=torch.bool, device=scores.device).triu(1)
    return scores.masked_fill(ahead, -math.inf).softmax(-1)


ATTENTION: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": softmax_attention,
    "relu": relu_attention,
}


class Models(nn.Module):
    """Pre-norm blocks (attention of one head, ReLU MLP of four times the width), learnt positions, untied output.

    Args:
        seeds: one model for each.
        size: of each.
        vocabulary: symbols with <s>.
        attention: "softmax" or "relu".
    """

    def __init__(
        self, seeds: list[int], size: Size, vocabulary: int, attention: str = "softmax"
    ) -> None:
        super().__init__()
        if attention not in ATTENTION:
            raise InputError.of("attention", given=attention, expected=" or ".join(ATTENTION))
        self.size, self.weigh = size, ATTENTION[attention]
        d, many = size.width, size.layers
        shapes = {
            "tokens": (vocabulary, d),
            "positions": (size.length, d),
            "output": (d, vocabulary),
        }
        for layer in range(many):
            shapes |= {f"{name}_{layer}": (d, d) for name in ("q", "k", "v", "o")}
            shapes |= {f"up_{layer}": (d, 4 * d), f"down_{layer}": (4 * d, d)}
        drawn = [self._draw(shapes, torch.Generator().manual_seed(seed)) for seed in seeds]
        self.weights = nn.ParameterDict(
            {name: torch.stack([one[name] for one in drawn]) for name in shapes}
        )
        norms = [f"{name}_{layer}" for layer in range(many) for name in ("attention", "mlp")]
        shape = (len(seeds), 1, 1, d)
        self.gains = nn.ParameterDict({name: torch.ones(shape) for name in [*norms, "last"]})
        self.biases = nn.ParameterDict({name: torch.zeros(shape) for name in [*norms, "last"]})

    @staticmethod
    def _draw(shapes: dict[str, tuple[int, int]], generator: torch.Generator) -> dict[str, Tensor]:
        """torch's own start: N(0, 1) for embeddings, uniform within 1 / sqrt(inputs) for matrices."""
        found = {}
        for name, shape in shapes.items():
            if name in ("tokens", "positions"):
                found[name] = torch.randn(shape, generator=generator)
            else:
                found[name] = (2 * torch.rand(shape, generator=generator) - 1) / math.sqrt(shape[0])
        return found

    def norm(self, name: str, hidden: Tensor) -> Tensor:
        plain = nn.functional.layer_norm(hidden, hidden.shape[-1:])
        return plain * self.gains[name] + self.biases[name]

    def apply_matrix(self, name: str, hidden: Tensor) -> Tensor:
        """`[seeds, batch, n, a]` times the matrices `[seeds, a, b]`."""
        return (hidden.flatten(1, 2) @ self.weights[name]).unflatten(1, hidden.shape[1:3])

    def forward(
        self,
        ids: Int[Tensor, "seeds batch n"],
        *,
        edit: Edit | None = None,
        drop_first_value: bool = False,
        traces: list[Trace] | None = None,
    ) -> Float[Tensor, "seeds batch n vocabulary"]:
        """Logits; `edit` rewrites attention, `drop_first_value` zeroes the value of <s>, `traces` collects what layers did."""
        rows = torch.arange(len(ids), device=ids.device)[:, None, None]
        hidden = (
            self.weights["tokens"][rows, ids] + self.weights["positions"][:, None, : ids.shape[-1]]
        )
        for layer in range(self.size.layers):
            read = self.norm(f"attention_{layer}", hidden)
            query, key, value = (
                self.apply_matrix(f"{name}_{layer}", read) for name in ("q", "k", "v")
            )
            if drop_first_value:
                value = torch.cat([torch.zeros_like(value[:, :, :1]), value[:, :, 1:]], 2)
            scores = query @ key.mT / math.sqrt(query.shape[-1])
            weights = self.weigh(scores)
            if edit is not None:
                weights = edit(weights)
            hidden = hidden + self.apply_matrix(f"o_{layer}", weights @ value)
            up = self.apply_matrix(f"up_{layer}", self.norm(f"mlp_{layer}", hidden)).relu()
            hidden = hidden + self.apply_matrix(f"down_{layer}", up)
            if traces is not None:
                traces.append(Trace(query, key, value, scores, weights, hidden))
        return self.apply_matrix("output", self.norm("last", hidden))
