"""A small model, plain scorers and rules, and what attention over the kept positions is by definition."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from regard.cache import Budget, Cache, Layer, Scorer


def small_llama(seed: int = 0, **more: Any) -> LlamaForCausalLM:
    """Three layers, four query heads on two KV heads, uneven attention."""
    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.3,
        "bos_token_id": 1,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    return LlamaForCausalLM(LlamaConfig(**settings | more)).eval().requires_grad_(False)


@dataclass(frozen=True)
class Comb(Scorer):
    """Prefers positions by a fixed irregular rule that differs between layers and heads."""

    window: int = 2

    def score(self, layer: Layer) -> Tensor:
        head = torch.arange(layer.positions.shape[1])[:, None]
        return ((layer.positions.long() * (7 + 4 * head) + layer.index) % 11).float()


@dataclass(frozen=True)
class Received(Scorer):
    """The attention that each key received, summed over the calls: a scorer with slots that watches."""

    window: int = 2
    slots = {"mass": 0.0}

    def watch(self, call: Any, layer: Layer) -> None:
        scores = call.query @ layer.keys.repeat_interleave(call.group, 1).mT * call.scaling
        query = torch.arange(layer.seen - call.queries, layer.seen)[:, None]
        seen = (layer.positions[:, :, None] <= query) & layer.valid[:, :, None]
        seen = seen.repeat_interleave(call.group, 1)
        weights = scores.masked_fill(~seen, -1e9).softmax(-1)
        if call.valid is not None:
            weights = weights * call.valid[:, None, :, None]
        layer.slots["mass"] += weights.sum(2).unflatten(1, (-1, call.group)).sum(2)

    def score(self, layer: Layer) -> Tensor:
        return layer.slots["mass"]


@dataclass(frozen=True)
class Slanted(Budget):
    """Later heads and layers get more."""

    def counts(self, scores: Any, room: Any) -> list[Tensor]:
        found = []
        for layer, score in zip(room.layers, scores, strict=True):
            share = 0.6 + 0.8 * torch.linspace(0, 1, score.shape[1]) + 0.2 * layer.index
            found.append((room.tokens[:, None] * share).long())
        return found


def padded(lengths: list[int], side: str, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Random token ids and their mask, rows of these lengths padded on one side."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 64, (len(lengths), max(lengths)), generator=generator)
    slots = torch.arange(max(lengths))
    length = torch.tensor(lengths)[:, None]
    mask = slots < length if side == "right" else slots >= max(lengths) - length
    return ids * mask, mask.long()


class Recorder:
    """Remembers every key and value that goes into a cache, and attends anew to what the cache says it kept.

    `expected` is dense float64 attention over the kept positions of each KV head, by the definition.
    """

    def __init__(self, layers: int) -> None:
        self.keys: list[Tensor | None] = [None] * layers
        self.values: list[Tensor | None] = [None] * layers

    def add(self, layer: int, key: Tensor, value: Tensor) -> None:
        for held, new in ((self.keys, key), (self.values, value)):
            before = held[layer]
            held[layer] = new if before is None else torch.cat([before, new], 2)

    def replace(self, layer: int, kept: list[list[list[int]]], key: Tensor, value: Tensor) -> None:
        """What a lossy store made of the kept keys and values, rectangles aligned at their ends."""
        for held, given in ((self.keys[layer], key), (self.values[layer], value)):
            assert held is not None
            for b, heads in enumerate(kept):
                for h, positions in enumerate(heads):
                    held[b, h, positions] = given[b, h, given.shape[2] - len(positions) :]

    def expected(
        self,
        layer: int,
        query: Tensor,
        scaling: float,
        kept: list[list[list[int]]],
        first: int,
        mask: Tensor | None,
    ) -> Tensor:
        """`[batch, heads, queries, dim]`; `kept[row][head]` are past positions, queries start at position `first`."""
        key, value = self.keys[layer], self.values[layer]
        assert key is not None and value is not None
        batch, heads, queries, _ = query.shape
        group = heads // key.shape[1]
        output = torch.zeros(batch, heads, queries, value.shape[-1], dtype=torch.float64)
        now = torch.arange(first, first + queries)
        for b in range(batch):
            for h in range(heads):
                positions = torch.tensor([*kept[b][h // group], *now.tolist()])
                seen = positions[None] <= now[:, None]
                if mask is not None:
                    seen = seen & mask[b, positions].bool()
                k = key[b, h // group, positions].double()
                v = value[b, h // group, positions].double()
                scores = (query[b, h].double() @ k.T * scaling).masked_fill(~seen, -torch.inf)
                output[b, h] = torch.softmax(scores, -1).nan_to_num(0) @ v
        return output


def positions_of(cache: Cache, layer: int) -> list[list[list[int]]]:
    """Kept positions `[row][head]` of a layer."""
    rows = cache.held[layer].rows
    if rows is None:
        return []
    return [
        [cache.kept(layer, head, row).tolist() for head in range(rows.heads)]
        for row in range(rows.batch)
    ]
