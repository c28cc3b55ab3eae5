"""KVzip as a cache: the text is read, repeated, and what repeating did not need is dropped. Kim et al. 2025, arXiv 2505.23416."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from regard._errors import InputError
from regard.cache import scorers
from regard.cache.budget import Budget
from regard.cache.budgets import Global
from regard.cache.cache import Cache
from regard.cache.eviction import allowed
from regard.cache.reconstruction import reconstruct


class KVzip(Cache):
    """Reconstruction scores, ranked over all layers and heads; whatever is asked later, the same keys serve it.

    The first text that the model reads with this cache (in one call) is replayed and compressed when the call is over; what
    comes after it is kept.

    Args:
        model, options: as for `regard.cache.Cache`.
        budget: a size or a rule; a size is divided by `Global`.
        tokenizer: when the model does not carry its own.
        replay: tokens repeated at a time.
        chunks: repeat only this many chunks of the text, evenly spread.

    Raises:
        InputError: a batch of more than one text.

    Cost: about 1.5 prefills more at 2048 tokens, and the memory of the full cache until the replay is over.
    """

    state = ("_replayed", "_paused")

    def __init__(
        self,
        model: nn.Module,
        budget: Budget | float | int | str,
        *,
        tokenizer: Any = None,
        replay: int = 2048,
        chunks: int | None = None,
        **options: Any,
    ) -> None:
        rule = budget if isinstance(budget, Budget) else Global(budget)
        super().__init__(model, scorers.KVzip(), rule, **options)
        self.tokenizer, self.replay, self.chunks = tokenizer, replay, chunks

    def branch(self) -> KVzip:
        twin = super().branch()
        assert isinstance(twin, KVzip)
        twin._replayed = self._replayed
        return twin

    def leaving(self, failed: bool) -> None:
        super().leaving(failed)
        if failed or self._depth or self._replayed or self.get_seq_length() < 2:
            return
        self._replayed = True
        assert self.budget is not None
        if bool((allowed(self.budget, self.held[-1], self.held) >= self.held[-1].real).all()):
            return  # all of it fits
        if self.tokens is None or len(self.tokens) != 1:
            raise InputError(
                "KVzip repeats one text, given as input_ids; got "
                + ("embeddings" if self.tokens is None else f"a batch of {len(self.tokens)}")
            )
        peaks = reconstruct(
            self.model,
            self.tokens.to(self.held[0].device),
            tokenizer=self.tokenizer,
            chunk=self.replay,
            chunks=self.chunks,
            cache=self,
        )
        for layer, own in zip(self.held, peaks, strict=True):
            layer.slots["peak"] = torch.gather(own[None], 2, layer.positions.long())
        self._paused = False
        self.compress()
        self._paused = True

    def _begin(self) -> None:
        super()._begin()
        self._paused, self._replayed = True, False
