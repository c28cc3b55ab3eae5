"""Previous-token, duplicate-token and induction scores: how much a head looks at one known place.

Each score is a mean, over query rows, of the weight on a single key that the tokens determine. With t the tokens and
p(i) the latest position before i that holds the same token as i:

* previous token: `A[i, i - 1]`, over rows that see an earlier token;
* duplicate token: `A[i, p(i)]`, over rows whose token occurred before;
* induction: `A[i, p(i) + 1]`, the same rows: the token that followed the last time.

On random tokens repeated with period P (the usual probe: nothing but the first copy predicts the second) p(i) is i - P.
Sources: Elhage et al. 2021 (previous token), Wang et al. 2022, arXiv 2211.00593 (duplicate token), Olsson et al. 2022,
arXiv 2209.11895 (induction). Only the named entries of a row are read: O(queries) time and memory for each head.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from regard._errors import InputError, ModelError
from regard.attach.cache_names import given_cache
from regard.engine import Block
from regard.instruments.base import HeadMeasure, RowInstrument

R = TypeVar("R", bound="_Repeats")


def latest_occurrence(
    tokens: Int[Tensor, "batch tokens"], valid: Bool[Tensor, "batch tokens"] | None = None
) -> Int[Tensor, "batch tokens"]:
    """For each token the latest earlier position of the same token, -1 where there is none.

    Positions where `valid` is False neither have an occurrence nor count as one. O(tokens log tokens).

    >>> latest_occurrence(torch.tensor([[7, 5, 7, 7, 5]]))
    tensor([[-1, -1,  0,  2,  1]])
    """
    own = torch.arange(tokens.shape[1], device=tokens.device)
    if valid is not None:
        tokens = torch.where(valid, tokens, -1 - own)  # padding differs from everything
    order = tokens.argsort(dim=1, stable=True)
    ordered = tokens.gather(1, order)
    same = torch.zeros_like(ordered, dtype=torch.bool)
    same[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
    before = torch.where(same, order.roll(1, dims=1), -1)
    return torch.empty_like(order).scatter_(1, order, before)


def weight_on(
    block: Block, keys: Int[Tensor, "batch_or_one rows"]
) -> Float[Tensor, "batch heads rows"]:
    """The weight of each query row of a block on one key slot; 0 where the slot is not in sight."""
    weights, lo = block.weights, block.keys.start
    inside = (keys >= lo) & (keys < lo + weights.shape[-1])
    index = (keys - lo).clamp(0, weights.shape[-1] - 1)[:, None, :, None]
    picked = weights.gather(-1, index.expand(*weights.shape[:3], 1))[..., 0]
    return picked.masked_fill(~inside[:, None], 0)


class PreviousToken(RowInstrument):
    """Mean weight on the token just before the query. Works on any input; `compute()["previous_token"]`.

    >>> from regard.engine import AttentionCall, Pipeline, attend
    >>> instrument, zeros = PreviousToken(), torch.zeros(1, 1, 3, 4)
    >>> _ = attend(AttentionCall.make(zeros, zeros, zeros), Pipeline([instrument]))
    >>> instrument.compute()["previous_token"]["L0H0"]  # the mean of 1/2 and 1/3
    0.41666...
    """

    quantities = {
        "previous_token": ("share", "mean over queries that see an earlier token of A[t, t - 1]")
    }

    def weights(self, block: Block) -> None:
        if block.site.kind != "self":
            return
        positions = block.positions[None]
        rows = weight_on(block, positions - 1)
        self.add_rows(block, positions > block.first_key, previous_token=rows)


class _Repeats(RowInstrument):
    """Weight on a place near the latest earlier copy of the query's token.

    Reads `input_ids` and `attention_mask` of the model it is attached to; in cached generation the new tokens are
    added to those seen before.
    """

    _after = 0
    reads_late = False  # the tokens are known while the step runs

    def __init__(self) -> None:
        super().__init__()
        self._targets: dict[str, Tensor] = {}
        self._tokens: dict[str, Tensor] = {}
        self._handle: Any = None

    def start(self, session: Any) -> None:
        super().start(session)
        self._tokens, self._targets = {}, {}
        self._handle = session.model.register_forward_pre_hook(self._see, with_kwargs=True)

    def stop(self) -> None:
        super().stop()
        if self._handle is not None:
            self._handle.remove()
        self._tokens, self._targets, self._handle = {}, {}, None

    def follow(
        self: R,
        tokens: Int[Tensor, "batch tokens"],
        valid: Bool[Tensor, "batch tokens"] | None = None,
        *,
        stack: str = "",
    ) -> R:
        """Names the tokens behind the key slots of the next calls; attached instruments find them by themselves."""
        found = latest_occurrence(tokens, valid)
        self._tokens[stack] = tokens
        self._targets[stack] = torch.where(found >= 0, found + self._after, -1)
        return self

    def _see(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        first = args[0] if args and isinstance(args[0], Tensor) else None
        tokens, masked = kwargs.get("input_ids", first), kwargs.get("attention_mask")
        streams = {"": (tokens, masked)}
        if getattr(getattr(module, "config", None), "is_encoder_decoder", False):
            decoded = kwargs.get("decoder_input_ids"), kwargs.get("decoder_attention_mask")
            streams = {"encoder": (tokens, masked), "": decoded}
        cache = given_cache(kwargs)
        seen = int(cache.get_seq_length()) if cache is not None else 0
        for stack, (ids, mask) in streams.items():
            if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.is_floating_point():
                self._targets.pop(stack, None)
                continue
            if seen and stack == "":
                ids = torch.cat([self._history(ids, seen), ids], dim=1)
            usable = isinstance(mask, Tensor) and mask.shape == ids.shape
            self.follow(ids, mask.bool() if usable and mask is not None else None, stack=stack)

    def _history(self, ids: Tensor, seen: int) -> Tensor:
        """The tokens in the cache; those that came before the instrument was attached differ from all others."""
        known = self._tokens.get("")
        if known is not None and known.shape[0] == ids.shape[0] and known.shape[1] >= seen:
            return known[:, :seen]
        return (-1 - torch.arange(seen, device=ids.device)).expand(ids.shape[0], -1)

    def weights(self, block: Block) -> None:
        if block.site.kind != "self":
            return
        targets = self._targets.get(block.site.stack)
        if targets is None:
            if block.site.stack:
                return
            raise InputError(
                f"{type(self).__name__} compares tokens, so the model must be run with input_ids"
            )
        if int(block.positions[-1]) >= targets.shape[1]:
            raise InputError(
                f"{type(self).__name__} knows {targets.shape[1]} tokens, but the attention call has a query at "
                f"{int(block.positions[-1])}; attach it before the first token, or call follow(tokens)"
            )
        dropped = max(
            0, targets.shape[1] - block.call.keys
        )  # a sliding cache keeps the newest keys only
        keys = targets[:, block.positions + dropped].to(block.rows.device)
        rows = weight_on(block, keys - dropped)
        self.add_rows(block, keys >= 0, **{next(iter(self.quantities)): rows})


class DuplicateToken(_Repeats):
    """Mean weight on the latest earlier copy of the query's own token; `compute()["duplicate_token"]`."""

    quantities = {
        "duplicate_token": (
            "share",
            "mean over queries whose token occurred before, last at p, of A[t, p]",
        )
    }


