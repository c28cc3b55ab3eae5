"""Sliding windows with attention sinks, in blocks and in single tokens.

    Sliding:        query block q sees key block k <= q  when  q - k < window  or  k < sinks
    SlidingTokens:  query t sees key s <= t              when  t - s < window  or  s < sinks

Information travels window - 1 blocks a layer (window - 1 tokens), so what a token can know grows linearly with depth.
Sources: Longformer (arXiv 2004.05150) for the window, StreamingLLM (arXiv 2309.17453) for the sinks.

Cost: time O(N block (window + sinks)) a layer, O(N (window + 2 block)) for the token window.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from jaxtyping import Bool, Int
from torch import Tensor

from regard._errors import InputError
from regard.sparse.pattern import Pattern


class Sliding(Pattern):
    """The `window` newest blocks (the query's own counts) and the first `sinks` blocks.

    >>> Sliding(window=2, sinks=1).lists(1024, 1024)[5]
    [0, 4, 5]
    """

    def __init__(self, *, window: int = 5, sinks: int = 1, block: int = 128, **where: Any) -> None:
        super().__init__(block=block, **where)
        self.window, self.sinks = check_window(window, sinks)

    def blocks(self, query: int, count: int) -> Iterator[int]:
        yield from range(query - self.window + 1, query + 1)
        yield from range(self.sinks)


class SlidingTokens(Pattern):
    """Exactly the `window` newest tokens (the query counts) and the first `sinks` tokens.

    >>> import torch
    >>> pattern = SlidingTokens(window=2, sinks=1)
    >>> pattern.visible(torch.tensor([5]), torch.arange(6)).int().tolist()
    [1, 0, 0, 0, 1, 1]
    """

    def __init__(
        self, *, window: int = 512, sinks: int = 4, block: int = 128, **where: Any
    ) -> None:
        super().__init__(block=block, **where)
        self.window, self.sinks = check_window(window, sinks)

    def blocks(self, query: int, count: int) -> Iterator[int]:
        yield from range((query * self.block - self.window + 1) // self.block, query + 1)
        yield from range(-(-self.sinks // self.block))

    def visible(
        self, query: Int[Tensor, "*rows"], key: Int[Tensor, "*columns"]
    ) -> Bool[Tensor, "..."]:
        return (query - key < self.window) | (key < self.sinks)


def check_window(window: int, sinks: int) -> tuple[int, int]:
    """A window of 1 or more and no negative number of sinks."""
    for name, value, least in (("window", window, 1), ("sinks", sinks, 0)):
        if value < least:
            raise InputError.of(name, given=value, expected=f"{least} or more")
    return window, sinks
