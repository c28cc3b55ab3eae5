"""One form for attention, linear attention, state-space models and gated RNNs: a linear system that changes with every token.

    h_i = A_i h_{i-1} + B_i u_i,      y_i = C_i h_i + D_i u_i            A_i diagonal, h of N numbers, u and y of d

    y = Phi u,      Phi_ij = C_i A_i ... A_{j+1} B_j for j <= i, plus D_i for j = i            the transfer matrix

What differs is how A_i, B_i, C_i follow from the tokens. With q_i, k_i of n features, v_i = W_V u_i, (x) the Kronecker product:

| method | A_i | B_i u_i | C_i | built by |
|---|---|---|---|---|
| separable attention | eta_{i-1} / eta_i | (v_i (x) psi(k_i)) / eta_i | I (x) phi(q_i)^T | `separable_system` |
| - linear | eta_i = phi(q_i)^T sum_{j <= i} psi(k_j) | | phi = psi = elu + 1 | |
| - softmax | eta_i = sum_{j <= i} e^{q_i . k_j / sqrt(n)} | | infinitely many features | `regard.ops.softmax_expansion` |
| - normalised | eta_i a function of u_i alone | | phi = psi = identity | |
| S6 | e^{Delta_i[c] a[c, s]}, a < 0 | (Delta_i v_i) (x) k_i | I (x) q_i^T | `selective_system` |
| SSD | the same with one a and Delta a head | | | `selective_system` |
| qLSTM | sigmoid(W_f u_i) | sigmoid(W_i u_i) u_i | diag sigmoid(W_o u_i) | `gated_system` |

Three things follow. In separable attention the products of A telescope, Phi_ij = phi(q_i)^T psi(k_j) W_V / eta_i: nothing is
forgotten, the state is only rescaled. A selective model equals separable attention exactly when its decay is one number,
e^{a Delta_i} = eta_{i-1} / eta_i with Delta_i = 1 / eta_i: `equivalent_normalisers` solves that, and the only solutions grow by
about |a| a token, as if averaging. And as e^{-softplus(x)} = sigmoid(-x), S6 decays by a reversed sigmoid to the power |a|.

These forms hold N x d numbers for every token: for reading, comparing and testing. Models run on `linear_attention`,
`decayed_linear_attention` and `linear_recurrence`.

Source: Sieber et al. 2024, "Understanding the differences in Foundation Models", arXiv 2405.15731.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from regard._errors import InputError
from regard.ops.linear_recurrence import linear_recurrence


class DynamicalSystem(NamedTuple):
    """`A` (its diagonal), `B`, `C`, `D` of every token; the state has N = `state` numbers."""

    A: Float[Tensor, "*batch tokens state"]
    B: Float[Tensor, "*batch tokens state inputs"]
    C: Float[Tensor, "*batch tokens outputs state"]
    D: Float[Tensor, "*batch tokens outputs inputs"]


def transfer_matrix(
    system: DynamicalSystem,
) -> Float[Tensor, "*batch rows columns outputs inputs"]:
    """Phi: what the input of token j (column) adds to the output of token i (row), 0 for j > i.

    Cost: O(tokens^2 N d^2) time, O(tokens^2 (N + d^2)) memory.
    """
    phi = torch.einsum(
        "...ion,...ijn,...jnu->...ijou", system.C, state_products(system.A), system.B
    )
    own = torch.eye(system.A.shape[-2], dtype=phi.dtype, device=phi.device)[..., None, None]
    return phi + own * system.D[..., :, None, :, :]


def state_products(
    A: Float[Tensor, "*batch tokens state"],
) -> Float[Tensor, "*batch rows columns state"]:
    """A_i ... A_{j+1}: what is left at token i of a state at token j; 1 for i = j, 0 for j > i.

    Cost: O(tokens^2 N) time and memory.

    >>> state_products(torch.tensor([[9.0], [0.5], [0.25]]))[..., 0]
    tensor([[1.0000, 0.0000, 0.0000],
            [0.5000, 1.0000, 0.0000],
            [0.1250, 0.2500, 1.0000]])
    """
    tokens = A.shape[-2]
    earlier = torch.ones(tokens, tokens, dtype=A.dtype, device=A.device).tril()[..., None]
    below = earlier.bool() & ~torch.eye(tokens, dtype=torch.bool, device=A.device)[..., None]
    factors = torch.where(below, A[..., :, None, :], torch.ones_like(A[..., :1, None, :]))
    return factors.cumprod(-3) * earlier


def system_scan(
    system: DynamicalSystem,
    inputs: Float[Tensor, "*batch tokens inputs"],
    initial: Float[Tensor, "*batch state"] | None = None,
) -> tuple[Float[Tensor, "*batch tokens outputs"], Float[Tensor, "*batch state"]]:
    """The outputs by the recurrence, and the state after the last token.

    Cost: O(tokens N (d + log tokens)).
    """
    driven = (system.B @ inputs[..., None])[..., 0]
    states = linear_recurrence(system.A, driven, initial)
    outputs = (system.C @ states[..., None] + system.D @ inputs[..., None])[..., 0]
    return outputs, states[..., -1, :]


def memory_horizon(
    A: Float[Tensor, "*batch tokens state"], share: float = 1 / math.e
) -> Float[Tensor, "*batch state"]:
    """How many tokens before the last have left at least `share` of what they wrote, for each entry of the state.

    Cost: O(tokens N).

    >>> memory_horizon(torch.full((9, 1), 0.5), share=0.1)
    tensor([3.])
    """
    kept = A.abs().flip(-2)[..., :-1, :].cumprod(-2)
    return (kept >= share).to(A.dtype).sum(-2)


def separable_system(
    query: Float[Tensor, "*batch heads tokens features"],
    key: Float[Tensor, "*batch heads tokens features"],
    eta: Float[Tensor, "*batch heads tokens"],
    value_map: Float[Tensor, "heads value_dim inputs"],
    output_map: Float[Tensor, "outputs heads value_dim"],
) -> DynamicalSystem:
    """Attention with weights `query_i . key_j / eta_i`, its values W_V u and its output map W_O (both by head).

    A_1, which multiplies a state before the first token, is 0.

    Args:
        query, key: features phi(q), psi(k).
        eta: what the weights of a query are divided by.
        value_map, output_map: W_V and W_O.
    """
    ratio = eta[..., :-1] / eta[..., 1:]
    decay = torch.cat([torch.zeros_like(eta[..., :1]), ratio], -1)
    return _matrix_memory(
        decay[..., None, None], query, key, 1 / eta[..., None], value_map, output_map
    )


def selective_system(
    query: Float[Tensor, "*batch heads tokens features"],
    key: Float[Tensor, "*batch heads tokens features"],
    step: Float[Tensor, "*batch heads tokens channels"],
    rate: Float[Tensor, "heads #channels #features"],
    value_map: Float[Tensor, "heads value_dim inputs"],
    output_map: Float[Tensor, "outputs heads value_dim"],
    skip: Float[Tensor, "heads value_dim"] | None = None,
) -> DynamicalSystem:
    """A selective state-space model: S6 with as many steps as values, SSD with one step and one rate a head.

    Args:
        query, key: C and B of the token (W_C u, W_B u).
        step: Delta; `channels` is the size of a value or 1.
        rate: a, below 0; `[heads, 1, 1]` for SSD.
        value_map, output_map: W_V and W_O.
        skip: D of each channel.

    Raises:
        InputError: steps that are neither one nor one a channel.
    """
    if step.shape[-1] not in (1, value_map.shape[1]):
        raise InputError.of(
            "step", given=tuple(step.shape), expected=f"1 or {value_map.shape[1]} a token and head"
        )
    decay = (step[..., None] * rate[:, None]).exp()
    return _matrix_memory(decay, query, key, step, value_map, output_map, skip)


def gated_system(
    forget: Float[Tensor, "*batch tokens state"],
    write: Float[Tensor, "*batch tokens state"],
    read: Float[Tensor, "*batch tokens state"],
) -> DynamicalSystem:
    """A recurrence of one number a channel: A, B, C are the diagonals `forget`, `write`, `read`, D = 0."""
    return DynamicalSystem(
        forget, torch.diag_embed(write), torch.diag_embed(read), torch.diag_embed(0 * read)
    )


def equivalent_normalisers(
    first: float | int, rate: float | int, tokens: int
) -> Float[Tensor, " tokens"]:
    """The eta_1 = `first`, eta_2, ... with which an SSD of rate a and Delta_i = 1 / eta_i is separable attention.

    The decay e^{a / eta_i} must be eta_{i-1} / eta_i, so eta_i e^{a / eta_i} = eta_{i-1}, whose only solution is
    eta_i = -a / W(-a / eta_{i-1}) with Lambert's W. It grows by a little less than |a| a token: eta_i ~ |a| i, the weights
    of an average.

    Raises:
        InputError: a first value that is not positive, a rate that is not negative.

    >>> equivalent_normalisers(1.0, -1.0, 4)
    tensor([1.0000, 1.7632, 2.5930, 3.4615], dtype=torch.float64)
    """
    if not first > 0:
        raise InputError.of("first", given=first, expected="above 0")
    if not rate < 0:
        raise InputError.of("rate", given=rate, expected="below 0")
    found = [float(first)]
    while len(found) < tokens:
        goal, eta = math.log(found[-1]), found[-1] - rate
        # log(eta) + a / eta is concave and rising: Newton's method settles in a few steps
        for _ in range(50):
            eta -= (math.log(eta) + rate / eta - goal) / (1 / eta - rate / eta**2)
        found.append(eta)
    return torch.tensor(found, dtype=torch.float64)


def _matrix_memory(
    decay: Tensor,
    query: Tensor,
    key: Tensor,
    gain: Tensor,
    value_map: Float[Tensor, "heads value_dim inputs"],
    output_map: Float[Tensor, "outputs heads value_dim"],
    skip: Float[Tensor, "heads value_dim"] | None = None,
) -> DynamicalSystem:
    """States of `value_dim x features` numbers a head: B_i = gain_i W_V (x) key_i, C_i = W_O (x) query_i^T."""
    heads, values, inputs = value_map.shape
    features, tokens = key.shape[-1], key.shape[-2]
    batch = key.shape[:-3]
    gain = gain.expand(*batch, heads, tokens, values)
    A = decay.expand(*batch, heads, tokens, values, features)
    B = torch.einsum("...htv,hvu,...htn->...thvnu", gain, value_map, key)
    C = torch.einsum("ohv,...htn->...tohvn", output_map, query)
    if skip is None:
        D = value_map.new_zeros(len(output_map), inputs)
    else:
        D = torch.einsum("ohv,hv,hvu->ou", output_map, skip, value_map)
    return DynamicalSystem(
        A.transpose(-4, -3).flatten(-3),
        B.flatten(-4, -2),
        C.flatten(-3),
        D.expand(*batch, tokens, -1, -1),
    )
