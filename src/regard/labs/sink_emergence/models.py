"""Many small Llama-shaped models side by side: every parameter has a first axis of runs, so a sweep is one model.

RMSNorm (eps 1e-5), rotary positions (base 10,000; none in the runs that are told so), SwiGLU, no linear biases, separate
embedding and output matrix. At the start matrices have standard deviation sqrt(2 / (5 d)), the two projections that write into
the residual stream 1 / (sqrt(d) L), learnt keys and values 0.02.

A learnt key is not rotated and is seen by every query. Its value is learnt too ("kv"), or fixed ("k"): zero, or a multiple of the
first unit vector, the same in every head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from regard._errors import InputError
from regard.labs.sink_emergence.attention import OPERATIONS, attention_weights, fused_softmax

BIASES = ("none", "token", "kv", "k", "v")


@dataclass(frozen=True, slots=True)
class Size:
    """Layers, heads of a layer, width of the residual stream, width of the hidden layer of SwiGLU."""

    layers: int = 3
    heads: int = 4
    width: int = 64
    hidden: int = 128

    def __post_init__(self) -> None:
        if self.width % (2 * self.heads):
            raise InputError.of(
                "width",
                given=self.width,
                expected=f"a multiple of {2 * self.heads}",
                fix="each head rotates pairs of its entries",
            )


class Models(nn.Module):
    """`runs` models of one architecture, each drawn from its seed.

    Runs of equal seeds begin with equal weights, whatever their architecture (learnt keys and values are drawn last).

    Args:
        seeds: one a run.
        size: of every model.
        vocabulary: tokens.
        attention: a name of `attention.OPERATIONS`.
        bias: one of `BIASES`.
        turned: which runs have rotary positions; all by default.
        carried: norm of the fixed value that goes with the learnt key of "k", for each run; 0 by default.

    Raises:
        InputError: an operation or bias that does not exist.
    """

    embedding: Tensor
    output: Tensor
    token: Tensor

    def __init__(
        self,
        seeds: Sequence[int],
        size: Size,
        vocabulary: int,
        attention: str = "softmax",
        bias: str = "none",
        *,
        turned: Sequence[bool] | None = None,
        carried: Sequence[float | int] | None = None,
    ) -> None:
        super().__init__()
        if attention not in OPERATIONS:
            raise InputError.of(
                "attention", given=attention, expected=f"one of {', '.join(OPERATIONS)}"
            )
        if bias not in BIASES:
            raise InputError.of("bias", given=bias, expected=f"one of {', '.join(BIASES)}")
        self.size, self.bias = size, bias
        self.attention, self.operation = attention, OPERATIONS[attention]
        layers, width, hidden = size.layers, size.width, size.hidden
        plain, writing = math.sqrt(2 / (5 * width)), 1 / (math.sqrt(width) * layers)
        head = (layers, size.heads, width // size.heads)
        shapes: dict[str, tuple[tuple[int, ...], float]] = {
            "embedding": ((vocabulary, width), plain),
            "output": ((width, vocabulary), plain),
            "project": ((layers, width, 3 * width), plain),
            "merge": ((layers, width, width), writing),
            "up": ((layers, width, 2 * hidden), plain),
            "down": ((layers, hidden, width), writing),
        }
        learnt = {"token": {"token": (width,)}, "kv": {"key": head, "value": head}}
        learnt |= {"k": {"key": head}, "v": {"value": head}}
        shapes |= {name: (shape, 0.02) for name, shape in learnt.get(bias, {}).items()}
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        for name, (shape, spread) in shapes.items():
            drawn = [torch.randn(shape, generator=generator) for generator in generators]
            setattr(self, name, nn.Parameter(spread * torch.stack(drawn)))
        self.before = nn.Parameter(torch.ones(len(seeds), layers, width))
        self.middle = nn.Parameter(torch.ones(len(seeds), layers, width))
        self.last = nn.Parameter(torch.ones(len(seeds), width))
        self.turned = torch.tensor([True] * len(seeds) if turned is None else list(turned))
        self.carried = torch.tensor(
            [0.0] * len(seeds) if carried is None else list(carried)
        ).float()

    def forward(
        self,
        ids: Int[Tensor, "runs batch length"],
        visible: Bool[Tensor, "runs length length"],
        kept: list[Tensor] | None = None,
    ) -> Float[Tensor, "runs batch length vocabulary"]:
        """Logits of each next token.

        Args:
            ids: token ids.
            visible: which keys each query sees, for each run.
            kept: takes the weights of each layer, `[runs, batch, heads, length, keys]`; a learnt key comes before the others.
        """
        runs, count, length = ids.shape
        vocabulary = self.embedding.shape[1]
        offset = torch.arange(runs)[:, None, None] * vocabulary
        x = nn.functional.embedding(ids + offset, self.embedding.flatten(0, 1))
        first = int(self.bias == "token")
        if first:
            x = torch.cat([self.token[:, None, None].expand(-1, count, -1, -1), x], 2)
        seen = self._with_learnt(visible)
        cos, sin = self._rotation(length + first)
        fused = kept is None and self.attention == "softmax"
        stars = [getattr(self, name, None) for name in ("key", "value")]
        keys, values = (None if star is None else star.unbind(1) for star in stars)
        layers = zip(*(getattr(self, name).unbind(1) for name in LAYERED), strict=True)
        for index, (before, project, merge, middle, up, down) in enumerate(layers):
            split = matrix(norm(x, before), project).unflatten(-1, (3, self.size.heads, -1))
            query, key, value = split.permute(3, 0, 1, 4, 2, 5)
            query, key = rotate(query, cos, sin), rotate(key, cos, sin)
            if keys is not None:
                star = keys[index][:, None, :, None].expand(-1, count, -1, -1, -1)
                held = self._carried(star)
                if values is not None:
                    held = values[index][:, None, :, None].expand_as(star)
                key, value = torch.cat([star, key], -2), torch.cat([held, value], -2)
            if fused:
                mixed = fused_softmax(query, key, value, seen)
            else:
                weights = attention_weights(query, key, seen[:, None, None], self.operation)
                if kept is not None:
                    kept.append(weights[..., first:, :])
                mixed = weights @ value
            if self.bias == "v" and values is not None:
                mixed = mixed + values[index][:, None, :, None]
            x = x + matrix(mixed.transpose(2, 3).flatten(-2), merge)
            gate, wide = matrix(norm(x, middle), up).chunk(2, -1)
            x = x + matrix(nn.functional.silu(gate) * wide, down)
        return matrix(norm(x[:, :, first:], self.last), self.output)

    def _rotation(self, length: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines, `[length, d]`, or `[runs, 1, 1, length, d]` where some runs have no positions."""
        cos, sin = rotation(length, self.size.width // self.size.heads)
        if bool(self.turned.all()):
            return cos, sin
        turned = self.turned[:, None, None, None, None]
        return torch.where(turned, cos, 1.0), torch.where(turned, sin, 0.0)

    def _carried(self, star: Tensor) -> Tensor:
        """The fixed value of the learnt key, in the shape of `star`."""
        unit = torch.zeros(star.shape[-1])
        unit[0] = 1
        return (self.carried[:, None, None, None, None] * unit).expand_as(star)

    def _with_learnt(
        self, visible: Bool[Tensor, "runs length length"]
    ) -> Bool[Tensor, "runs queries keys"]:
        """The mask with a learnt key that everybody sees, or a learnt token that sees only itself."""
        if self.bias in ("kv", "k"):
            return nn.functional.pad(visible, (1, 0), value=True)
        if self.bias == "token":
            wider = nn.functional.pad(visible, (1, 0, 1, 0), value=False)
            wider[:, :, 0] = True
            return wider
        return visible


LAYERED = ("before", "project", "merge", "middle", "up", "down")


def matrix(
    x: Float[Tensor, "runs batch length width"], weight: Float[Tensor, "runs width out"]
) -> Float[Tensor, "runs batch length out"]:
    """Each run's tokens times that run's matrix."""
    return torch.bmm(x.flatten(1, 2), weight).unflatten(1, x.shape[1:3])


def norm(
    x: Float[Tensor, "runs batch length width"], gain: Float[Tensor, "runs width"]
) -> Float[Tensor, "runs batch length width"]:
    """RMSNorm with each run's gains."""
    size = x.square().mean(-1, keepdim=True) + 1e-5
    return x * size.rsqrt() * gain[:, None, None]


def rotation(length: int, size: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary embedding, `[length, size]` each."""
    pace = 10_000.0 ** (-torch.arange(0, size, 2) / size)
    angle = torch.outer(torch.arange(length), pace).repeat(1, 2)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the pairs `(x_i, x_{i + size / 2})` by the angles of their positions."""
    low, high = x.chunk(2, -1)
    return x * cos + torch.cat([-high, low], -1) * sin
