"""Confidence-parallel decoding: decide every mask in the window that the model is sure of, at least one a step.

    p = softmax(logits) in float64,   decide q if max p_q >= min(epsilon, max over the window of max p)

Rule of Fast-dLLM (arXiv 2505.22618), greedy: the token decided is the most probable one.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def confident(
    logits: Float[Tensor, "batch window vocabulary"],
    real: Bool[Tensor, "batch window"],
    threshold: float,
    forbidden: int,
) -> tuple[Int[Tensor, "batch window"], Bool[Tensor, "batch window"]]:
    """The most probable token of each active mask, and which of them to decide now.

    Args:
        real: False at filling.
        threshold: epsilon; above 1 exactly the surest mask is decided (ties aside).
        forbidden: the mask token, which is no answer.
    """
    scores = logits.double().index_fill(
        -1, torch.tensor([forbidden], device=logits.device), -torch.inf
    )
    sure, tokens = scores.softmax(-1).max(-1)
    sure = sure.masked_fill(~real, -1)
    surest = sure.amax(1, keepdim=True).clamp(max=threshold)
    return tokens, (sure >= surest) & real


def first_end(
    tokens: Int[Tensor, "batch sequence"],
    decided: Bool[Tensor, "batch sequence"],
    eos: int | None,
) -> Int[Tensor, " batch"]:
    """The first position decided as end of sequence, or the sequence length."""
    length = tokens.shape[1]
    if eos is None:
        return torch.full((len(tokens),), length, device=tokens.device)
    places = torch.arange(length, device=tokens.device).expand_as(tokens)
    return places.masked_fill(~(decided & (tokens == eos)), length).amin(1)
