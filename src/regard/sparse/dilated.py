"""A dilated window: every `dilation`-th block back from the query.

    query block q sees key block k <= q  when  q - k = j dilation for some j < window,  or  k < sinks

All distances on a path are multiples of the dilation: without sinks the others are out of reach at any depth. Source:
Longformer (arXiv 2004.05150), section 3.1; a comparator of PowerAttention (arXiv 2503.03588).

Cost: time O(N block (window + sinks)) a layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from regard._errors import at_least_one
from regard.sparse.pattern import Pattern
from regard.sparse.sliding import check_window


class Dilated(Pattern):
    """`window` blocks at distances 0, dilation, 2 dilation, ..., and the first `sinks` blocks.

    >>> Dilated(window=3, dilation=2, sinks=0).lists(1024, 1024)[7]
    [3, 5, 7]
    """

    def __init__(
        self, *, window: int = 5, dilation: int = 2, sinks: int = 1, block: int = 128, **where: Any
    ) -> None:
        super().__init__(block=block, **where)
        self.window, self.sinks = check_window(window, sinks)
        at_least_one(dilation=dilation)
        self.dilation = dilation

    def blocks(self, query: int, count: int) -> Iterator[int]:
        yield from range(query, query - self.window * self.dilation, -self.dilation)
        yield from range(self.sinks)
