"""A decoder block whose only nonlinearity is softmax, and what keeps its attention entropy healthy.

    A = softmax(q . k / (t sqrt(d)) + mask),   o = A v          t > 0 learnt for each head (and position)
    h <- h + W_o o
    h <- beta W h + h / alpha                                   W = W_down W_up fused: a feed-forward layer without activation

No layer norms, no activations: what is costly under encryption is gone. Without them, entropy collapses in deep layers (the
scale beta, alpha of the fused layer answers that) and stays near its maximum in early heads (temperatures and
`EntropyRegularizer` answer that).

Source: Jha and Reagen 2025, "Entropy-Guided Attention for Private LLMs", arXiv 2501.03489. t is kept as exp of the parameter,
which stays positive by itself. The paper does not say how W starts; here as the product of two matrices of N(0, 0.02^2).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from regard._errors import InputError
from regard.engine import Block, Method
from regard.nn.mixer import State
from regard.nn.softmax_attention import SoftmaxAttention
from regard.ops.entropy_regularisation import (
    attention_entropy,
    causal_ceiling,
    head_entropy_penalty,
    row_entropy_penalty,
)


class TemperatureAttention(SoftmaxAttention):
    """Causal softmax attention whose scores are divided by a learnt temperature t, 1 at first.

    Args:
        width: of the tokens.
        heads: query heads.
        kv_heads: key and value heads, `heads` by default.
        positions: None for one temperature a head; a number T for one a head and query position (later positions use the
            last one, padding is not counted).

    Cost: that of `SoftmaxAttention` and one multiplication for each number of the queries.

    >>> TemperatureAttention(32, 4, positions=16)(torch.randn(2, 10, 32)).shape
    torch.Size([2, 10, 32])
    """

    def __init__(
        self, width: int, heads: int, *, kv_heads: int | None = None, positions: int | None = None
    ) -> None:
        super().__init__(width, heads, kv_heads=kv_heads)
        if positions is not None and positions < 1:
            raise InputError.of("positions", given=positions, expected="1 or more, or None")
        self.log_temperature = nn.Parameter(torch.zeros(heads, positions or 1))

    @property
    def temperature(self) -> Float[Tensor, "heads positions"]:
        return self.log_temperature.exp()

    def attend(self, query: Tensor, key: Tensor, value: Tensor, **rest: Any) -> Tensor:
        inverse = torch.exp(-self.log_temperature)
        last = inverse.shape[1] - 1
        if last:
            places = _places(query.shape[2], key.shape[2], rest.get("key_valid"), query.device)
            inverse = inverse[:, places.clamp(0, last)].transpose(0, 1)
        return super().attend(query * inverse[..., None], key, value, **rest)


def _places(queries: int, keys: int, valid: Tensor | None, device: torch.device) -> Tensor:
    """`[batch or 1, queries]`: how many valid tokens are before each of the newest tokens; -1 before the first."""
    if valid is None:
        return torch.arange(keys - queries, keys, device=device)[None]
    return valid.cumsum(1)[:, keys - queries :] - 1


class ScaledFusedFFN(nn.Module):
    """`beta W h + h / alpha`: a feed-forward layer without activation, fused to one matrix, and its skip connection.

    Args:
        width: of the tokens.
        hidden: width of the two-layer form it stands for (it sets how large W starts), 4 width by default.

    Cost: width^2 multiplications a token, an eighth of two layers of 4 width.

    >>> ffn = ScaledFusedFFN(8)
    >>> ffn(torch.zeros(2, 3, 8)).shape
    torch.Size([2, 3, 8])
    """

    def __init__(self, width: int, hidden: int | None = None) -> None:
        super().__init__()
        inner = 4 * width if hidden is None else hidden
        self.fused = nn.Linear(width, width, bias=False)
        nn.init.normal_(self.fused.weight, std=0.02 * 0.02 * math.sqrt(inner))
        self.alpha = nn.Parameter(torch.ones(()))
        self.beta = nn.Parameter(torch.ones(()))

    @classmethod
    @torch.no_grad()
    def of(cls, up: nn.Linear, down: nn.Linear) -> ScaledFusedFFN:
        """The layer that computes `h + down(up(h))` of two linear layers without bias.

        Raises:
            InputError: layers with a bias, or that do not lead back to the width they start from.
        """
        if up.bias is not None or down.bias is not None:
            raise InputError("layers to fuse must have no bias; fold it into the next layer first")
        if (up.out_features, up.in_features) != (down.in_features, down.out_features):
            raise InputError(
                f"layers to fuse must lead back to their width, got {up.in_features} -> {up.out_features} and "
                f"{down.in_features} -> {down.out_features}"
            )
        made = cls(up.in_features, up.out_features).to(up.weight)
        made.fused.weight.copy_(down.weight @ up.weight)
        return made

    def forward(self, hidden: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        return self.beta * self.fused(hidden) + hidden / self.alpha.clamp_min(0.05)


class SoftmaxOnlyBlock(nn.Module):
    """One layer of a softmax-only decoder: `TemperatureAttention` and `ScaledFusedFFN`, without norms.

    Cost: 5 width^2 multiplications a token and attention, against 12 width^2 of an ordinary block.
    """

    def __init__(self, width: int, heads: int, *, positions: int | None = None) -> None:
        super().__init__()
        self.self_attn = TemperatureAttention(width, heads, positions=positions)
        self.mlp = ScaledFusedFFN(width)

    def forward(
        self,
        hidden: Float[Tensor, "batch tokens width"],
        *,
        valid: Bool[Tensor, "batch tokens"] | None = None,
        state: State | None = None,
    ) -> Float[Tensor, "batch tokens width"]:
        return self.mlp(hidden + self.self_attn(hidden, valid=valid, state=state))


class EntropyRegularizer(nn.Module, Method):
    """A loss that keeps each head's mean entropy within a band around a level that is learnt with the model.

        regularizer = EntropyRegularizer(layers=6, heads=4)
        optimizer = AdamW([*model.parameters(), *regularizer.parameters()])
        with regard.attach(model, regularizer):
            loss = model(ids, labels=ids).loss + regularizer.loss()

    It attaches to any model that `regard.attach` reaches, and reads the weights of passes that autograd records only: an
    evaluation under `torch.no_grad()` costs nothing more.

    Args:
        layers: attention layers of the model.
        heads: query heads of each.
        strength: factor of the loss. The published 1e-5 belongs to `RowEntropyRegularizer`; a mean over batch and rows is
            smaller by their number, so that 1e-5 x batch x rows is as strong.
        tolerance: half-width of the band in which nothing is paid, a share of the largest entropy.
        causal: take log i for the largest entropy of row i, which a causal row can reach, in place of log T.

    Cost: attention in blocks in place of the fused kernel, and the weights of all layers kept until the backward pass:
    O(layers heads T^2) memory.
    """

    penalty = staticmethod(head_entropy_penalty)

    def __init__(
        self,
        layers: int,
        heads: int,
        *,
        strength: float = 0.01,
        tolerance: float = 0.2,
        causal: bool = False,
    ) -> None:
        super().__init__()
        if strength < 0:
            raise InputError.of("strength", given=strength, expected="at least 0")
        self.levels = nn.Parameter(torch.full((layers, heads), 0.5))
        self.strength, self.tolerance, self.causal = strength, tolerance, causal
        self._found: dict[tuple[str, int], list[Tensor]] = {}

    def start(self, session: Any) -> None:
        self._found.clear()

    def weights(self, block: Block) -> None:
        if not torch.is_grad_enabled():
            return
        held = self._found.setdefault(block.site.key, [])
        if int(block.rows[0]) == 0:  # another pass of the model
            held.clear()
        held.append(attention_entropy(block.weights))

    def loss(self) -> Float[Tensor, ""]:
        """The penalty of the last forward pass, averaged over layers, times the strength; it can be asked for once.

        Raises:
            InputError: no pass was seen, or its layers and heads are not those of this regularizer.
        """
        found = [torch.cat(blocks, -1) for blocks in self._found.values()]
        self._found.clear()
        given = [(len(found), entropy.shape[1]) for entropy in found]
        if not found or any(shape != tuple(self.levels.shape) for shape in given):
            raise InputError.of(
                "attention seen (layers, heads)",
                given=given[0] if given else None,
                expected=f"{tuple(self.levels.shape)}",
                fix="attach it, and run the model once with gradients before loss()",
            )
        terms = []
        for entropy, levels in zip(found, self.levels, strict=True):
            ceiling = (
                causal_ceiling(entropy.shape[2], device=entropy.device) if self.causal else None
            )
            terms.append(self.penalty(entropy, levels, tolerance=self.tolerance, ceiling=ceiling))
        return self.strength * torch.stack(terms).mean()


class RowEntropyRegularizer(EntropyRegularizer):
    """The released form: every row pays on its own, and rows and batch are summed. Arguments as above, strength 1e-5."""

    penalty = staticmethod(row_entropy_penalty)

    def __init__(
        self,
        layers: int,
        heads: int,
        *,
        strength: float = 1e-5,
        tolerance: float = 0.2,
        causal: bool = False,
    ) -> None:
        super().__init__(layers, heads, strength=strength, tolerance=tolerance, causal=causal)
