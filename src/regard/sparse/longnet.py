"""LongNet's dilated attention: segments of growing length, each thinned by a growing dilation.

    branch (w, r), head j, shift s = (j * shift) mod r:   query block q sees key block k <= q  when
    both lie in one segment of w blocks,  floor(q / w) = floor(k / w),  and both are kept,  (q - s) mod r = (k - s) mod r = 0

and the pattern is the union of the branches. A block whose place in a segment is not a multiple of a larger branch's
dilation cannot be seen from later segments; shifting by head spreads these holes over the heads. LongNet weighs its
branches by their softmax denominators, which counts a key once for each branch that holds it; here a key counts once.
Source: LongNet (arXiv 2307.02486), sections 3.1 and 3.2.

Cost: time O(N block sum_i w_i / r_i^2) a layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from regard._errors import InputError
from regard.sparse.pattern import Pattern


class LongNet(Pattern):
    """Branches of (segment, dilation) in blocks; head `j` keeps the places `j * shift` apart. `shift=0` aligns all heads.

    >>> LongNet(segments=(2, 4), dilations=(1, 2)).lists(1024, 1024)[6]
    [4, 6]
    """

    def __init__(
        self,
        *,
        segments: Sequence[int] = (4, 16, 64),
        dilations: Sequence[int] = (1, 4, 16),
        shift: int = 1,
        block: int = 128,
        **where: Any,
    ) -> None:
        super().__init__(block=block, **where)
        self.segments, self.dilations, self.shift = tuple(segments), tuple(dilations), shift
        if len(self.segments) != len(self.dilations) or not self.segments:
            raise InputError(
                f"LongNet needs as many dilations as segments, got {self.segments} and {self.dilations}"
            )
        if min(*self.segments, *self.dilations) < 1:
            raise InputError(
                f"segments and dilations must be 1 or more, got {self.segments} and {self.dilations}"
            )
        self.head = 0
        self._heads: dict[tuple[int, ...], LongNet] = {}

    def of_head(self, head: int, heads: int) -> Pattern:
        key = tuple(head * self.shift % r for r in self.dilations)
        if not any(key):
            return self
        if key not in self._heads:
            own = LongNet(
                segments=self.segments,
                dilations=self.dilations,
                shift=self.shift,
                block=self.block,
            )
            own.head = head
            self._heads[key] = own
        return self._heads[key]

    def blocks(self, query: int, count: int) -> Iterator[int]:
        yield query
        for segment, dilation in zip(self.segments, self.dilations, strict=True):
            place = self.head * self.shift % dilation
            if (query - place) % dilation == 0:
                first = query // segment * segment
                yield from (k for k in range(first, query) if (k - place) % dilation == 0)
