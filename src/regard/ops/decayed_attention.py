"""Linear attention whose memory fades by one number a token: the scalar state-space model of Mamba-2 (SSD).

    S_i = e^{a_i} S_{i-1} + k_i v_i^T,      o_i = q_i . S_i = sum_{j <= i} e^{a_{j+1} + ... + a_i} (q_i . k_j) v_j

With a = 0 it is the causal product of linear attention. Tokens are taken in chunks: within a chunk the sum over j is a masked
product, what comes before it is one memory a chunk, and these memories are themselves a recurrence over chunks.

Source: Dao and Gu 2024, "Transformers are SSMs", arXiv 2405.21060.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from regard._errors import at_least_one
from regard.ops.linear_attention import check_sequences
from regard.ops.linear_recurrence import linear_recurrence


def decayed_linear_attention(
    query: Float[Tensor, "batch heads tokens dim"],
    key: Float[Tensor, "batch heads tokens dim"],
    value: Float[Tensor, "batch heads tokens value_dim"],
    log_decay: Float[Tensor, "batch heads tokens"],
    *,
    memory: Float[Tensor, "batch heads dim value_dim"] | None = None,
    chunk: int = 64,
) -> tuple[
    Float[Tensor, "batch heads tokens value_dim"], Float[Tensor, "batch heads dim value_dim"]
]:
    """Outputs of all tokens and the memory after the last.

    Args:
        query, key, value: of each token; nothing is normalised or scaled.
        log_decay: a, at most 0: how much of the memory a token leaves, as a logarithm.
        memory: S before the first token, zeros by default.
        chunk: any size gives the same numbers.

    Cost: O(tokens (chunk + value_dim) dim) time; memory `tokens x chunk` and `tokens / chunk` memories.

    Raises:
        InputError: shapes that do not fit, no tokens, or a chunk below 1.

    >>> ones = torch.ones(1, 1, 3, 1)
    >>> decayed_linear_attention(ones, ones, ones, torch.full((1, 1, 3), 0.5).log())[0].flatten()
    tensor([1.0000, 1.5000, 1.7500])
    """
    check_sequences(key, value, None)
    at_least_one(chunk=chunk)
    tokens = query.shape[2]
    chunk = min(chunk, tokens)
    short = -tokens % chunk
    query, key, value = (
        pad(part, (0, 0, 0, short)).unflatten(2, (-1, chunk)) for part in (query, key, value)
    )
    run = pad(log_decay, (0, short)).unflatten(2, (-1, chunk)).cumsum(-1)
    gaps = run[..., :, None] - run[..., None, :]
    later = torch.ones(chunk, chunk, dtype=torch.bool, device=run.device).triu(1)
    kept = gaps.masked_fill(later, -torch.inf).exp()
    inside = (query @ key.mT * kept) @ value

    left = (run[..., -1:] - run).exp()[..., None]
    own = ((left * key).mT @ value).flatten(-2)
    whole = run[..., -1:].exp().expand_as(own)
    first = None if memory is None else memory.flatten(-2)
    after = linear_recurrence(whole, own, first)
    begin = torch.zeros_like(after[:, :, 0]) if first is None else first
    before = torch.cat([begin[:, :, None], after[:, :, :-1]], 2)
    size = (key.shape[-1], value.shape[-1])
    outside = run.exp()[..., None] * query @ before.unflatten(-1, size)
    return (inside + outside).flatten(2, 3)[:, :, :tokens], after[:, :, -1].unflatten(-1, size)
