"""Linear adapters: small trained maps beside frozen linear layers, folded into them afterwards without a trace.

    A(z) = z + s (W2 drop(W1 z + b1) + b2),      W1 [r, D], W2 [D, r];  W2 = b2 = 0 at first
         = E z + e   in evaluation,              E = I + s W2 W1,  e = s (W2 b1 + b2)

    before a layer (W, b):   W A(z) + b = (W E) z + (W e + b)
    after it:                A(W z + b) = (E W) z + (E b + e)

There is no activation inside, so merging is exact. Around an attention and a feed-forward layer, the default points are

    x += A2( Attention( A1(norm x) ) );      x += A4( FeedForward( A3(norm x) ) )

One A1 serves query, key and value (one A3 gate and up projection); each of these layers applies it itself, so in training each
draws its own dropout. Works on every model whose layers are `nn.Linear` under the usual names, language models included.

Source: Li et al. 2023, "ZeroI2V: Zero-Cost Adaptation of Pre-trained Transformers from Image to Video", arXiv 2310.01324
(r = D / 4; s = 0.5 on Kinetics, UCF and HMDB with dropout 0.1, s = 1 without dropout on Something-Something V2).

Cost: 2 r D multiplications a token for each adapter in training; none once merged.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from regard._errors import InputError, at_least_one


class AdapterPoint(NamedTuple):
    """Where adapters go: before or after linear layers with one of these names; siblings share the one before them."""

    side: Literal["before", "after"]
    names: tuple[str, ...]


ADAPTER_POINTS = (
    AdapterPoint("before", ("q_proj", "k_proj", "v_proj")),
    AdapterPoint("after", ("out_proj", "o_proj")),
    AdapterPoint("before", ("fc1", "gate_proj", "up_proj")),
    AdapterPoint("after", ("fc2", "down_proj")),
)
"""The four of the paper, under the names of CLIP, ViT and the Llama family."""


class LinearAdapter(nn.Module):
    """`z + scale (up(drop(down z)))` with biases; the identity at first.

    Args:
        width: of what goes through.
        rank: of the map, a quarter of the width by default.
        scale: s.
        dropout: between the two maps, in training.

    >>> adapter, z = LinearAdapter(8), torch.randn(2, 8)
    >>> torch.equal(adapter(z), z)
    True
    """

    def __init__(
        self,
        width: int,
        rank: int | None = None,
        *,
        scale: float | int = 1.0,
        dropout: float | int = 0.0,
    ) -> None:
        super().__init__()
        rank = max(1, width // 4) if rank is None else rank
        at_least_one(rank=rank)
        self.scale = scale
        self.down, self.up = nn.Linear(width, rank), nn.Linear(rank, width)
        self.dropout = nn.Dropout(dropout)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, hidden: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        return hidden + self.scale * self.up(self.dropout(self.down(hidden)))

    def matrix(self) -> tuple[Float[Tensor, "width width"], Float[Tensor, " width"]]:
        """(E, e) of the map in evaluation, in float64."""
        up, down = self.up.weight.double(), self.down.weight.double()
        width = torch.eye(len(up), dtype=torch.float64, device=up.device)
        shift = up @ self.down.bias.double() + self.up.bias.double()
        return width + self.scale * up @ down, self.scale * shift


class AdaptedLinear(nn.Module):
    """A linear layer with an adapter before it, after it, or both."""

    def __init__(
        self,
        linear: nn.Linear,
        before: LinearAdapter | None = None,
        after: LinearAdapter | None = None,
    ) -> None:
        super().__init__()
        self.linear, self.before, self.after = linear, before, after

    def forward(self, hidden: Float[Tensor, "*batch inputs"]) -> Float[Tensor, "*batch outputs"]:
        hidden = self.linear(hidden if self.before is None else self.before(hidden))
        return hidden if self.after is None else self.after(hidden)

    @property
    def weight(self) -> Tensor:
        """The matrix that the layer applies in evaluation."""
        return self._folded()[0]

    @property
    def bias(self) -> Tensor | None:
        """The bias that the layer adds in evaluation."""
        return self._folded()[1]

    @property
    def in_features(self) -> int:
        return self.linear.in_features

    @property
    def out_features(self) -> int:
        return self.linear.out_features

    @torch.no_grad()
    def merge(self) -> nn.Linear:
        """One linear layer that computes what this one computes in evaluation, folded in float64."""
        weight, bias = self._folded()
        plain = nn.Linear(
            self.in_features,
            self.out_features,
            bias=bias is not None,
            device=weight.device,
            dtype=weight.dtype,
        )
        plain.weight.copy_(weight)
        if bias is not None:
            plain.bias.copy_(bias)
        return plain.requires_grad_(self.linear.weight.requires_grad).train(self.training)

    def _folded(self) -> tuple[Tensor, Tensor | None]:
        own = self.linear.weight
        weight = own.double()
        bias = None if self.linear.bias is None else self.linear.bias.double()
        if self.before is not None:
            inner, shift = self.before.matrix()
            bias = weight @ shift if bias is None else weight @ shift + bias
            weight = weight @ inner
        if self.after is not None:
            outer, shift = self.after.matrix()
            bias = shift if bias is None else outer @ bias + shift
            weight = outer @ weight
        return weight.to(own.dtype), None if bias is None else bias.to(own.dtype)


def attach_linear_adapters(
    model: nn.Module,
    points: Sequence[AdapterPoint] = ADAPTER_POINTS,
    *,
    rank: int | None = None,
    scale: float | int = 1.0,
    dropout: float | int = 0.0,
) -> list[LinearAdapter]:
    """Freezes the model, puts adapters at every place that `points` name, and returns them; make the optimiser afterwards.

    Nothing that the model computes changes until the adapters are trained. What else is to be trained (a head) must be
    unfrozen after this call.

    Args:
        model: anything with `nn.Linear` layers of those names; changed in place.
        points: where; a name may be given before and after.
        rank: of the adapters, a quarter of their width by default.
        scale: s; whatever is trained is merged with the same.
        dropout: inside the adapters, in training.

    Raises:
        InputError: no layer has such a name, the model has adapters already, or siblings that share one differ in width.
    """
    if any(isinstance(module, AdaptedLinear) for module in model.modules()):
        raise InputError(f"{type(model).__name__} has linear adapters already; merge them first")
    model.requires_grad_(False)
    made: list[LinearAdapter] = []
    for parent in list(model.modules()):
        around: dict[str, dict[str, LinearAdapter]] = {}
        for side, names in points:
            layers = {n: c for n, c in parent.named_children() if n in names and _plain(c)}
            shared: LinearAdapter | None = None
            for name, layer in layers.items():
                assert isinstance(layer, nn.Linear)
                width = layer.in_features if side == "before" else layer.out_features
                if side == "after" or shared is None:
                    shared = LinearAdapter(width, rank, scale=scale, dropout=dropout)
                    made.append(shared.to(layer.weight.device, layer.weight.dtype))
                elif shared.up.out_features != width:
                    raise InputError(
                        f"{', '.join(layers)} share an adapter but read {shared.up.out_features} and {width} numbers"
                    )
                around.setdefault(name, {})[side] = shared
        for name, adapters in around.items():
            setattr(parent, name, AdaptedLinear(getattr(parent, name), **adapters))
    if not made:
        names = sorted({name for point in points for name in point.names})
        raise InputError(
            f"{type(model).__name__} has no linear layer called {', '.join(names)}; give points of its own names"
        )
    return made


def merge_linear_adapters(model: nn.Module) -> list[str]:
    """Replaces every adapted layer in place by a plain one that computes the same in evaluation, and returns their paths.

    The model then has the parameters and the cost that it had before (a layer without a bias gets one where its adapter shifts).

    Raises:
        InputError: there are none.
    """
    merged: list[str] = []
    for path, parent in list(model.named_modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, AdaptedLinear):
                setattr(parent, name, child.merge())
                merged.append(f"{path}.{name}" if path else name)
    if not merged:
        raise InputError(f"{type(model).__name__} has no linear adapters to merge")
    return merged


def _plain(module: nn.Module) -> bool:
    """A subclass may apply its weight in another way."""
    return type(module) is nn.Linear
