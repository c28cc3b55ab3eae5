"""Vectors as sums of concepts: states of a text aggregated into few vectors, and choices made or written from these.

    1. segments are read one by one, each from position 0; a layer's states are taken, or the input embeddings
    2. v = f(h), f one of h, act(h), -act(-h), h + act(h), h - act(-h)                         `activated`
    3. words:  mean, w1mean (weights 1, 2, .. n), the last, or all of them                     `aggregate`
    4. norm:   none, L2, z (mean 0, variance 1), variance (divided by the deviation)           `normalise`
    5. segments, then examples: mean or none, normed again after a mean                        `average`
    6. choice: argmax over choices of the largest product with a context vector                `choose`
       or, with soft clustering, of q . sum_j softmax_j(q . m_j) m_j                           `soft_cluster`
       or the likelihood of its tokens after the vectors as a prefix                           `prefix_scores`
       of a model, or of a decoder without parameters                                          `parameterless_logits`

Our addition: the first token of a text is left out where asked, as a decoder's state there is a sink, far larger than all others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import layer_norm, normalize, silu

from regard._errors import InputError
from regard.attach.cache_names import cache_argument, returned_cache

ACTIVATIONS: dict[str, Callable[[Tensor, Callable[[Tensor], Tensor]], Tensor]] = {
    "identity": lambda h, act: h,
    "act": lambda h, act: act(h),
    "-act": lambda h, act: -act(-h),
    "h + act": lambda h, act: h + act(h),
    "h - act": lambda h, act: h - act(-h),
}
NORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda v: v,
    "L2": lambda v: normalize(v, dim=-1),
    "z": lambda v: layer_norm(v, v.shape[-1:]),
    "variance": lambda v: v / v.std(-1, keepdim=True),
}
WORDS = ("mean", "w1mean", "last", "all")


def activated(
    states: Float[Tensor, "*any width"], kind: str, act: Callable[[Tensor], Tensor] = silu
) -> Float[Tensor, "*any width"]:
    """f of a state; `act` is the model's own activation.

    >>> activated(torch.tensor([1.0]), "-act", torch.relu), activated(torch.tensor([-1.0]), "-act", torch.relu)
    (tensor([-0.]), tensor([-1.]))
    """
    return _known(ACTIVATIONS, "activation", kind)(states, act)


def normalise(vectors: Float[Tensor, "*any width"], kind: str) -> Float[Tensor, "*any width"]:
    """A vector of another length, by one of the norms."""
    return _known(NORMS, "norm", kind)(vectors)


def counted(valid: Bool[Tensor, "batch tokens"], drop_first: bool) -> Bool[Tensor, "batch tokens"]:
    """Which tokens count: no padding and, where asked, not the first, unless the text has no other."""
    if not drop_first:
        return valid
    place = torch.arange(valid.shape[1], device=valid.device)
    return valid & ((place > 0) | (valid.sum(1, keepdim=True) == 1))


def aggregate(
    states: Float[Tensor, "batch tokens width"],
    valid: Bool[Tensor, "batch tokens"],
    words: str,
    *,
    norm: str = "none",
    drop_first: bool = False,
) -> Float[Tensor, "batch vectors width"]:
    """One vector a text: the weighted mean of its states, or the last. "all" keeps them; `counted` says which of them count.

    Args:
        states: of the tokens, padding at the end.
        valid: which tokens are no padding.
        words: "mean", "w1mean", "last" or "all".
        norm: of the result; "last" skips it.
        drop_first: leave the first token out, unless the text has no other; w1mean then begins with a weight of 2.

    >>> states = torch.tensor([[[1.0], [2.0], [6.0]]])
    >>> valid = torch.ones(1, 3, dtype=torch.bool)
    >>> [round(float(aggregate(states, valid, words)), 3) for words in ("mean", "w1mean", "last")]
    [3.0, 3.833, 6.0]
    """
    if words not in WORDS:
        raise InputError.of("words", given=words, expected=f"one of {', '.join(WORDS)}")
    if words == "last":
        newest = valid.sum(1) - 1
        return states[torch.arange(len(states), device=states.device), newest][:, None]
    if words == "all":
        return normalise(states, norm)
    place = torch.arange(1, states.shape[1] + 1, device=states.device)
    rising = place if words == "w1mean" else torch.ones_like(place)
    weights = (counted(valid, drop_first) * rising).to(states.dtype)
    shares = weights / weights.sum(1, keepdim=True)
    return normalise((shares[..., None] * states).sum(1, keepdim=True), norm)


def average(
    vectors: Float[Tensor, "parts vectors width"], norm: str = "none"
) -> Float[Tensor, "1 vectors width"]:
    """The mean over segments of a text, or over examples, normed again.

    >>> average(torch.tensor([[[3.0, 0.0]], [[0.0, 3.0]]]), "L2")
    tensor([[[0.7071, 0.7071]]])
    """
    return normalise(vectors.mean(0, keepdim=True), norm)


def choose(
    context: Float[Tensor, "batch vectors width"],
    choices: Float[Tensor, "batch choices width"],
    counts: Bool[Tensor, "batch vectors"] | None = None,
) -> Float[Tensor, "batch choices"]:
    """The score of each choice: its largest product with a context vector that counts (all, when left out)."""
    return _products(choices, context, counts).amax(-1)


def soft_cluster(
    query: Float[Tensor, "batch choices width"],
    context: Float[Tensor, "batch vectors width"],
    counts: Bool[Tensor, "batch vectors"] | None = None,
) -> Float[Tensor, "batch choices width"]:
    """For each choice the context's vectors, weighted by the softmax of their products with it, unscaled.

    >>> m = torch.tensor([[[200.0, 0.0], [0.0, 1.0]]])
    >>> soft_cluster(torch.tensor([[[1.0, 0.0]]]), m)
    tensor([[[200.,   0.]]])
    """
    return _products(query, context, counts).softmax(-1) @ context


def _products(query: Tensor, context: Tensor, counts: Tensor | None) -> Tensor:
    products = query @ context.mT
    return products if counts is None else products.masked_fill(~counts[:, None], -torch.inf)


def parameterless_logits(
    inputs: Float[Tensor, "batch tokens width"], output: Float[Tensor, "vocabulary width"]
) -> Float[Tensor, "batch tokens vocabulary"]:
    """A decoder without parameters: causal softmax(Q Q^T) V, unscaled, with Q = K = V = inputs, read by the output embeddings."""
    scores = inputs @ inputs.mT
    later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=inputs.device).triu(1)
    return scores.masked_fill(later, -torch.inf).softmax(-1) @ inputs @ output.T


@torch.no_grad()
def prefix_scores(
    model: Any,
    prefix: Float[Tensor, "batch vectors width"],
    prefix_valid: Bool[Tensor, "batch vectors"],
    ids: Int[Tensor, "batch choices tokens"],
    valid: Bool[Tensor, "batch choices tokens"],
) -> Float[Tensor, "batch choices"]:
    """Log-likelihood of each choice's tokens behind vectors that stand in the place of input embeddings.

    The prefix is read once, then all choices of an item go on from it. With the input embeddings of a text as the prefix it is
    the ordinary score of a continuation. Padding stands at the end of prefixes and choices.

    Cost: one forward pass over `vectors + choices x tokens` tokens an item.
    """
    batch, choices, tokens = ids.shape
    begun = model.base_model(
        inputs_embeds=prefix, attention_mask=prefix_valid.long(), use_cache=True
    )
    length = prefix_valid.sum(1)
    last = begun.last_hidden_state[torch.arange(batch), length - 1]
    states = last[:, None, None].expand(-1, choices, 1, -1)
    if tokens > 1:
        cache = returned_cache(begun)
        cache.batch_repeat_interleave(choices)
        mask = torch.cat(
            [prefix_valid.repeat_interleave(choices, 0), valid.flatten(0, 1)[:, :-1]], 1
        )
        positions = length.repeat_interleave(choices)[:, None] + torch.arange(tokens - 1)
        went = model.base_model(
            input_ids=ids.flatten(0, 1)[:, :-1],
            attention_mask=mask.long(),
            position_ids=positions,
            **{cache_argument(model.base_model): cache},
        )
        states = torch.cat([states, went.last_hidden_state.unflatten(0, (batch, choices))], 2)
    odds = torch.zeros(ids.shape, device=ids.device)
    chosen = valid.nonzero(as_tuple=True)
    logits = model.get_output_embeddings()(states[chosen]).float()
    odds[chosen] = logits.log_softmax(-1).gather(-1, ids[chosen][:, None])[:, 0]
    return odds.sum(-1)


@torch.no_grad()
def layer_states(
    model: Any, texts: Sequence[Sequence[int]], layers: Sequence[int], *, batch: int = 100
) -> tuple[Float[Tensor, "layers texts tokens width"], Bool[Tensor, "texts tokens"]]:
    """The states of token lists after some layers, each text by itself; short texts end in zeros.

    0 are the input embeddings and -1 the top, which transformers gives behind the final norm.
    """
    ids, valid = padded(texts)
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    found: Tensor | None = None
    for start in range(0, len(order), batch):
        rows = torch.tensor(order[start : start + batch])
        length = int(valid[rows].sum(1).max())
        output = model.base_model(
            input_ids=ids[rows, :length],
            attention_mask=valid[rows, :length].long(),
            output_hidden_states=True,
        )
        states = torch.stack([output.hidden_states[layer] for layer in layers])
        if found is None:
            found = states.new_zeros(len(layers), *ids.shape, states.shape[-1])
        found[:, rows, :length] = states * valid[rows, :length, None]
    assert found is not None
    return found, valid


def padded(
    texts: Sequence[Sequence[int]],
) -> tuple[Int[Tensor, "texts tokens"], Bool[Tensor, "texts tokens"]]:
    """Token lists as one tensor with zeros at their ends, and which entries are tokens.

    Raises:
        InputError: no texts, or an empty one.
    """
    if not texts or not all(len(text) for text in texts):
        raise InputError.of(
            "texts", given=texts, expected="one or more lists of one or more tokens"
        )
    longest = max(map(len, texts))
    ids = torch.zeros(len(texts), longest, dtype=torch.long)
    for row, text in enumerate(texts):
        ids[row, : len(text)] = torch.tensor(list(text))
    valid = torch.arange(longest) < torch.tensor([[len(text)] for text in texts])
    return ids, valid


def _known(table: dict[str, Any], name: str, kind: str) -> Any:
    if kind not in table:
        raise InputError.of(name, given=kind, expected=f"one of {', '.join(table)}")
    return table[kind]
