"""Any of these mixers as a linear system that changes with every token (`regard.ops.dynamical_system`).

    A, B, C, D = as_dynamical_system(mixer, hidden);      mixer(hidden) = Phi hidden

so that attention, state-space models and gated recurrences can be compared entry by entry: what a token keeps, what it writes,
what it reads. Values and the output map are part of B and C. Softmax attention has infinitely many states; `softmax_system`
gives it those of a truncated series.

Source: Sieber et al. 2024, arXiv 2405.15731.
"""

from __future__ import annotations

from functools import singledispatch

import torch
from jaxtyping import Float
from torch import Tensor, nn

from regard._errors import InputError
from regard.nn.linear_attention import LinearAttention
from regard.nn.mixer import Mixer
from regard.nn.normalised_attention import NormalisedAttention
from regard.nn.qlstm import QLSTM
from regard.nn.rotary import rotate
from regard.nn.selective_state_space import S6, SSD
from regard.nn.softmax_attention import SoftmaxAttention
from regard.ops.dynamical_system import (
    DynamicalSystem,
    gated_system,
    selective_system,
    separable_system,
)
from regard.ops.linear_attention import features, wide
from regard.ops.softmax_expansion import exponential_features

EPS = 1e-6  # of causal_linear_attention


@singledispatch
def as_dynamical_system(mixer: Mixer, inputs: Tensor) -> DynamicalSystem:
    """The system of a mixer on a sequence without padding or earlier tokens.

    Args:
        mixer: linear or normalised attention, S6, SSD, or a quasi-LSTM, of which only the recurrence is linear: its inputs are
            the convolved tokens, its outputs what `QLSTM.recur` gives.
        inputs: `[batch, tokens, width]`.

    Raises:
        InputError: a mixer that has no such form.

    >>> from regard.ops import transfer_matrix
    >>> mixer, hidden = NormalisedAttention(8, 2), torch.randn(1, 5, 8)
    >>> phi = transfer_matrix(as_dynamical_system(mixer, hidden))
    >>> torch.allclose(torch.einsum("bijou,bju->bio", phi, hidden), mixer(hidden), atol=1e-5)
    True
    """
    raise InputError.of(
        "mixer",
        given=type(mixer).__name__,
        expected="LinearAttention, NormalisedAttention, S6, SSD or QLSTM",
        fix="softmax_system(mixer, inputs, order) for softmax attention"
        if isinstance(mixer, SoftmaxAttention)
        else "",
    )


def softmax_system(
    mixer: SoftmaxAttention, inputs: Float[Tensor, "batch tokens width"], order: int
) -> DynamicalSystem:
    """Softmax attention with the exponential's series cut off at `order`; 1 + n + ... + n^order features a head of n.

    Raises:
        InputError: grouped heads, a window, or more features than fit.
    """
    if mixer.kv_heads != mixer.heads or mixer.window is not None:
        raise InputError(
            f"softmax_system needs as many KV heads as heads and no window, got {mixer.kv_heads} of {mixer.heads} and window"
            f" {mixer.window}"
        )
    positions = torch.arange(inputs.shape[1], device=inputs.device)
    query, key = (
        exponential_features(rotate(part, positions), order)
        for part in mixer.query_key(inputs, None, None)
    )
    return _normalised(mixer, query, key, 0.0)


@as_dynamical_system.register
def _(mixer: LinearAttention, inputs: Tensor) -> DynamicalSystem:
    query, key = (features(part) for part in mixer.query_key_of(inputs))
    return _normalised(mixer, query, key, EPS)


@as_dynamical_system.register
def _(mixer: NormalisedAttention, inputs: Tensor) -> DynamicalSystem:
    query, key = (wide(part) for part in mixer.query_key_of(inputs))
    return separable_system(query, key, mixer.eta(inputs), *_maps(mixer))


@as_dynamical_system.register(S6)
@as_dynamical_system.register(SSD)
def _(mixer: S6 | SSD, inputs: Tensor) -> DynamicalSystem:
    query, key, _value = mixer.query_key_value(inputs)
    return selective_system(
        query, key, mixer.step(inputs), mixer.rate, *_maps(mixer), skip=wide(mixer.skip)
    )


@as_dynamical_system.register
def _(mixer: QLSTM, inputs: Tensor) -> DynamicalSystem:
    return gated_system(*mixer.gates(inputs))


def _normalised(
    mixer: LinearAttention | SoftmaxAttention, query: Tensor, key: Tensor, eps: float
) -> DynamicalSystem:
    """Separable attention that is divided by the sum of its weights."""
    eta = (query * key.cumsum(-2)).sum(-1) + eps
    return separable_system(query, key, eta, *_maps(mixer))


def _maps(
    mixer: LinearAttention | SoftmaxAttention | NormalisedAttention | S6 | SSD,
) -> tuple[Tensor, Tensor]:
    """W_V and W_O by head: `[heads, value_dim, width]` and `[width, heads, value_dim]`."""
    weights: list[nn.Linear] = [mixer.v_proj, mixer.o_proj]
    into, out = (wide(layer.weight) for layer in weights)
    return into.unflatten(0, (mixer.heads, -1)), out.unflatten(-1, (mixer.heads, -1))
