"""Product-key memory: thousands of learned values, of which every token reads a few.

    q = W_q x;   the best pairs of `regard.ops.product_key_search`, with scores s and values V[pair]
    output = sigmoid(w . x + b) W_v sum softmax(s) V[pair]

A layer with the parameters of 4096 values that costs what reading 16 of them costs. It looks at its own token alone: among
mixers it stands for those that do not mix.

Source: Lample et al. 2019, arXiv 1907.05242; so used in Hydra, arXiv 2508.15099, which weighs all 16 candidates, where the
first paper keeps the best 4 (`picked=4`). The query is not normalised, and the gate starts nearly shut.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import embedding_bag

from regard._errors import InputError, at_least_one
from regard.nn.mixer import Mixer, State
from regard.nn.projections import check_heads
from regard.ops.linear_attention import wide
from regard.ops.product_keys import ProductKeys, product_key_search


class ProductKeyMemory(Mixer):
    """A table of keys^2 values that is read by the best of keys^2 product keys.

    Args:
        width: of the tokens.
        heads: must divide `width`, as everywhere; there is one query a token.
        keys: of each codebook.
        half: numbers of a key.
        half_k: keys that each codebook proposes.
        picked: values that are read, all half_k^2 candidates by default.
        value_width: of a value in the table.
        start: the gate's opening before training.

    Cost: 2 half (width + keys) + value_width (picked + width) multiplications a token; keys^2 value_width parameters for the
    values. There is no state.

    Raises:
        InputError: heads that do not divide, or a number out of range.

    >>> memory = ProductKeyMemory(width=32, heads=4, keys=16)
    >>> memory(torch.randn(2, 10, 32)).shape, memory.search(torch.randn(2, 10, 32)).pairs.shape
    (torch.Size([2, 10, 32]), torch.Size([2, 10, 16]))
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        keys: int = 64,
        half: int = 64,
        half_k: int = 4,
        picked: int | None = None,
        value_width: int = 128,
        start: float = 0.1,
    ) -> None:
        super().__init__()
        check_heads(width, heads)
        at_least_one(keys=keys, half=half, value_width=value_width)
        if not 1 <= half_k <= keys:
            raise InputError.of("half_k", given=half_k, expected=f"within 1 .. {keys} keys")
        if picked is not None and not 1 <= picked <= half_k**2:
            raise InputError.of("picked", given=picked, expected=f"within 1 .. {half_k**2}")
        if not 0 < start < 1:
            raise InputError.of("start", given=start, expected="in (0, 1)")
        self.half_k, self.picked = half_k, picked
        self.query_proj = nn.Linear(width, 2 * half, bias=False)
        self.first_keys = nn.Parameter(0.02 * torch.randn(keys, half))
        self.second_keys = nn.Parameter(0.02 * torch.randn(keys, half))
        self.values = nn.Parameter(0.01 * torch.randn(keys**2, value_width))
        self.value_proj = nn.Linear(value_width, width, bias=False)
        self.gate = nn.Linear(width, 1)
        nn.init.constant_(self.gate.bias, math.log(start / (1 - start)))

    def search(self, hidden: Float[Tensor, "batch tokens width"]) -> ProductKeys:
        """The values that every token reads: their numbers, and the scores whose softmax is their weight."""
        query, first, second = self.query_proj(hidden), self.first_keys, self.second_keys
        return product_key_search(
            wide(query), wide(first), wide(second), half_k=self.half_k, picked=self.picked
        )

    def forward(
        self,
        hidden: Float[Tensor, "batch tokens width"],
        *,
        valid: Bool[Tensor, "batch tokens"] | None = None,
        state: State | None = None,
    ) -> Float[Tensor, "batch tokens width"]:
        scores, pairs = (part.flatten(0, 1) for part in self.search(hidden))
        weights = scores.softmax(-1).to(self.values.dtype)
        read = embedding_bag(pairs, self.values, per_sample_weights=weights, mode="sum")
        return torch.sigmoid(self.gate(hidden)) * self.value_proj(read).view_as(hidden)
