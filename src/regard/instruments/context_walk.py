"""A text as a walk of context vectors: `C_t = N(h_L)[t]` gives the law of the next token, softmax(U C_t).

    log p(path) = sum_t log softmax(U C_t)[x_{t+1}],    jump_t = |C_{t+1} - C_t|,    cosine of C_t with U_{x_{t+1}}

The view is that of arXiv 2308.10874, which describes it in words; the measures are ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cosine_similarity

from regard._errors import InputError


@dataclass(frozen=True, slots=True)
class ContextWalk:
    """A text as a path of context vectors; sum `log_probability` for the path's.

    Attributes:
        log_probability: of each token after the first.
        jump: distance between the context vectors of neighbouring tokens.
        cosine: of a context vector with the output embedding of the token that came.
    """

    log_probability: Float[Tensor, "batch steps"]
    jump: Float[Tensor, "batch steps"]
    cosine: Float[Tensor, "batch steps"]


@torch.no_grad()
def context_walk(model: Any, ids: Int[Tensor, "batch tokens"]) -> ContextWalk:
    """The path that a text takes through a decoder with an output layer, and how likely each step was."""
    context, logits = _read(model, ids)
    weight = model.get_output_embeddings().weight
    odds, taken = logits.float().log_softmax(-1)[:, :-1], ids[:, 1:]
    return ContextWalk(
        odds.gather(-1, taken[..., None])[..., 0],
        context.diff(dim=1).norm(dim=-1),
        cosine_similarity(context[:, :-1], weight[taken], dim=-1),
    )


@torch.no_grad()
def context_vectors(
    model: Any, ids: Int[Tensor, "batch tokens"]
) -> Float[Tensor, "batch tokens width"]:
    """C_t: what the output embeddings are multiplied with, caught at the entry of the output layer."""
    return _read(model, ids)[0]


def order_effect(
    model: Any, ids: Int[Tensor, "batch tokens"], order: Int[Tensor, " tokens"]
) -> Float[Tensor, " batch"]:
    """`|C - C'| / |C|` of the last token, C' after the tokens were put in another order that leaves the last in place.

    Raises:
        InputError: no permutation, or one that moves the last token.
    """
    places = torch.arange(ids.shape[1], device=order.device)
    if not torch.equal(order.sort().values, places) or int(order[-1]) != len(places) - 1:
        expected = f"a permutation of 0 .. {len(places) - 1} that keeps the last token last"
        raise InputError.of("order", given=order.tolist(), expected=expected)
    one, other = (context_vectors(model, part)[:, -1] for part in (ids, ids[:, order]))
    return (one - other).norm(dim=-1) / one.norm(dim=-1)


def _read(model: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    caught: list[Tensor] = []
    handle = model.get_output_embeddings().register_forward_pre_hook(
        lambda module, given: caught.append(given[0])
    )
    try:
        logits = model(ids).logits
    finally:
        handle.remove()
    return caught[0], logits
