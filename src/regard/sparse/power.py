"""PowerAttention: key blocks at power-of-two distances, a short window and the sinks.

    query block q sees key block k <= q  when  D = q - k  is 0 or a power of two,  or  D < window,  or  k < sinks

Every distance d is reached in popcount(d) layers, so after l layers all distances below 2^l are covered without holes, with
O(log(N / block)) key blocks a query. Source: PowerAttention (arXiv 2503.03588), sections 3.1 to 3.3; block 256, window 5 and
sinks 1 there, counted in blocks.

Cost: time O(N block (window + sinks + log2(N / block))) a layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from regard._errors import InputError
from regard.sparse.pattern import Pattern


class Power(Pattern):
    """Power-of-two distances, `window` recent blocks (the query's own counts) and `sinks` first blocks.

    `block=1` gives the token-level pattern, with the same formula and scattered memory access.

    >>> Power(window=1, sinks=0).lists(1024, 1024)[7]
    [3, 5, 6, 7]
    """

    def __init__(self, *, window: int = 5, sinks: int = 1, block: int = 128, **where: Any) -> None:
        super().__init__(block=block, **where)
        for name, value, least in (("window", window, 1), ("sinks", sinks, 0)):
            if value < least:
                raise InputError.of(
                    name, given=value, expected=f"a number of blocks, {least} or more"
                )
        self.window, self.sinks = window, sinks

    def blocks(self, query: int, count: int) -> Iterator[int]:
        yield from range(max(query - self.window + 1, 0), query + 1)
        yield from range(self.sinks)
        distance = 1
        while distance <= query:
            yield query - distance
            distance *= 2
