"""SmolLM2 under grouped attention, as it is and after a short fine-tuning; the pretrained part of `sinklora`."""

from __future__ import annotations

import copy
import time
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

import regard
from regard import texts
from regard.engine import Method
from regard.labs.context_extension import Recipe, extend_context, token_losses
from regard.ops.grouped_attention import grouped_attention, visible_pairs
from regard.papers._sinklora_characters import ARMS, Watch, first_token
from regard.sparse.shifted import GroupedAttention, S2Attention, SFAttention

SWAPPED = ("full", "S2", "S2 + sinks", "S&R", "SF", "block-local")
TUNED = ("full", "S2", "SF")
RATE = 3e-4


@dataclass(frozen=True)
class Text:
    """Rows of token ids: `train` comes before `held` in the same reference, no paragraph occurs twice."""

    train: Int[Tensor, "train length"]
    held: Int[Tensor, "held length"]


def read(tokenizer: Any, length: int, train: int, held: int) -> Text:
    text = texts.default_text(tokenizer, length * (train + held))
    ids = tokenizer(text, add_special_tokens=False)["input_ids"][: length * (train + held)]
    rows = torch.tensor(ids).view(-1, length)
    return Text(rows[:train], rows[train:])


def swapped(model: Any, rows: Int[Tensor, "rows length"], name: str) -> list[float]:
    """The mean loss of each row when the pattern replaces attention in the untrained model."""
    pattern: Method | None = ARMS[name]()
    with nullcontext() if pattern is None else regard.attach(model, pattern):
        return token_losses(model, rows, batch=1).mean(1).tolist()


def tuned(model: Any, text: Text, name: str, steps: int, watch: Watch = iter) -> dict[str, Any]:
    """A copy of the model after `steps` rows under the pattern: losses while training, and of full attention afterwards."""
    recipe = Recipe(steps=steps, rate=RATE, warmup=3)
    result = extend_context(copy.deepcopy(model), text.train, ARMS[name](), recipe, watch=watch)
    return {
        "training": result.losses,
        "held": token_losses(result.model, text.held, batch=1).mean(1).tolist(),
        "first token": first_token(result.model, text.held[:1]),
    }


def operations(pattern: GroupedAttention, tokens: int, heads: int) -> float:
    """Visible pairs of one layer over those of full causal attention: the ratio of attention's floating-point operations."""
    shifted, size = pattern.shifted(heads), pattern.size(tokens)
    settings = {"sinks": pattern.sinks, "leak": pattern.leak}
    fixed = visible_pairs(tokens, size, **settings)
    moved = visible_pairs(tokens, size, shifted=True, **settings)
    return ((heads - shifted) * fixed + shifted * moved) / (heads * tokens * (tokens + 1) / 2)


def times(tokens: int, repeats: int) -> dict[str, float]:
    """Forward and backward time of one attention layer of SmolLM2 over that of full attention; medians of interleaved repeats."""
    query = torch.randn(1, 9, tokens, 64, requires_grad=True)
    key, value = (torch.randn(1, 3, tokens, 64, requires_grad=True) for _ in range(2))
    patterns: dict[str, GroupedAttention] = {"S2": S2Attention(), "SF": SFAttention()}
    runs: dict[str, dict[str, Any]] = {"full": {"size": tokens}}
    for name, pattern in patterns.items():
        runs[name] = {
            "size": pattern.size(tokens),
            "shifted": pattern.shifted(9),
            "sinks": pattern.sinks,
            "leak": pattern.leak,
        }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats + 1):
        for name, settings in runs.items():
            start = time.perf_counter()
            grouped_attention(query, key, value, **settings).sum().backward()
            seconds[name].append(time.perf_counter() - start)
    median = {name: sorted(found[1:])[repeats // 2] for name, found in seconds.items()}
    return {name: median[name] / median["full"] for name in patterns}
