"""What the experiment on the common form measures without training: exactness, its identities, and the softmax's series."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from regard.attach import attach
from regard.engine import AttentionCall, Method
from regard.nn import (
    QLSTM,
    S6,
    SSD,
    LinearAttention,
    NormalisedAttention,
    ReversedQLSTM,
    SoftmaxAttention,
    as_dynamical_system,
    softmax_system,
)
from regard.ops import (
    DynamicalSystem,
    decayed_linear_attention,
    equivalent_normalisers,
    system_scan,
    transfer_matrix,
    truncated_exponential,
)
from regard.texts import prose


def deviations(tokens: int = 32, width: int = 8, state_size: int = 4) -> dict[str, float]:
    """Largest difference in float64 between native code, transfer matrix and scan, for each mixer.

    Of softmax attention the scores are small here (below 0.1), so that eight orders of its series are the whole.
    """
    mixers: dict[str, nn.Module] = {
        "softmax": SoftmaxAttention(width, 4),
        "linear attention": LinearAttention(width, 2),
        "normalised attention": NormalisedAttention(width, 2, state_size=state_size),
        "S6": S6(width, 2, state_size=state_size),
        "SSD": SSD(width, 2, state_size=state_size),
        "qLSTM": QLSTM(width, 2),
        "reversed qLSTM": ReversedQLSTM(width, 2),
    }
    found = {}
    for name, mixer in mixers.items():
        mixer.double()
        inner = 2 * width if isinstance(mixer, QLSTM) else width
        inputs = torch.randn(1, tokens, inner, dtype=torch.float64)
        with torch.no_grad():
            if isinstance(mixer, SoftmaxAttention):
                mixer.q_proj.weight *= 0.02
            native = mixer.recur(inputs)[0] if isinstance(mixer, QLSTM) else mixer(inputs)
            system = _system(mixer, inputs)
            phi = torch.einsum("bijou,bju->bio", transfer_matrix(system), inputs)
            scanned, _ = system_scan(system, inputs)
        found[name] = max(_far(native, phi), _far(native, scanned))
    return found


def _system(mixer: Any, inputs: Tensor) -> DynamicalSystem:
    if isinstance(mixer, SoftmaxAttention):
        return softmax_system(mixer, inputs, 8)
    return as_dynamical_system(mixer, inputs)


def telescoping(tokens: int = 32, width: int = 8) -> dict[str, float]:
    """How far Phi is from `q_i . k_j W_O W_V / eta_i`, over its largest entry: normalised attention; SSD without its decay."""
    torch.manual_seed(0)
    inputs = torch.randn(1, tokens, width, dtype=torch.float64)
    found = {}
    for name, mixer in (
        ("separable", NormalisedAttention(width, 1).double()),
        ("selective", SSD(width, 1).double()),
    ):
        with torch.no_grad():
            phi = transfer_matrix(as_dynamical_system(mixer, inputs))[0]
            query, key = mixer.q_proj(inputs)[0], mixer.k_proj(inputs)[0]
            weights = (query @ key.T).tril()
            if isinstance(mixer, NormalisedAttention):
                weights = weights / mixer.eta(inputs)[0, 0][:, None]
            else:
                weights = weights * mixer.step(inputs)[0, 0, :, 0]
                phi = phi - torch.eye(tokens)[..., None, None] * (
                    mixer.o_proj.weight * mixer.skip.flatten() @ mixer.v_proj.weight
                )
            both = mixer.o_proj.weight @ mixer.v_proj.weight
            found[name] = _far(phi, weights[..., None, None] * both) / float(phi.abs().max())
    return found


def equivalence(tokens: int = 64, dim: int = 8) -> dict[str, float]:
    """SSD against separable attention of the same queries, keys and values: with normalisers that solve the condition, and with
    others; and how far those normalisers grow a token, over |a|."""
    rate = -0.5
    query, key, value = torch.randn(3, 1, 1, tokens, dim, dtype=torch.float64).unbind()

    def apart(eta: Tensor) -> float:
        step = 1 / eta.view(1, 1, tokens, 1)
        selective, _ = decayed_linear_attention(query, key, step * value, rate * step[..., 0])
        return _far(selective, (query @ key.mT).tril() @ value * step)

    solved = equivalent_normalisers(1.0, rate, tokens)
    return {
        "equivalent": apart(solved),
        "learnt": apart(1 + torch.rand(tokens, dtype=torch.float64)),
        "growth": float((solved[-1] - solved[0]) / (tokens - 1) / -rate),
    }


def reversed_sigmoid(tokens: int = 64, width: int = 8) -> float:
    """Largest relative difference between the decay of an S6 and a power of the reversed sigmoid of the same numbers."""
    mixer = S6(width, 1, state_size=4).double()
    inputs = 4 * torch.randn(1, tokens, width, dtype=torch.float64)
    with torch.no_grad():
        decay = as_dynamical_system(mixer, inputs).A.unflatten(-1, (width, -1))
        power = torch.sigmoid(-mixer.step_proj(inputs))[..., None] ** -mixer.rate[0]
    return float((decay / power - 1).abs().max())


def series_errors(
    scores: Float[Tensor, "*heads tokens tokens"],
    value: Float[Tensor, "*heads tokens dim"],
    orders: Sequence[int],
) -> list[Float[Tensor, "*heads"]]:
    """`||o_P - o|| / ||o||` over all queries of a head, for each order P; causal, in float64."""
    scores, value = scores.double(), value.double()
    later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    whole = scores.masked_fill(later, -torch.inf).softmax(-1) @ value
    found = []
    for order in orders:
        weights = series(scores.masked_fill(later, 0), order).masked_fill(later, 0)
        part = weights / weights.sum(-1, keepdim=True) @ value
        found.append((part - whole).norm(dim=(-2, -1)) / whole.norm(dim=(-2, -1)))
    return found


def series(scores: Float[Tensor, "*any"], order: int) -> Float[Tensor, "*any"]:
    """`truncated_exponential` of float64 scores, also where they are so far below 0 that its terms cancel to noise.

    There it is `e^x - x^(P+1) / (P+1)! M(1, P+2, x)` with Kummer's function M, which lies between 0 and 1.
    """
    from scipy.special import hyp1f1

    total, low = truncated_exponential(scores, order), scores < -12
    x = scores[low]
    tail = torch.from_numpy(hyp1f1(1.0, order + 2.0, x.numpy()))
    size = ((order + 1) * (-x).log() - math.lgamma(order + 2)).exp()
    total[low] = x.exp() - (-1) ** (order + 1) * size * tail
    return total


def random_series(orders: Sequence[int], draws: int, tokens: int = 64, dim: int = 8) -> list[float]:
    """Median relative error by order for queries, keys and values of unit variance."""
    query, key, value = torch.randn(3, draws, tokens, dim, dtype=torch.float64).unbind()
    scores = query @ key.mT / math.sqrt(dim)
    return [float(error.median()) for error in series_errors(scores, value, orders)]


class _SeriesErrors(Method):
    """Collects, for every head, errors by order and the largest score in size."""

    def __init__(self, orders: Sequence[int]) -> None:
        self.orders = orders
        self.errors: list[Tensor] = []
        self.largest: list[Tensor] = []

    def after(self, call: AttentionCall) -> None:
        groups = call.query.shape[1] // call.key.shape[1]
        key, value = (part.repeat_interleave(groups, 1) for part in (call.key, call.value))
        scores = call.query.double() @ key.double().mT * call.scaling
        self.errors.append(torch.stack(series_errors(scores, value, self.orders), -1)[0])
        self.largest.append(scores.tril().abs().amax((-2, -1))[0])


@torch.no_grad()
def pretrained_series(model: Any, tokens: int, orders: Sequence[int]) -> dict[str, Any]:
    """SmolLM2's heads on prose: relative error of the output by order, and the largest |score| that a query sees."""
    ids = torch.tensor(model.tokenizer(prose(8 * tokens))["input_ids"])[None, :tokens]
    reader = _SeriesErrors(orders)
    with attach(model, reader):
        model(input_ids=ids)
    return {
        "errors": torch.cat(reader.errors).tolist(),
        "largest": torch.cat(reader.largest).tolist(),
    }


def _far(one: Tensor, other: Tensor) -> float:
    return float((one - other).detach().abs().max())
