"""Dynamic mask attention: values say how important each key is, and a query reads the most important keys before it.

    importance_j = exp(A * softplus(W v_j)),      v_j the values of all KV heads, one A and one row of W a KV head,
    output_i     = sum_{j in S_i} softmax_j(q_i . k_j / sqrt(d) + importance_j) v_j,
    S_i          = the `window` most important of the keys 0 .. i.

The importance belongs to the key alone, so the sets S_i of successive queries differ by what came in and what it pushed out:
a key that was pushed out never comes back. One number for each key, the end of its life, therefore stands for the whole mask:

    query i sees key j   exactly when   j <= i < end_j                          (`running_top_k`)

and a block of queries needs only the keys alive when it begins, at most `window`, and its own (`dynamic_mask_attention`). The
choice itself has no gradient; the importance of the keys in it has, through the softmax.

Source: Shi et al. 2025, "Trainable Dynamic Mask Sparse Attention", arXiv 2508.02124. Of equally important keys the newer ones
stay, which the paper leaves open.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import linear, pad, softplus

from regard._errors import InputError, at_least_one


def value_importance(
    value: Float[Tensor, "batch kv_heads tokens dim"],
    weight: Float[Tensor, "kv_heads kv_width"],
    rate: Float[Tensor, " kv_heads"],
) -> Float[Tensor, "batch kv_heads tokens"]:
    """`exp(rate * softplus(weight @ values))`: how important each key is to each KV head, in float32 at least.

    Positive, and 1 for a rate of 0. It is added to scores, so it favours keys and never hides one.
    Cost: kv_heads x kv_width multiplications a token.

    >>> value_importance(torch.zeros(1, 1, 2, 4), torch.ones(1, 4), torch.zeros(1))
    tensor([[[1., 1.]]])
    """
    return value_importance_linear(value, weight, rate).exp()


def value_importance_linear(
    value: Float[Tensor, "batch kv_heads tokens dim"],
    weight: Float[Tensor, "kv_heads kv_width"],
    rate: Float[Tensor, " kv_heads"],
) -> Float[Tensor, "batch kv_heads tokens"]:
    """`rate * softplus(weight @ values)`, the form of the authors' later kernels: without the exponential, and of either sign.

    Raises:
        InputError: the weight does not read all KV heads' values.
    """
    width = value.shape[1] * value.shape[3]
    if weight.shape[1] != width:
        raise InputError(
            f"weight must be [kv_heads, {width}] for values {tuple(value.shape)}, got {tuple(weight.shape)}"
        )
    precise = torch.promote_types(value.dtype, torch.float32)
    flat = value.transpose(1, 2).flatten(2).to(precise)
    step = softplus(linear(flat, weight.to(precise)))
    return (rate.to(precise) * step).transpose(1, 2)


def running_top_k(scores: Float[Tensor, "*rows tokens"], k: int) -> Int[Tensor, "*rows tokens"]:
    """When each token drops out of the k highest so far: it is among the k highest of tokens 0 .. i for j <= i < end_j.

    `end_j` is `tokens` for those that never drop out, and j for those that never were among the k highest. Of equal scores the
    newer one counts as higher.

    Cost: O(tokens) to find the few that ever stood among the k highest, about k (1 + log2(tokens / k)) = m of them for scores in
    random order and all for scores that only rise; then O(m log m): the k-th highest of every prefix comes from a wavelet
    matrix, one pass for each bit of the ranks, and a token ends where that reaches its own rank. Memory O(tokens).

    Raises:
        InputError: k below 1.

    >>> running_top_k(torch.tensor([3.0, 1.0, 2.0, 5.0, 4.0]), 2)
    tensor([4, 2, 3, 5, 5])
    """
    at_least_one(k=k)
    scores, tokens = scores.detach(), scores.shape[-1]
    place = torch.arange(tokens, device=scores.device)
    index = true_places(_contenders(scores, k))
    if 2 * index.shape[-1] >= tokens:
        return torch.maximum(_drops_out(scores, k), place)
    padded = pad(
        scores, (0, 1), value=-torch.inf
    )  # empty slots, which come last, stand behind the end
    ends = _drops_out(padded.gather(-1, index), k)
    ends = pad(index, (0, 1), value=tokens).gather(-1, ends)
    lasting = pad(place.expand_as(scores), (0, 1)).scatter(-1, index, torch.maximum(ends, index))
    return lasting[..., :tokens]


def _contenders(scores: Float[Tensor, "*rows tokens"], k: int) -> Bool[Tensor, "*rows tokens"]:
    """False at tokens that cannot be among the k highest so far, for all that the ever longer prefixes before them tell."""
    tokens = scores.shape[-1]
    chosen = torch.ones(scores.shape, dtype=torch.bool, device=scores.device)
    best, seen = scores[..., :k], k
    while seen < tokens:
        chunk = slice(seen, min(2 * seen, tokens))
        chosen[..., chunk] = ~(scores[..., chunk] < best.amin(-1, keepdim=True))
        if chunk.stop < tokens:
            best = torch.cat([best, scores[..., chunk]], dim=-1).topk(k, sorted=False).values
        seen = chunk.stop
    return chosen


def true_places(
    chosen: Bool[Tensor, "*rows tokens"], size: int | None = None
) -> Int[Tensor, "*rows slots"]:
    """The places of the true entries in order, as many as the fullest row has (or `size`); empty slots hold the row's length.

    >>> true_places(torch.tensor([[False, True, True], [True, False, False]]))
    tensor([[1, 2],
            [0, 3]])
    """
    tokens = chosen.shape[-1]
    count = chosen.cumsum(-1)
    size = int(count[..., -1:].max()) if size is None and chosen.numel() else size or 0
    slot = (count - 1).masked_fill_(~chosen, size).clamp_(max=size)
    index = slot.new_full((*chosen.shape[:-1], size + 1), tokens)
    places = torch.arange(tokens, device=chosen.device).expand(chosen.shape)
    return index.scatter_(-1, slot, places)[..., :size]


def _drops_out(scores: Float[Tensor, "*rows tokens"], k: int) -> Int[Tensor, "*rows tokens"]:
    """The first place from which a token is not among the k highest so far, which may lie before its own."""
    place = torch.arange(scores.shape[-1], device=scores.device)
    order = scores.contiguous().argsort(dim=-1, stable=True)
    rank = torch.empty_like(order).scatter_(-1, order, place.expand_as(order))
    return torch.searchsorted(_running_kth_rank(rank, k), rank, right=True)


def _running_kth_rank(rank: Int[Tensor, "*rows tokens"], k: int) -> Int[Tensor, "*rows tokens"]:
    """The k-th highest rank among tokens 0 .. i for every i, -1 while there are fewer; ranks are 0 .. tokens - 1.

    All prefixes descend together from the highest bit: a prefix whose part holds k ranks with that bit set goes on among these,
    the others among the rest, with those k counted off. Each level splits its row stably by the bit, so that a prefix's part
    stays one interval, `left:right`.
    """
    tokens = rank.shape[-1]
    place = torch.arange(tokens, device=rank.device).expand_as(rank)
    row, left, right = rank, torch.zeros_like(rank), place + 1
    missing, limit = torch.full_like(rank, k), torch.zeros_like(rank)
    for bit in reversed(range((tokens - 1).bit_length())):
        high = row >> bit & 1
        ones = pad(high.cumsum(-1), (1, 0))
        zeros = tokens - ones[..., -1:]
        ones_left, ones_right = ones.gather(-1, left), ones.gather(-1, right)
        count = ones_right - ones_left
        upper = count >= missing
        limit = limit + (upper.long() << bit)
        missing = torch.where(upper, missing, missing - count)
        left = torch.where(upper, zeros + ones_left, left - ones_left)
        right = torch.where(upper, zeros + ones_right, right - ones_right)
        before = ones[..., :-1]
        target = torch.where(high.bool(), zeros + before, place - before)
        row = torch.empty_like(row).scatter_(-1, target, row)
    return limit.masked_fill(place < k - 1, -1)


def lifetimes(
    importance: Float[Tensor, "batch kv_heads keys"],
    window: int,
    *,
    local: int = 0,
    valid: Bool[Tensor, "batch kv_heads keys"] | None = None,
) -> Int[Tensor, "batch kv_heads keys"]:
    """Where each key's life ends: query i sees key j for j <= i < end_j.

    Args:
        importance: of the keys, in their order.
        window: keys that a query keeps, the most important ones up to itself.
        local: the newest keys, which a query sees whatever their importance; 0 is the paper.
        valid: False at padding, which is seen by itself alone (so that no query sees nothing) and pushes nothing out.

    Cost: that of `running_top_k`.
    """
    place = torch.arange(importance.shape[-1], device=importance.device)
    ranked = importance if valid is None else importance.masked_fill(~valid, -torch.inf)
    ends = running_top_k(ranked, window)
    if local:
        ends = torch.maximum(ends, place + local)
    return ends if valid is None else torch.where(valid, ends, place + 1)


def dynamic_mask(
    ends: Int[Tensor, "batch kv_heads keys"], rows: Int[Tensor, " rows"]
) -> Bool[Tensor, "batch kv_heads rows keys"]:
    """Which keys the queries at places `rows` see, as a tensor: for a block of rows, not for all of a long text.

    >>> dynamic_mask(torch.tensor([[[3, 2, 3]]]), torch.arange(3))[0, 0].int()
    tensor([[1, 0, 0],
            [1, 1, 0],
            [1, 0, 1]], dtype=torch.int32)
    """
    place = torch.arange(ends.shape[-1], device=ends.device)
    row = rows[:, None]
    return (place <= row) & (row < ends[..., None, :])


def dynamic_mask_attention(
    query: Float[Tensor, "batch heads queries dim"],
    key: Float[Tensor, "batch kv_heads keys dim"],
    value: Float[Tensor, "batch kv_heads keys value_dim"],
    importance: Float[Tensor, "batch kv_heads keys"],
    ends: Int[Tensor, "batch kv_heads keys"],
    *,
    scaling: float | None = None,
    block: int = 128,
) -> Float[Tensor, "batch heads queries value_dim"]:
    """Attention of the newest `queries` places over the keys alive, in blocks of queries, biased by the keys' importance.

    Cost: O(queries x (window + block)) products and O(block x (window + block)) memory a head, where all of attention takes
    O(queries x keys); with it, one copy of the keys and values that each block reads.

    Raises:
        InputError: more queries than keys, heads that are no multiple of KV heads, or a block below 1.
    """
    queries, keys, kv_heads = query.shape[2], key.shape[2], key.shape[1]
    if queries > keys or query.shape[1] % kv_heads:
        raise InputError(
            "queries must be the newest of the keys, and heads a multiple of KV heads: "
            f"got query {tuple(query.shape)}, key {tuple(key.shape)}"
        )
    at_least_one(block=block)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    offset, precise = keys - queries, torch.promote_types(query.dtype, torch.float32)
    place = torch.arange(keys, device=query.device).expand_as(ends)
    slots, pieces = place[..., :offset], []
    for first in range(offset, keys, block):
        row = place[..., first : first + block]
        slots = torch.cat([_alive(slots, ends, first), row], -1)
        seen = (slots[..., None, :] <= row[..., None]) & (
            row[..., None] < ends.gather(-1, slots)[..., None, :]
        )
        rows = query[:, :, first - offset : first - offset + block].unflatten(1, (kv_heads, -1))
        scores = (rows * scale).to(precise) @ _take(key, slots).to(precise).mT[:, :, None]
        scores = scores + importance.gather(-1, slots)[:, :, None, None]
        weights = scores.masked_fill(~seen[:, :, None], -torch.inf).softmax(-1)
        pieces.append((weights @ _take(value, slots).to(precise)[:, :, None]).flatten(1, 2))
    return torch.cat(pieces, 2).to(query.dtype)


def _alive(slots: Tensor, ends: Tensor, row: int) -> Tensor:
    """The slots whose keys the query at `row` may still see; heads with fewer than the others carry some dead ones along."""
    alive = ends.gather(-1, slots) > row
    count = int(alive.sum(-1).max()) if slots.shape[-1] else 0
    return slots.gather(-1, (~alive).long().argsort(dim=-1, stable=True)[..., :count])


def _take(states: Tensor, slots: Tensor) -> Tensor:
    return states.gather(2, slots[..., None].expand(-1, -1, -1, states.shape[-1]))
