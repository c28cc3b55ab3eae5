"""Phase-gated attention: what oscillates together is heard.

Queries and keys carry phases, and the score of a pair gains kappa times the cosine of their difference:

    w_ij ~ exp(q_i . k_j / sqrt(d) + kappa cos(phi_i - phi_j)),   rows normalised.

For equal content a key in antiphase gets exp(-2 kappa) of what one in phase gets. Added before the softmax it keeps the rows
normalised; kappa = 0 is attention as it was. Nested rhythms: a slow carrier of frequency f opens a fast band of frequency f e^m
at one phase, A(t) = (1 + cos phi(t)) / 2, and bands are spaced by the factor e.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor


def phase_gated_attention(
    query: Float[Tensor, "*batch queries d"],
    key: Float[Tensor, "*batch keys d"],
    value: Float[Tensor, "*batch keys dv"],
    query_phase: Float[Tensor, "*batch queries"],
    key_phase: Float[Tensor, "*batch keys"],
    kappa: Float[Tensor, "*batch queries"] | float | int,
) -> Float[Tensor, "*batch queries dv"]:
    """Attention whose scores gain `kappa cos(phi_i - phi_j)`; kappa one number, or one for each query.

    Cost: O(N^2 d), as attention.

    >>> q = k = torch.zeros(1, 2, 4)
    >>> v = torch.tensor([[[1.0], [0.0]]])
    >>> phase_gated_attention(q[:, :1], k, v, torch.zeros(1, 1), torch.tensor([[0.0, math.pi]]), 2).round(decimals=3)
    tensor([[[0.9820]]])
    """
    apart = query_phase.unsqueeze(-1) - key_phase.unsqueeze(-2)
    gain = torch.as_tensor(kappa, dtype=query.dtype, device=query.device).unsqueeze(-1)
    scores = query @ key.mT / query.shape[-1] ** 0.5 + gain * apart.cos()
    return scores.softmax(-1) @ value


def phase_leak(kappa: float | int) -> float:
    """What a key in antiphase gets of what one of equal content in phase gets: `exp(-2 kappa)`.

    >>> phase_leak(0)
    1.0
    """
    return math.exp(-2 * kappa)


def band_frequency(slow: float | int, band: int) -> float:
    """`f e^m`: the m-th band above a slow rhythm.

    >>> round(band_frequency(8, 1), 2)
    21.75
    """
    return slow * math.exp(band)


def nested_amplitude(phase: Float[Tensor, "*times"]) -> Float[Tensor, "*times"]:
    """How open a fast band is at a phase of its carrier: `(1 + cos phi) / 2`."""
    return (1 + phase.cos()) / 2


def nested_attention(
    query: Float[Tensor, "*batch queries d"],
    key: Float[Tensor, "*batch keys d"],
    value: Float[Tensor, "*batch keys dv"],
    query_phase: Float[Tensor, "*batch queries"],
    key_phase: Float[Tensor, "*batch keys"],
    carrier: Float[Tensor, "*batch queries"],
    kappa: float | int,
) -> Float[Tensor, "*batch queries dv"]:
    """Phase-gated attention in a fast band whose gate a slow carrier opens and closes: kappa A(phi) in place of kappa."""
    opened = kappa * nested_amplitude(carrier)
    return phase_gated_attention(query, key, value, query_phase, key_phase, opened)


def switch_sender(
    kappas: Float[Tensor, "kappas"],
    trials: int,
    generator: torch.Generator,
    *,
    size: int = 16,
    messages: int = 8,
    cycle: int = 32,
    cycles: int = 8,
) -> tuple[Float[Tensor, "kappas times"], Int[Tensor, ""]]:
    """Two senders at phases 0 and pi carry different messages; at time t0 the receiver turns its phase by pi.

    Each sender has a random content key, and the receiver's query is random too, so content says nothing about whom to hear. What
    arrives is decoded as the nearest message. The new phase is approached over one slow cycle, linearly.

    Returns:
        The share of trials in which the decoded message is that of the sender wanted (0 before t0, pi from then on), and t0.
    """
    kind = {"generator": generator, "dtype": torch.float64}
    words = torch.randn(messages, size, **kind)
    first = torch.randint(messages, (trials,), generator=generator)
    second = (first + torch.randint(1, messages, (trials,), generator=generator)) % messages
    value = words[torch.stack([first, second], 1)]
    key, query = torch.randn(trials, 2, size, **kind), torch.randn(trials, 1, size, **kind)
    phases = torch.tensor([0.0, math.pi], dtype=torch.float64).expand(trials, -1)
    time = torch.arange(cycle * cycles)
    turn = cycle * cycles // 2
    heading = math.pi * ((time - turn + 1) / cycle).clamp(0, 1)
    wanted = torch.where(time[:, None] < turn, first, second)
    right = []
    for kappa in kappas.tolist():
        hits = []
        for t, phase in enumerate(heading.tolist()):
            own = torch.full((trials, 1), phase, dtype=torch.float64)
            heard = phase_gated_attention(query, key, value, own, phases, kappa)[:, 0]
            decoded = torch.cdist(heard, words).argmin(-1)
            hits.append((decoded == wanted[t]).double().mean())
        right.append(torch.stack(hits))
    return torch.stack(right), torch.tensor(turn)