class Induction(_Repeats):
    """Mean weight on the token that followed the latest earlier copy; `compute()["induction"]`.

    >>> from regard.engine import AttentionCall, Pipeline, attend
    >>> instrument, zeros = Induction().follow(torch.tensor([[3, 5, 3, 5]])), torch.zeros(1, 1, 4, 4)
    >>> _ = attend(AttentionCall.make(zeros, zeros, zeros), Pipeline([instrument]))
    >>> instrument.compute()["induction"]["L0H0"]  # A[2, 1] = 1/3 and A[3, 2] = 1/4
    0.29166...
    """

    quantities = {
        "induction": (
            "share",
            "mean over queries whose token occurred before, last at p, of A[t, p + 1]",
        )
    }
    _after = 1


def probe_heads(
    model: Any,
    tokenizer: Any = None,
    *,
    length: int = 64,
    repeats: int = 2,
    batch: int = 8,
    seed: int = 0,
) -> dict[str, HeadMeasure]:
    """Previous-token, duplicate-token and induction scores of all heads on repeated random tokens.

    Args:
        model: a transformers model that reads tokens.
        tokenizer: names the ordinary tokens; by default the model's own, without one the whole vocabulary is used.
        length: different random tokens in a sequence, which are then repeated.
        repeats: copies in a sequence.
        batch: sequences.
        seed: of the tokens.

    Returns:
        `previous_token`, `duplicate_token` and `induction`: a share of attention for each head.

    Cost: one forward pass over `batch * repeats * length` tokens.

    >>> import regard  # doctest: +SKIP
    >>> probe_heads(regard.load("smollm2"))["induction"].top(3)  # doctest: +SKIP
    """
    from regard.attach import attach
    from regard.texts import induction_batch

    probe = induction_batch(_vocabulary(model, tokenizer), length, repeats, batch, seed)
    tokens = probe.tokens.to(next(model.parameters()).device)
    inputs = {"input_ids": tokens}
    if getattr(model.config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = tokens
    instruments = (PreviousToken(), DuplicateToken(), Induction())
    with torch.no_grad(), attach(model, *instruments):
        model(**inputs)
    return {name: m for i in instruments for name, m in i.compute().items()}


def _vocabulary(model: Any, tokenizer: Any) -> Any:
    """A tokenizer, or the size of the vocabulary when there is none."""
    from regard.pretrained import tokenizer_of

    try:
        return tokenizer_of(model, tokenizer)
    except ModelError:
        size = getattr(model.config.get_text_config(), "vocab_size", None)
        if not size:
            raise InputError(
                f"{type(model).__name__} reads no tokens, so it has none to repeat"
            ) from None
        return int(size)
