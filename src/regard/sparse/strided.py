"""Strided ("slash") attention: a short window, the sinks, and every `stride`-th distance.

    query block q sees key block k <= q  when  q - k < window,  or  (q - k) mod stride = 0,  or  k < sinks

Any distance is reached in two layers once the window spans a stride (window >= stride), at the price of N / stride keys a
query. Sources: Sparse Transformer (arXiv 1904.10509), strided attention; a comparator of PowerAttention (arXiv 2503.03588).

Cost: time O(N^2 / stride + N block (window + sinks)) a layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from regard._errors import at_least_one
from regard.sparse.pattern import Pattern
from regard.sparse.sliding import check_window


class Strided(Pattern):
    """`window` recent blocks, the blocks at every multiple of `stride`, and the first `sinks` blocks.

    >>> Strided(window=2, stride=4, sinks=0).lists(1280, 1280)[9]
    [1, 5, 8, 9]
    """

    def __init__(
        self, *, window: int = 4, stride: int = 16, sinks: int = 1, block: int = 128, **where: Any
    ) -> None:
        super().__init__(block=block, **where)
        self.window, self.sinks = check_window(window, sinks)
        at_least_one(stride=stride)
        self.stride = stride

    def blocks(self, query: int, count: int) -> Iterator[int]:
        yield from range(query - self.window + 1, query + 1)
        yield from range(query, -1, -self.stride)
        yield from range(self.sinks)
