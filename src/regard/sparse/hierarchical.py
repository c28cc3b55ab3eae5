"""Sparse prefill by chunks of tokens: score chunks, hand their scores down to tokens, keep the best tokens for each query block.

For a block m of b queries and chunks c of n_c keys, with query and key averaged over their heads first (float32):

    q_m = sqrt(b) * mean of the block's queries       k_c = sqrt(n_c) * mean of the chunk's keys
    s_{m,j} = q_m . k_{chunk(j)}                      for every token j up to the end of the block

Of the tokens a block may see, the latest `local` are kept always; the best scored fill up to the budget; then the first `first`
tokens take the places of the earliest ones kept. Attention over the kept keys is exact and causal. The last `instruction`
queries and all decode steps attend densely. One selection serves all heads of a layer.

Where the chunks end is the subclass's affair: `FixedChunks` here, `DHSA` by a trained predictor. Source: Xiong et al. 2025,
arXiv 2510.24606, and its released code, from which this differs in four points. A key that is both global and selected
counts once in the softmax (there, short prefixes can hold repeats). Among tokens of equal score the earlier is taken (there,
any). A last block that is cut short chooses up to its own end (there, up to a whole block, of which the rest is hidden). In a
sliding-window layer a block chooses from all that any of its queries sees (there, from what the last one sees).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from regard._errors import AttachError, InputError
from regard.engine import AttentionCall, BlockSparseMask, CausalMask
from regard.engine.split import Both, Part, SplitMask, sub_calls, valid_rows
from regard.ops.chunks import chunk_representation, equal_cuts, upsample_chunk_scores
from regard.sparse.pattern import Pattern


def block_scores(
    query: Float[Tensor, "heads queries dim"],
    key: Float[Tensor, "kv_heads keys dim"],
    cuts: Int[Tensor, " ends"],
    block: int,
    represent: Callable[[Tensor, Tensor], Tensor] = chunk_representation,
) -> Float[Tensor, "blocks keys"]:
    """The score of every key for every block of queries; O(queries x keys / block) time and memory.

    `represent(vectors, cuts)` makes one vector of each chunk: with the root of the length by default, `ops.chunks.chunk_mean`
    without it. (The root in front of a query block is the same for all keys and changes no order.)
    """
    queries = represent(query.float().mean(0), equal_cuts(query.shape[1], block).to(query.device))
    chunks = represent(key.float().mean(0), cuts)
    return upsample_chunk_scores(queries @ chunks.T, cuts)


def select_tokens(
    scores: Float[Tensor, " keys"], lo: int, hi: int, *, budget: int, local: int, first: int
) -> Int[Tensor, " chosen"]:
    """The keys that one query block sees, ascending, of `lo .. hi - 1`: `budget` of them, or all if there are no more.

    The last `local`, then the highest scores, then the first `first` instead of as many of the earliest chosen. No key twice:
    the i-th of the ascending choice lies at or after `lo + i`, so what stays is behind what is put in front.

    >>> import torch
    >>> scores = torch.tensor([0.0, 0.1, 0.9, 0.8, 0.2, 0.7, 0.0, 0.0])
    >>> select_tokens(scores, 0, 8, budget=5, local=2, first=1).tolist()  # best: 2, 3, 5; 0 takes the place of 2
    [0, 3, 5, 6, 7]
    """
    if hi - lo <= budget:
        return torch.arange(lo, hi, device=scores.device)
    recent = torch.arange(hi - local, hi, device=scores.device)
    order = torch.argsort(scores[lo : hi - local], descending=True, stable=True)
    best = order[: budget - local].sort().values + lo
    chosen = torch.cat([best, recent])
    chosen[:first] = torch.arange(lo, lo + first, device=scores.device)
    return chosen


class HierarchicalSparse(Pattern):
    """Base of chunked token selection; a subclass says where chunks end with `cuts(call)`.

    Args:
        budget: keys for each query block: a share of the text in (0, 1], but never fewer than `local + first`, or a number.
        block: queries that choose together.
        local: the latest keys of a block, kept always.
        first: the first keys, kept always.
        instruction: the last queries of a prompt, which attend densely.
        layers: the layers it is attached to; None for all.

    Raises:
        InputError: a budget outside its range, or smaller than `local + first`.
        AttachError: in use, for a layer that attends in both directions, or a padded batch on a layer with a sliding window
            or packed texts.

    A padded text is treated as if it were alone. Prefill into a cache that holds tokens already attends densely.
    Time: `queries / block` selections of O(keys log keys), then attention over `budget` keys a query instead of all.
    """

    static = False
    shared = True
    """Whether the cuts of the first layer serve all layers; if not, every layer makes its own."""

    def __init__(
        self,
        *,
        budget: float | int = 0.25,
        block: int = 128,
        local: int = 128,
        first: int = 128,
        instruction: int = 64,
        layers: Iterable[int] | Callable[[int], bool] | None = None,
    ) -> None:
        super().__init__(block=block, layers=layers)
        share = isinstance(budget, float) and 0 < budget <= 1
        whole = isinstance(budget, int) and not isinstance(budget, bool) and budget >= 1
        if not share and not whole:
            raise InputError.of("budget", given=budget, expected="in (0, 1] or an int >= 1")
        if local < 1 or first < 1:
            raise InputError(f"local and first must be at least 1, got {local} and {first}")
        if not share and budget < local + first:
            raise InputError.of(
                "budget",
                given=budget,
                expected=f"at least local + first = {local + first} keys",
                fix="give more, or smaller local= and first=",
            )
        if instruction < 0:
            raise InputError.of("instruction", given=instruction, expected="at least 0")
        self.budget, self.local, self.first = budget, local, first
        self.instruction = instruction
        self._first_layer: dict[str, int] = {}
        self._cuts: dict[str, list[Tensor]] = {}

    def cuts(self, call: AttentionCall) -> Int[Tensor, " ends"]:
        """Where the chunks of one text end, from 0 to its length; `call` holds this text alone, without padding."""
        raise NotImplementedError(f"{type(self).__name__} must define cuts(call)")

    def represent(
        self, vectors: Float[Tensor, "length dim"], cuts: Int[Tensor, " ends"]
    ) -> Float[Tensor, "chunks dim"]:
        """One vector for each chunk."""
        return chunk_representation(vectors, cuts)

    def tokens(self, length: int) -> int:
        """Keys a query block sees in a text of this length."""
        if isinstance(self.budget, int):
            return self.budget
        return max(math.ceil(self.budget * length), self.local + self.first)

    def start(self, session: object) -> None:
        self._first_layer, self._cuts = {}, {}

    def stop(self) -> None:
        self.start(None)

    def before(self, call: AttentionCall) -> AttentionCall | None:
        if call.site.kind == "cross" or not self.applies(call.site.layer):
            return None
        if not call.site.causal:
            raise AttachError(
                f"{type(self).__name__} is causal, but {call.site} attends in both directions; leave the layer out with layers="
            )
        if call.queries == 1 or call.query_offset:
            return None
        batch, spans = call.query.shape[0], valid_rows(call)
        narrow = spans is None  # a sliding window, packed texts: more than causality and padding
        held = [
            (row, start, stop)
            for rows, start, stop in spans or [(None, 0, call.queries)]
            for row in rows or range(batch)
        ]
        texts = [
            (
                row,
                start,
                sub_calls(call, Part(call.mask, (row,), None, start, stop, start, stop))[0][0],
            )
            for row, start, stop in held
        ]
        stack, layer = call.site.key
        if self._first_layer.setdefault(stack, layer) == layer or not self.shared:
            self._cuts[stack] = [self.cuts(text) for *_, text in texts]
        parts = [
            part
            for (row, start, text), cuts in zip(texts, self._cuts[stack], strict=True)
            for part in self._parts(call, row, start, text, cuts, narrow)
        ]
        mask = SplitMask((batch, call.heads, call.queries, call.keys), tuple(parts))
        return replace(call, mask=Both(call.mask, mask, call.keys) if narrow else mask)

    def _parts(
        self,
        call: AttentionCall,
        row: int,
        start: int,
        text: AttentionCall,
        cuts: Tensor,
        narrow: bool,
    ) -> list[Part]:
        """The sparse queries of one text, then its dense ones."""
        length = text.queries
        sparse = max(length - self.instruction, 0)
        parts = []
        if sparse:
            named = self._chosen(call, row, text, cuts, sparse, narrow)
            chosen = BlockSparseMask(named, self.block, sparse, key_size=1)
            parts.append(Part(chosen, (row,), None, start, start + sparse, start, start + sparse))
        if sparse < length:
            dense = CausalMask(length, sparse)
            end = start + length
            parts.append(Part(dense, (row,), None, start + sparse, end, start, end))
        return parts

    def _chosen(
        self,
        call: AttentionCall,
        row: int,
        text: AttentionCall,
        cuts: Tensor,
        sparse: int,
        narrow: bool,
    ) -> tuple[Tensor, ...]:
        query = text.query[0][:, :sparse]
        scores = block_scores(query, text.key[0], cuts, self.block, self.represent)
        budget, chosen = self.tokens(text.queries), []
        for i, own in enumerate(scores):
            begin, end = i * self.block, min((i + 1) * self.block, sparse)
            lo, hi = self._range(call, row, begin, end) if narrow else (0, end)
            chosen.append(
                select_tokens(own, lo, hi, budget=budget, local=self.local, first=self.first)
            )
        return tuple(chosen)

    def _range(self, call: AttentionCall, row: int, begin: int, end: int) -> tuple[int, int]:
        """The keys that the model's own mask shows to any query of a block."""
        if call.key_valid is not None:
            raise AttachError(
                f"{type(self).__name__}: {call.site} has a mask of its own (a sliding window, packed texts) and the batch is "
                "padded; run texts of one length together, or leave the layer out with layers="
            )
        if self.local < self.block:
            raise AttachError(
                f"{type(self).__name__}: {call.site} has a mask of its own, under which a query must find a key among the "
                f"latest ones; local must be at least block = {self.block}, got {self.local}"
            )
        window = call.mask.window(torch.arange(begin, end, device=call.query.device))
        seen = window.visible(end - begin, call.query.device)
        if seen is None or seen.shape[0] == 1:
            return window.lo, min(window.hi, end)
        columns = seen[row].flatten(0, -2).any(0).nonzero()[:, 0] + window.lo
        return int(columns[0]), min(int(columns[-1]) + 1, end)


class FixedChunks(HierarchicalSparse):
    """Chunks of equal length: the block-sparse baseline, with tokens selected by the mean key of their block of `size`.

    >>> FixedChunks(16, budget=0.25).tokens(4096)
    1024
    """

    def __init__(self, size: int, **rest: object) -> None:
        super().__init__(**rest)  # pyright: ignore[reportArgumentType]
        if size < 1:
            raise InputError.of("size", given=size, expected="a number of tokens, 1 or more")
        self.size = size

    def cuts(self, call: AttentionCall) -> Int[Tensor, " ends"]:
        return equal_cuts(call.keys, self.size).to(call.query.device)
