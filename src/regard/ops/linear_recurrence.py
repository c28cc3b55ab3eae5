"""The gated linear recurrence of diagonal state-space models and linear RNNs, for all tokens at once.

    h_i = a_i h_{i-1} + x_i                                      every entry of the state by itself

Two such maps one after the other are one again, (a, x) then (b, y): (b a, b x + y), so that all prefixes come from log2(tokens)
rounds, each of which joins every token with what ends `gap` tokens before it (gap = 1, 2, 4, ...). Only products of decays are
formed, never quotients: a decay of 0 or one that underflows does no harm.

Source: Hillis and Steele 1986, "Data parallel algorithms"; as a scan of models: Martin and Cundy 2018, arXiv 1709.04057.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from regard._errors import InputError


def linear_recurrence(
    decay: Float[Tensor, "*batch tokens state"],
    inputs: Float[Tensor, "*batch tokens state"],
    initial: Float[Tensor, "*batch state"] | None = None,
) -> Float[Tensor, "*batch tokens state"]:
    """The state after every token, from `initial` (zeros by default).

    Cost: 2 log2(tokens) multiplications a number, and as many copies of the inputs when differentiated.

    Raises:
        InputError: no tokens.

    >>> import torch
    >>> half, ones = torch.full((4, 1), 0.5), torch.ones(4, 1)
    >>> linear_recurrence(half, ones).flatten().tolist()
    [1.0, 1.5, 1.75, 1.875]
    >>> linear_recurrence(half, 0 * ones, torch.tensor([16.0])).flatten().tolist()
    [8.0, 4.0, 2.0, 1.0]
    """
    tokens = inputs.shape[-2]
    if tokens == 0:
        raise InputError.of("inputs", given=tuple(inputs.shape), expected="of 1 or more tokens")
    if initial is not None:
        carried = decay[..., :1, :] * initial[..., None, :]
        inputs = inputs + pad(carried, (0, 0, 0, tokens - 1))
    gap = 1
    while gap < tokens:
        inputs = inputs + decay * pad(inputs[..., :-gap, :], (0, 0, gap, 0))
        decay = decay * pad(decay[..., :-gap, :], (0, 0, gap, 0), value=1.0)
        gap *= 2
    return inputs
