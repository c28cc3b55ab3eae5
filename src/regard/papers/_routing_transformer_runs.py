"""What the Routing Transformer's experiment measures: products, recall over a distance, text, and clusters in SmolLM2."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, layer_norm
from torch.utils.flop_counter import FlopCounterMode

from regard.attach import attach
from regard.engine import AttentionCall, Method
from regard.instruments.between_heads import js_divergence_between_heads
from regard.labs.tasks import Samples, Task, characters
from regard.labs.training import train
from regard.nn import LanguageModel, LanguageModelConfig
from regard.nn.routing_attention import RoutingAttention, WholeTextRoutingAttention
from regard.ops.kmeans_routing import (
    ClusterMemory,
    balanced_topk_routing,
    cluster_scores,
    kmeans_ema_statistics,
    prefix_routed_attention,
    routed_attention,
    smoothed_centroids,
)

ARMS = ("full", "local", "routing", "random", "published")


@dataclass(frozen=True)
class Setting:
    """One training run: a model of `layers` layers on windows of `length` tokens."""

    length: int
    window: int
    clusters: int
    steps: int
    batch: int = 32
    width: int = 64
    heads: int = 4
    layers: int = 1
    rate: float = 3e-3
    pairs: int = 8


def far_pairs(length: int, pairs: int) -> Task:
    """Recall with a pair in one token: `pairs` tokens (k, v) with different k, filler, then every k in another order and its v.

    One lookup by content and no step to the next token, which a layer of any attention can do if it reaches the pair.
    """
    first_value = 1 + pairs
    first_pair = first_value + pairs

    def make(count: int, generator: torch.Generator, held_out: bool) -> Samples:
        key = torch.rand(count, pairs, generator=generator).argsort(-1)
        value = torch.randint(pairs, (count, pairs), generator=generator)
        order = torch.rand(count, pairs, generator=generator).argsort(-1)
        ids = torch.zeros(count, length, dtype=torch.long)
        ids[:, :pairs] = first_pair + pairs * key + value
        ids[:, -2 * pairs :: 2] = 1 + key.gather(1, order)
        ids[:, -2 * pairs + 1 :: 2] = answer = first_value + value.gather(1, order)
        labels = torch.full_like(ids, -100)
        labels[:, -2 * pairs + 1 :: 2] = answer
        return Samples(ids, labels)

    return Task("far_pairs", first_pair + pairs * pairs, length, make)


class RandomClusters(RoutingAttention):
    """Routing attention whose clusters take their tokens by lot."""

    def route(self, content: Tensor) -> Tensor:
        return torch.rand(*content.shape[:2], self.clusters, content.shape[2], dtype=content.dtype)


def build(arm: str, vocabulary: int, setting: Setting) -> LanguageModel:
    """A model of one arm; the arms share everything but their attention."""
    mixer: Any = {"full": "softmax", "local": ["sliding", {"window": setting.window}]}.get(arm)
    options = {"clusters": setting.clusters, "window": setting.window}
    config = LanguageModelConfig(
        vocab_size=vocabulary,
        hidden_size=setting.width,
        num_hidden_layers=setting.layers,
        num_attention_heads=setting.heads,
        mixers=[mixer or ["routing", options]],
    )
    model = LanguageModel(config)
    other = {"random": RandomClusters, "published": WholeTextRoutingAttention}.get(arm)
    if other is not None:
        for block in model.layers:
            block.self_attn = other(setting.width, setting.heads, **options)
    return model


def recalled(arm: str, setting: Setting, seed: int) -> dict[str, Any]:
    """Accuracy on far pairs after training, and the loss of every step."""
    torch.manual_seed(seed)
    task = far_pairs(setting.length, setting.pairs)
    model = build(arm, task.vocabulary, setting)
    losses = train(
        model, task, setting.steps, batch=setting.batch, rate=setting.rate, seed=seed
    ).losses
    found = {"accuracy": task.accuracy(model, 256), "losses": losses}
    if arm in ("routing", "random", "published"):
        samples = task.draw(32, 10**6, held_out=True)
        maps = maps_of(model, samples.ids)
        local = setting.heads // 2
        found["outside"] = float((torch.stack(maps)[:, :, local:].sum(-1) < 0.5).double().mean())
    if arm == "published":
        found["stepwise"] = stepwise_accuracy(model, task)
    return found


def stepwise_accuracy(model: LanguageModel, task: Task, count: int = 64) -> float:
    """Accuracy when tokens come one by one, so that membership cannot depend on later ones."""
    samples = task.draw(count, 10**6, held_out=True)
    with torch.no_grad():
        guess = model(samples.ids, use_cache=True).logits.argmax(-1)[:, :-1]
    asked = samples.labels[:, 1:] >= 0
    return float((guess == samples.labels[:, 1:])[asked].double().mean())


def written(arm: str, setting: Setting, seed: int) -> dict[str, Any]:
    """Held-out nats a character of every window, and what the heads' maps are like."""
    torch.manual_seed(seed)
    task = characters(length=setting.length)
    model = build(arm, task.vocabulary, setting)
    train(model, task, setting.steps, batch=setting.batch, rate=setting.rate, seed=seed)
    samples = task.draw(64, 10**6, held_out=True)
    found: dict[str, Any] = {"nats": nats(model, samples.ids).tolist()}
    if arm == "routing":
        maps = maps_of(model, samples.ids[:8])
        local = setting.heads // 2
        found["outside"] = [float((one[:, local:].sum(-1) < 0.5).double().mean()) for one in maps]
        tables = torch.stack([js_divergence_between_heads(one) for one in maps])
        apart = ~torch.eye(local, dtype=torch.bool)
        found["local, local"] = float(tables[:, :local, :local][:, apart].mean())
        found["local, routing"] = float(tables[:, :local, local:].nanmean())
        found["routing, routing"] = float(tables[:, local:, local:][:, apart].nanmean())
        shares = torch.stack([mixer.occupancy for mixer in routing_mixers(model)])
        found["smallest cluster"] = float(shares.min() * setting.clusters)
    return found


