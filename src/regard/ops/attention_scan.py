"""Softmax attention of one query as a recurrence, and all its prefixes at once by an associative scan.

A set of tokens is summed up by three numbers for each head (w has the size of a value): with scores s_j and values v_j

    m = max_j s_j,    u = sum_j e^(s_j - m),    w = sum_j e^(s_j - m) v_j,    output = w / u

Two such sums merge into that of both sets,

    (m, u, w) + (m', u', w') = (M, u e^(m - M) + u' e^(m' - M), w e^(m - M) + w' e^(m' - M)),    M = max(m, m'),

which is associative and commutative. A step merges (s, 1, v); merging partial results of blocks of keys gives exact attention
over all of them. A score of -inf is a token that is not there: (-inf, 0, 0) changes nothing.

`attention_scan` takes blocks of b tokens: inside a block e^(s_j - m_i) is a masked b x b matrix, and the blocks' sums
are merged by a scan of log2(blocks) rounds. A block of 1 is the scan alone, one block of all tokens is a masked softmax.

Source: Feng et al. 2024, "Attention as an RNN", arXiv 2405.13956; the running sums: Milakov and Gimelshein 2018, arXiv
1805.02867; the rounds: Hillis and Steele 1986. m cancels in the output, so it is a constant for the gradient.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from regard._errors import InputError, at_least_one


class Attended(NamedTuple):
    """Attention over a set of tokens before it is normalised: m, u and w."""

    maximum: Float[Tensor, "*sets"]
    total: Float[Tensor, "*sets"]
    weighted: Float[Tensor, "*sets dim"]

    def output(self) -> Float[Tensor, "*sets dim"]:
        """`w / u`; zero for a set without tokens."""
        total = torch.where(self.total == 0, 1, self.total)
        return self.weighted / total[..., None]


def merge_attention(one: Attended, other: Attended) -> Attended:
    """Attention over both sets of tokens.

    >>> a, b = (Attended(torch.tensor(s), torch.tensor(1.0), torch.tensor([v])) for s, v in [(0.0, 3.0), (0.0, 5.0)])
    >>> merge_attention(a, b).output()
    tensor([4.])
    """
    maximum = torch.maximum(one.maximum, other.maximum).detach()
    scale, scale_other = _scale(one.maximum, maximum), _scale(other.maximum, maximum)
    return Attended(
        maximum,
        one.total * scale + other.total * scale_other,
        one.weighted * scale[..., None] + other.weighted * scale_other[..., None],
    )


def attention_scan_step(
    scores: Float[Tensor, "*sets"], value: Float[Tensor, "*sets dim"], state: Attended | None = None
) -> tuple[Float[Tensor, "*sets dim"], Attended]:
    """One more token: O(dim) time and memory, whatever came before.

    >>> output, state = attention_scan_step(torch.tensor(0.0), torch.tensor([1.0]))
    >>> attention_scan_step(torch.tensor(0.0), torch.tensor([2.0]), state)[0]
    tensor([1.5000])
    """
    there = torch.exp(scores - _finite(scores.detach()))  # 1 for a token, 0 for none
    token = Attended(scores.detach(), there, value.to(scores.dtype) * there[..., None])
    state = token if state is None else merge_attention(state, token)
    return state.output(), state


def attention_scan(
    scores: Float[Tensor, "*sets tokens"],
    value: Float[Tensor, "*sets tokens dim"],
    state: Attended | None = None,
    *,
    block: int = 64,
) -> tuple[Float[Tensor, "*sets tokens dim"], Attended]:
    """Attention over tokens 1 .. k for every k, those that `state` was left by included.

    Args:
        scores: of one query with every key; -inf where there is no token.
        value: of every token.
        state: of the tokens before.
        block: tokens in a block; any size gives the same numbers.

    Returns:
        The outputs, and the state after the last token.

    Raises:
        InputError: shapes that do not fit, no tokens, or a block below 1.

    Cost: O(tokens block dim) time; memory `tokens x block` and `tokens / block` states.

    >>> scores, value = torch.randn(6), torch.randn(6, 2)
    >>> output, _ = attention_scan(scores, value)
    >>> torch.allclose(output[3], scores[:4].softmax(0) @ value[:4], atol=1e-6)
    True
    """
    tokens = scores.shape[-1]
    if value.shape[:-1] != scores.shape or tokens == 0:
        raise InputError(
            f"value must be scores' shape and a dimension, with 1 or more tokens, got {tuple(scores.shape)} and"
            f" {tuple(value.shape)}"
        )
    at_least_one(block=block)
    block = min(block, tokens)
    inside = _inside(scores, value.to(scores.dtype), block)
    ends = Attended(inside.maximum[..., -1], inside.total[..., -1], inside.weighted[..., -1, :])
    through = prefix_scan(ends)
    if state is not None:
        through = merge_attention(_beside(state), through)
    before = _shifted(through, state)
    whole = merge_attention(_beside(before), inside)
    output = whole.output().flatten(-3, -2)[..., :tokens, :]
    last = Attended(through.maximum[..., -1], through.total[..., -1], through.weighted[..., -1, :])
    return output, last


def prefix_scan(sets: Attended) -> Attended:
    """Merges set 1 .. k for every k along the last dimension of `maximum`, in log2 rounds (Hillis and Steele).

    Cost: O(n log n) merges for n sets, n at a time.
    """
    reach, n = 1, sets.maximum.shape[-1]
    while reach < n:
        both = merge_attention(
            Attended(
                sets.maximum[..., :-reach], sets.total[..., :-reach], sets.weighted[..., :-reach, :]
            ),
            Attended(
                sets.maximum[..., reach:], sets.total[..., reach:], sets.weighted[..., reach:, :]
            ),
        )
        sets = Attended(
            torch.cat([sets.maximum[..., :reach], both.maximum], -1),
            torch.cat([sets.total[..., :reach], both.total], -1),
            torch.cat([sets.weighted[..., :reach, :], both.weighted], -2),
        )
        reach *= 2
    return sets


def _inside(scores: Tensor, value: Tensor, block: int) -> Attended:
    """The prefixes of every block by itself: `[..., blocks, block]`."""
    short = -scores.shape[-1] % block
    if short:
        scores = torch.nn.functional.pad(scores, (0, short), value=-torch.inf)
        value = torch.nn.functional.pad(value, (0, 0, 0, short))
    scores, value = scores.unflatten(-1, (-1, block)), value.unflatten(-2, (-1, block))
    maximum = scores.detach().cummax(-1).values
    later = torch.ones(block, block, dtype=torch.bool, device=scores.device).triu(1)
    # masked before exp: a later score may exceed the maximum so far by any amount
    powers = (scores[..., None, :] - _finite(maximum)[..., None]).masked_fill(later, -torch.inf)
    weights = powers.exp()
    return Attended(maximum, weights.sum(-1), weights @ value)


def _shifted(sets: Attended, first: Attended | None) -> Attended:
    """What lies before each set: the sets moved on by one, `first` in front."""
    start = first or Attended(
        torch.full_like(sets.maximum[..., 0], -torch.inf),
        torch.zeros_like(sets.total[..., 0]),
        torch.zeros_like(sets.weighted[..., 0, :]),
    )
    return Attended(
        torch.cat([start.maximum[..., None], sets.maximum[..., :-1]], -1),
        torch.cat([start.total[..., None], sets.total[..., :-1]], -1),
        torch.cat([start.weighted[..., None, :], sets.weighted[..., :-1, :]], -2),
    )


def _beside(sets: Attended) -> Attended:
    """With a dimension of 1 after the sets', to merge with sets that have one more."""
    return Attended(
        sets.maximum.unsqueeze(-1), sets.total.unsqueeze(-1), sets.weighted.unsqueeze(-2)
    )


def _scale(maximum: Tensor, larger: Tensor) -> Tensor:
    return torch.exp(maximum.detach() - _finite(larger))


def _finite(maximum: Tensor) -> Tensor:
    """0 for -inf, which cannot be subtracted from itself."""
    return torch.where(maximum == -torch.inf, 0, maximum)
