"""What the dynamic-mask experiment trains and measures: the same layer with five ways to choose keys."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from regard.labs.tasks import IGNORED, Samples, Task
from regard.labs.training import train
from regard.nn import DynamicMaskAttention, LanguageModel, LanguageModelConfig
from regard.ops import dynamic_mask_attention, lifetimes


class SlidingChoice(DynamicMaskAttention):
    """The newest keys: where all are equally important, the newer ones stay. With a window over all, plain attention."""

    def importance(
        self, value: Float[Tensor, "batch kv_heads tokens dim"]
    ) -> Float[Tensor, "batch kv_heads tokens"]:
        return torch.zeros(value.shape[:3], dtype=torch.promote_types(value.dtype, torch.float32))


class RandomChoice(DynamicMaskAttention):
    """Keys drawn anew for each text and head, and not favoured by the scores."""

    def importance(
        self, value: Float[Tensor, "batch kv_heads tokens dim"]
    ) -> Float[Tensor, "batch kv_heads tokens"]:
        return 1e-6 * torch.rand(value.shape[:3])


class NormChoice(DynamicMaskAttention):
    """The keys with the largest values, not favoured by the scores."""

    def importance(
        self, value: Float[Tensor, "batch kv_heads tokens dim"]
    ) -> Float[Tensor, "batch kv_heads tokens"]:
        return 1e-6 * value.detach().float().norm(dim=-1)


@dataclass(frozen=True)
class Size:
    """Of a model and its training."""

    steps: int
    width: int = 48
    layers: int = 2
    heads: int = 4
    batch: int = 32
    rate: float = 3e-3


Choice = Callable[[int, int], DynamicMaskAttention]


def choices(window: int, tokens: int) -> dict[str, Choice]:
    """Ways to choose `window` keys, by name."""
    return {
        "full": lambda w, h: SlidingChoice(w, h, window=tokens),
        "DMA": lambda w, h: DynamicMaskAttention(w, h, window=window),
        "sliding": lambda w, h: SlidingChoice(w, h, window=window),
        "value norm": lambda w, h: NormChoice(w, h, window=window),
        "random": lambda w, h: RandomChoice(w, h, window=window),
        "DMA + local": lambda w, h: DynamicMaskAttention(
            w, h, window=window - window // 2, local=window // 2
        ),
    }


def build(task: Task, size: Size, choice: Choice, seed: int) -> LanguageModel:
    """A model whose layers choose keys so; equal seeds begin with equal weights."""
    torch.manual_seed(seed)
    config = LanguageModelConfig(
        vocab_size=task.vocabulary,
        hidden_size=size.width,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        mixers=[["dma", {"window": task.length}]],
    )
    model = LanguageModel(config)
    for layer, plain in zip(model.layers, model.mixers, strict=True):
        chosen = choice(size.width, size.heads)
        chosen.load_state_dict(plain.state_dict())
        layer.self_attn = chosen
    return model


def fit(task: Task, size: Size, choice: Choice, seed: int, held_out: int = 256) -> dict[str, Any]:
    """Accuracy and nats on held-out samples after training, and for recall what the importance tells apart."""
    model = build(task, size, choice, seed)
    training = train(model, task, size.steps, batch=size.batch, rate=size.rate, seed=seed)
    accuracy, nats = task.evaluate(model, held_out)
    found: dict[str, Any] = {"accuracy": accuracy, "nats": nats, "losses": training.losses[::10]}
    if task.name == "recall":
        found["separation"] = separation(model, task)
    return found


@torch.no_grad()
def separation(model: LanguageModel, task: Task) -> list[list[float]]:
    """By layer and head: how well the importance tells the tokens of pairs from filler in the first half of a sample (AUC)."""
    ids = task.draw(64, 10**6, held_out=True).ids
    seen: list[Tensor] = []
    handles = [
        mixer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        for mixer in model.mixers
    ]
    model(ids)
    for handle in handles:
        handle.remove()
    half = ids[:, : task.length // 2]
    table = []
    for mixer, hidden in zip(model.mixers, seen, strict=True):
        assert isinstance(mixer, DynamicMaskAttention)
        value = mixer.v_proj(hidden).unflatten(-1, (mixer.kv_heads, -1)).transpose(1, 2)
        importance = mixer.importance(value)[:, :, : half.shape[1]].transpose(0, 1).flatten(1)
        table.append([auc(row, (half != 0).flatten()) for row in importance])
    return table


def auc(scores: Tensor, positive: Tensor) -> float:
    """Chance that a positive one scores above a negative one; ties count half."""
    high, low = scores[positive], scores[~positive].sort().values
    below = torch.searchsorted(low, high) + torch.searchsorted(low, high, right=True)
    return float(below.double().mean() / 2 / len(low))


def copying(vocabulary: int, length: int) -> Task:
    """Random tokens, then the same again; the second half is asked, so every token of the first is needed once."""

    def make(count: int, generator: torch.Generator, held_out: bool) -> Samples:
        half = torch.randint(vocabulary, (count, length // 2), generator=generator)
        ids = torch.cat([half, half], 1)
        labels = ids.clone()
        labels[:, : length // 2 + 1] = IGNORED  # the first copied token cannot be known
        return Samples(ids, labels)

    return Task("copying", vocabulary, length, make)


def doge_difference(run_seed: int) -> dict[str, float] | None:
    """The largest difference from transformers' DogeAttention, outputs and gradients; None where there is none."""
    try:
        from transformers.models.doge import modeling_doge as doge
    except ImportError:
        return None
    worst = {"outputs": 0.0, "gradients": 0.0}
    for kv_heads in (4, 2):
        for window in (8, 24, 64):
            torch.manual_seed(run_seed)
            config = doge.DogeConfig(
                hidden_size=64,
                num_attention_heads=4,
                num_key_value_heads=kv_heads,
                keep_window_size=window,
                max_position_embeddings=128,
            )
            config._attn_implementation = "eager"
            theirs: Any = doge.DogeAttention(config, layer_idx=0)
            ours = DynamicMaskAttention(64, 4, kv_heads=kv_heads, window=window)
            torch.nn.init.normal_(ours.A)
            theirs.load_state_dict(ours.state_dict())
            hidden = torch.randn(2, 48, 64)
            rotary: Any = doge.DogeRotaryEmbedding(config)
            future = torch.ones(48, 48, dtype=torch.bool).triu(1)
            mask = torch.zeros(2, 1, 48, 48).masked_fill(future, torch.finfo(torch.float32).min)
            angles = rotary(hidden, torch.arange(48)[None])
            expected = theirs(hidden, position_embeddings=angles, attention_mask=mask)[0]
            found = ours(hidden)
            worst["outputs"] = max(worst["outputs"], float((found - expected).detach().abs().max()))
            weight = torch.randn_like(found) / found.numel()
            (found * weight).sum().backward()
            (expected * weight).sum().backward()
            gradients = dict(theirs.named_parameters())
            for name, parameter in ours.named_parameters():
                change = parameter.grad - gradients[name].grad  # type: ignore[operator]
                worst["gradients"] = max(worst["gradients"], float(change.abs().max()))
    return worst


def speed(tokens: int, window: int, repeats: int) -> dict[str, float]:
    """Seconds of one layer of 4 heads of 64: finding the keys, attention over them, and the fused kernel over all keys."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 1, 4, tokens, 64, generator=generator)
    importance = torch.rand(1, 4, tokens, generator=generator)
    ends = lifetimes(importance, window)
    parts: dict[str, Callable[[], Tensor]] = {
        "choice": lambda: lifetimes(importance, window),
        "dynamic mask": lambda: dynamic_mask_attention(query, key, value, importance, ends),
        "full": lambda: scaled_dot_product_attention(query, key, value, is_causal=True),
    }
    seconds: dict[str, list[float]] = {name: [] for name in parts}
    with torch.no_grad():
        for _ in range(repeats + 1):
            for name, part in parts.items():
                start = time.perf_counter()
                part()
                seconds[name].append(time.perf_counter() - start)
    return {name: median(found[1:]) for name, found in seconds.items()}
