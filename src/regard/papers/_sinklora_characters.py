"""A character model that learns 128 positions and is extended to 512, under each pattern; the laboratory of `sinklora`."""

from __future__ import annotations

import copy
import math
import random
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

import regard
from regard._errors import InputError
from regard.engine import AttentionCall, Block, Method
from regard.labs.context_extension import Recipe, extend_context, token_losses
from regard.sparse.shifted import S2Attention, SFAttention

KNOWN, LONG = 128, 512
RATES = (3e-4, 1e-3, 3e-3)
ARMS: dict[str, Callable[[], Method | None]] = {
    "full": lambda: None,
    "S2": S2Attention,
    "S2 without the leak": lambda: S2Attention(leak=False),
    "S2 + sinks": lambda: SFAttention(restore=0),
    "S&R": lambda: SFAttention(sinks=0),
    "SF": SFAttention,
    "block-local": lambda: SFAttention(restore=1, sinks=0),
    "full, adapters alone": lambda: None,
}
Watch = Callable[[Iterable[int]], Iterator[int]]


@dataclass(frozen=True)
class Scale:
    """How much is trained: steps of the base model and of each extension, and rows of the evaluation."""

    base: int
    extend: int
    rows: int
    batch: int = 32


@dataclass(frozen=True)
class Corpus:
    """Character ids of Python's reference; id 0 opens every row. No paragraph of `held` occurs in `train`."""

    train: Int[Tensor, "train"]
    tune: Int[Tensor, "tune"]
    held: Int[Tensor, "held"]
    vocabulary: int


def corpus(held: int = 8) -> Corpus:
    """Whole topics are held out; the rates are tuned on the end of what is left."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise InputError(
            "sinklora trains on Python's reference (pydoc_data), which this Python lacks; install the full standard library"
        ) from error
    names = sorted(topics)
    random.Random(0).shuffle(names)

    def paragraphs(chosen: list[str]) -> dict[str, None]:
        parts = (re.split(r"\n\s*\n", topics[name].strip("\n")) for name in chosen)
        return dict.fromkeys(part for parts_of_one in parts for part in parts_of_one)

    out = paragraphs(names[:held])
    rest = [part for part in paragraphs(names[held:]) if part not in out]
    known = sorted(set("\n\n".join(rest)))
    number = {character: i + 1 for i, character in enumerate(known)}

    def ids(parts: Iterable[str]) -> Tensor:
        return torch.tensor([number.get(c, number[" "]) for c in "\n\n".join(parts)])

    train = ids(rest)
    cut = len(train) - 16 * LONG
    return Corpus(train[:cut], train[cut:], ids(out), len(known) + 1)


def consecutive(text: Int[Tensor, "characters"], length: int) -> Int[Tensor, "rows length"]:
    """The text in rows of `length` ids, each opened by id 0; what does not fill a row is left out."""
    rows = text[: len(text) // (length - 1) * (length - 1)].view(-1, length - 1)
    return torch.cat([torch.zeros(len(rows), 1, dtype=torch.long), rows], 1)


def drawn(
    text: Int[Tensor, "characters"], length: int, count: int, generator: torch.Generator
) -> Int[Tensor, "rows length"]:
    """Rows that begin at random places."""
    start = torch.randint(len(text) - length + 2, (count, 1), generator=generator)
    rows = text[start + torch.arange(length - 1)]
    return torch.cat([torch.zeros(count, 1, dtype=torch.long), rows], 1)


def character_model(vocabulary: int, seed: int) -> Any:
    """A Llama of 4 layers, 4 heads and width 128 that knows 128 positions."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=128,
        intermediate_size=344,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=KNOWN,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config)


def base_model(data: Corpus, scale: Scale, seed: int, watch: Watch = iter) -> Any:
    """The model before extension: trained in full on random rows of 128 ids, one-cycle rate up to 3e-3."""
    model = character_model(data.vocabulary, seed)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 3e-3, total_steps=scale.base, pct_start=0.1
    )
    for _ in watch(range(scale.base)):
        rows = drawn(data.train, KNOWN, scale.batch, generator)
        optimizer.zero_grad()
        model(input_ids=rows, labels=rows).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


def extended(base: Any, data: Corpus, scale: Scale, name: str, seed: int, rate: float) -> Any:
    """A copy of `base`, extended under one arm; the same rows in the same order for every arm of a seed."""
    generator = torch.Generator().manual_seed(1000 + seed)
    rows = drawn(data.train, LONG, 2 * scale.extend, generator)
    extra = () if "alone" in name else ("embed", "norm")
    recipe = Recipe(steps=scale.extend, rate=rate, batch=2, extra=extra)
    return extend_context(copy.deepcopy(base), rows, ARMS[name](), recipe, seed=seed).model


def losses(model: Any, rows: Int[Tensor, "rows length"]) -> dict[str, Any]:
    """The mean loss under full attention, and its course over positions, in nats per character."""
    found = token_losses(model, rows, batch=16)
    return {"loss": float(found.mean()), "positions": found.mean(0)}


class FirstToken(Method):
    """Mean attention on token 0 by query row, over layers and heads; `[tokens]` after one forward pass."""

    reads_only = True

    def __init__(self) -> None:
        self.total: Tensor | float = 0.0
        self.sites = 0

    def before(self, call: AttentionCall) -> None:
        self.sites += 1
        self.total = self.total + torch.zeros(call.queries)

    def weights(self, block: Block) -> None:
        if block.keys.start == 0:
            assert isinstance(self.total, Tensor)
            self.total[block.rows] += block.weights[..., 0].float().mean((0, 1))

    @property
    def by_row(self) -> Float[Tensor, "tokens"]:
        return torch.as_tensor(self.total) / max(self.sites, 1)


def first_token(
    model: Any, rows: Int[Tensor, "rows length"], pattern: Method | None = None, parts: int = 16
) -> list[float]:
    """Attention on token 0 in each of `parts` equal stretches of queries."""
    reader = FirstToken()
    methods = (reader,) if pattern is None else (pattern, reader)
    with torch.inference_mode(), regard.attach(model, *methods):
        model(input_ids=rows)
    return reader.by_row.view(parts, -1).mean(1).tolist()


def leaked(model: Any, rows: Int[Tensor, "rows length"], pattern: Method) -> float:
    """How much other characters in the last half group change the logits of the first half group, at most."""
    half = rows.shape[1] // 8
    other = rows.clone()
    other[:, -half:] = rows[:, -half:].flip(1)
    with torch.inference_mode(), regard.attach(model, pattern):
        change = model(input_ids=other).logits - model(input_ids=rows).logits
    return float(change[:, :half].abs().max())


def perplexity(found: dict[str, Any], name: str) -> list[float]:
    """Perplexity per character of one arm, for each seed."""
    return [math.exp(seed[name]["loss"]) for seed in found["seeds"]]