@torch.no_grad()
def nats(model: nn.Module, ids: Tensor) -> Tensor:
    """Mean nats a token of each window."""
    rows = []
    for part in ids.split(16):
        logits = model(part, use_cache=False).logits[:, :-1]
        rows.append(cross_entropy(logits.transpose(1, 2), part[:, 1:], reduction="none").mean(1))
    return torch.cat(rows)


def routing_mixers(model: LanguageModel) -> list[RoutingAttention]:
    return [mixer for mixer in model.mixers if isinstance(mixer, RoutingAttention)]


def maps_of(model: LanguageModel, ids: Tensor) -> list[Tensor]:
    """The maps of all heads, layer by layer."""
    seen: list[Tensor] = []

    def note(mixer: nn.Module, given: tuple[Tensor]) -> None:
        seen.append(given[0])

    mixers = routing_mixers(model)
    handles = [mixer.register_forward_pre_hook(note) for mixer in mixers]
    with torch.no_grad():
        model(ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return [mixer.maps(hidden) for mixer, hidden in zip(mixers, seen, strict=True)]


def products(tokens: int, clusters: int, rule: str, dim: int = 64) -> int:
    """Multiplications of one head on random states, as torch counts them in the matrix products."""
    window = tokens // clusters
    generator = torch.Generator().manual_seed(0)
    states = layer_norm(torch.randn(1, 1, tokens, dim, generator=generator), (dim,))
    centroids = layer_norm(torch.randn(1, clusters, dim, generator=generator), (dim,))
    with FlopCounterMode(display=False) as counter:
        scores = cluster_scores(states, centroids)
        if rule == "published":
            members = balanced_topk_routing(scores, window)
            routed_attention(states, states, states, members, members, scale=dim**-0.5)
        else:
            memory = ClusterMemory.empty(states, states, scores, window)
            prefix_routed_attention(states, states, states, scores, memory, scale=dim**-0.5)
    return counter.get_total_flops() // 2


def slope(sizes: Sequence[int], counts: Sequence[int]) -> float:
    """Of a straight line through the logarithms."""
    x, y = (torch.tensor([math.log(v) for v in values]) for values in (sizes, counts))
    x, y = x - x.mean(), y - y.mean()
    return float((x @ y) / (x @ x))


def deviation() -> float:
    """The largest difference of routing from dense attention and from the published rule on prefixes, in float64."""
    generator = torch.Generator().manual_seed(0)
    states, value = torch.randn(2, 2, 2, 40, 8, generator=generator, dtype=torch.float64).unbind()
    states = layer_norm(states, (8,))
    centroids = torch.randn(2, 5, 8, generator=generator, dtype=torch.float64)
    dense = nn.functional.scaled_dot_product_attention(states, states, value, is_causal=True)
    scale, one = 8**-0.5, cluster_scores(states, centroids[:, :1])
    members = balanced_topk_routing(one, 40)
    whole = routed_attention(states, states, value, members, members, scale=scale)
    memory = ClusterMemory.empty(states, value, one, 40)
    prefix = prefix_routed_attention(states, states, value, one, memory, scale=scale)[0]
    worst = max(float((found - dense).abs().max()) for found in (whole, prefix))
    scores = cluster_scores(states, centroids)
    memory = ClusterMemory.empty(states, value, scores, 8)
    prefix = prefix_routed_attention(states, states, value, scores, memory, scale=scale)[0]
    for i in range(40):
        members = balanced_topk_routing(scores[..., : i + 1], 8)
        now, given = states[:, :, : i + 1], value[:, :, : i + 1]
        last = routed_attention(now, now, given, members, members, scale=scale)[:, :, -1]
        worst = max(worst, float((last - prefix[:, :, i]).abs().max()))
    return worst


def leak(kind: type[RoutingAttention], seed: int, tokens: int = 128) -> float:
    """Share of the tokens in the first half whose output changes when those in the second half do."""
    torch.manual_seed(seed)
    mixer = kind(64, 4, clusters=8, window=tokens // 8).eval()
    states = torch.randn(4, tokens, 64)
    other = states.clone()
    other[:, tokens // 2 :] = torch.randn(4, tokens // 2, 64)
    with torch.no_grad():
        change = (mixer(other) - mixer(states))[:, : tokens // 2].norm(dim=-1)
        size = mixer(states)[:, : tokens // 2].norm(dim=-1)
    return float((change > 1e-4 * size).double().mean())


class Inputs(Method):
    """Queries and keys of every layer, each head with its own key head's states."""

    reads_only = True

    def __init__(self) -> None:
        self.seen: dict[int, tuple[Tensor, Tensor, float]] = {}

    def before(self, call: AttentionCall) -> None:
        key = call.key.repeat_interleave(call.group, dim=1)
        self.seen[call.site.layer] = (call.query.clone(), key.clone(), call.scaling)


def caught(
    model: Any, learn: Tensor, test: Tensor, clusters: int, layers: Sequence[int]
) -> dict[str, list[float]]:
    """Share of the 16 strongest weights of each row that lie inside clusters, by way to choose pairs, one number a layer.

    Centroids are learnt on one text (online k-means on normed queries and keys) and used on another. Rows after the first 64
    tokens. "no sink" leaves out the first key.
    """
    inputs = []
    for ids in (learn, test):
        reader = Inputs()
        with torch.no_grad(), attach(model, reader):
            model(input_ids=ids[None])
        inputs.append(reader.seen)
    found: dict[str, list[float]] = {}
    generator = torch.Generator().manual_seed(0)
    for layer in layers:
        known = [layer_norm(one, one.shape[-1:]) for one in inputs[0][layer][:2]]
        centroids = learned(torch.cat(known, 2), clusters, generator)
        query, key, scaling = inputs[1][layer]
        tokens = query.shape[2]
        window = tokens // clusters
        causal = torch.ones(tokens, tokens, dtype=torch.bool).tril()
        weights = (scaling * query @ key.mT).masked_fill(~causal, -torch.inf).softmax(-1)
        normed = [layer_norm(one, one.shape[-1:]) for one in (query, key)]
        routed = (
            together([cluster_scores(one, centroids) for one in normed], window, tokens) & causal
        )
        lots = [
            torch.rand(*routed.shape[:2], clusters, tokens, generator=generator) for _ in range(2)
        ]
        by_lot = together(lots, window, tokens) & causal
        place = torch.arange(tokens)
        near = max(1, round(float(routed[:, :, 64:].sum(-1).double().mean())))
        local = causal & (place[:, None] - place < near)
        for name, pairs in (
            ("routing", routed),
            ("random", by_lot),
            ("local", local.expand_as(routed)),
        ):
            for sink in (True, False):
                mass = weights if sink else weights.clone()
                if not sink:
                    mass[..., 0] = 0
                best, index = mass[:, :, 64:].topk(16, dim=-1)
                inside = best * pairs[:, :, 64:].gather(-1, index)
                share = float((inside.sum(-1) / best.sum(-1)).mean())
                found.setdefault(name if sink else f"{name}, no sink", []).append(share)
        found.setdefault("keys a query", []).append(
            float(routed[:, :, 64:].sum(-1).double().mean())
        )
        found.setdefault("keys a query, random", []).append(
            float(by_lot[:, :, 64:].sum(-1).double().mean())
        )
    return found


def learned(states: Tensor, clusters: int, generator: torch.Generator, rounds: int = 15) -> Tensor:
    """Centroids of `[1, heads, tokens, dim]`, by online k-means from tokens drawn at random."""
    heads, tokens = states.shape[1], states.shape[2]
    picked = torch.randint(tokens, (heads, clusters), generator=generator)
    sums = states[0].gather(1, picked[..., None].expand(-1, -1, states.shape[-1])).clone()
    counts = torch.ones(heads, clusters)
    for _ in range(rounds):
        counts, sums, _ = kmeans_ema_statistics(counts, sums, states, decay=0.5)
    return smoothed_centroids(counts, sums)


def together(scores: Sequence[Tensor], window: int, tokens: int) -> Tensor:
    """`[batch, heads, queries, keys]`: which queries and keys share a cluster."""
    member = []
    for one in scores:
        inside = torch.zeros(*one.shape[:3], tokens)
        member.append(inside.scatter(-1, balanced_topk_routing(one, window), 1.0))
    query, key = member
    return query.mT @ key > 0
