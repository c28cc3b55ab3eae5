"""What the experiment on attention as a graph runs.

* `exact_differences`, `counting`: identities of the layers, and which of them can count neighbours;
* `fit`: small language models of bytes on so little text that they overfit, with equal numbers of parameters;
* `adapt`: a frozen model fine-tuned to another kind of text by Sparse-GIN, its self-loop form, or LoRA;
* `graphs`: the sparse graphs of a pretrained model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

import regard
from regard import texts
from regard.engine import Block, Method
from regard.nn import GINAttention, LanguageModel, LanguageModelConfig, PNAAttention
from regard.nn.projections import merge_heads, split_heads
from regard.nn.rotary import rotate
from regard.ops.graph_attention import (
    attention_graph,
    edge_cut,
    gin_aggregate,
    pna_aggregate,
    shared_attention,
    sparse_attention_graph,
)
from regard.weights import SelfLoopGIN, SparseGIN, lora, sparse_gin

ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "reference": ("softmax", {}),
    "GIN 0.5": ("gin", {"mlp_mult": 0.5}),
    "GIN 1": ("gin", {"mlp_mult": 1.0}),
    "GIN 4": ("gin", {"mlp_mult": 4.0}),
    "GIN 0.5 + W_o": ("gin", {"mlp_mult": 0.5, "o_proj": True}),
    "PNA": ("pna", {"mlp_mult": 0.5}),
}


@dataclass(frozen=True)
class Size:
    """Of the byte models and their training; `every` epochs the held-out text is read."""

    width: int = 48
    layers: int = 2
    heads: int = 3
    length: int = 32
    batch: int = 16
    train: int = 2048
    held_out: int = 4096
    epochs: int = 48
    every: int = 2
    rate: float = 5e-3


@torch.no_grad()
def exact_differences() -> tuple[float, int]:
    """The largest difference of the identities, and pairs on the wrong side of the cut.

    GIN with an identity for its network and eps = 0 is A x; the mean of PNA with softmaxed weights is their sum; the dense
    product is the scatter over the edge list.
    """
    torch.manual_seed(0)
    hidden = torch.randn(2, 12, 24, dtype=torch.float64)
    mixer = GINAttention(24, 3).double().eval()
    mixer.network = nn.Identity()  # type: ignore[assignment]
    query, key = mixer.query_key_of(hidden)
    places = torch.arange(12)
    scores = rotate(query, places) @ rotate(key, places).mT / 8**0.5
    weights = scores.masked_fill(torch.ones(12, 12).triu(1) > 0, -torch.inf).softmax(-1)
    states = split_heads(hidden, 3)
    worst = float((mixer(hidden) - merge_heads(weights @ states)).abs().max())
    total, mean = pna_aggregate(weights, states, states, aggregators=("sum", "mean")).chunk(2, -1)
    worst = max(worst, float((total - mean).abs().max()))
    shared = shared_attention((3 * torch.randn(50, 4, 30, 30, dtype=torch.float64)).softmax(-1))
    edges = sparse_attention_graph(shared)
    wrong = int(((edges > 0) != (shared > edge_cut(0.1, 10, 0.6))).sum())
    graph, nodes = attention_graph(edges[0].tril()), torch.randn(30, 5, dtype=torch.float64)
    scattered = torch.zeros_like(nodes).index_add(
        0, graph.target, graph.weight[:, None] * nodes[graph.source]
    )
    dense = gin_aggregate(edges[0].tril(), nodes, nodes, 0.0)
    return max(worst, float((dense - scattered).abs().max())), wrong


@torch.no_grad()
def counting() -> dict[str, float]:
    """How far apart a layer puts the last tokens of `a b` and `a b a b`, whose neighbours differ in number alone.

    All scores are 0. Softmaxed weights then sum to 1 for any number of neighbours, so that every aggregate is the same;
    edges that do not sum to 1 count.
    """
    torch.manual_seed(0)
    once = torch.randn(1, 2, 24, dtype=torch.float64)
    twice = once.repeat(1, 2, 1)
    layers: dict[str, tuple[type[GINAttention | PNAAttention], str]] = {
        "GIN, softmax": (GINAttention, "none"),
        "PNA, softmax": (PNAAttention, "none"),
        "GIN, binary edges": (GINAttention, "binary"),
        "PNA, binary edges": (PNAAttention, "binary"),
    }
    found = {}
    for name, (kind, adjacency) in layers.items():
        mixer = kind(24, 3, adjacency=adjacency).double().eval()
        mixer.q_proj.weight.zero_()
        found[name] = float((mixer(once)[:, -1] - mixer(twice)[:, -1]).abs().max())
    return found


def bytes_of(text: str) -> Tensor:
    return torch.frombuffer(bytearray(text.encode("ascii", "replace")), dtype=torch.uint8).long()


def windows(text: Tensor, length: int, start: int = 0) -> Tensor:
    """Windows that do not overlap."""
    part = text[start:]
    return part[: len(part) // length * length].view(-1, length)


def make(arm: str, size: Size) -> LanguageModel:
    """A model of an arm, its feed-forward width chosen so that it has the parameters of the reference."""

    def of(name: str, inner: int | None) -> LanguageModel:
        return LanguageModel(
            LanguageModelConfig(
                vocab_size=128,
                hidden_size=size.width,
                num_hidden_layers=size.layers,
                num_attention_heads=size.heads,
                mixers=[ARMS[name]],
                intermediate_size=inner,
            )
        )

    reference = of("reference", None)
    inner = reference.config.intermediate_size
    spare = parameters(reference) - parameters(of(arm, inner))
    return of(arm, inner + round(spare / (3 * size.width * size.layers)))


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def fit(arm: str, seed: int, size: Size) -> dict[str, Any]:
    """Losses (nats a byte, without dropout) on held-out text by epoch, on the training text at the end, and what alpha became."""
    text = bytes_of(texts.prose(60_000))
    known, unseen = text[: size.train], windows(text[-size.held_out :], size.length)
    torch.manual_seed(seed)
    model = make(arm, size)
    optimiser = torch.optim.AdamW(model.parameters(), lr=size.rate, weight_decay=0.01, fused=True)
    generator = torch.Generator().manual_seed(seed)
    held_out, step = [], 0
    for epoch in range(size.epochs):
        start = int(torch.randint(size.length, (1,), generator=generator))
        rows = windows(known, size.length, start)
        model.train()
        for batch in rows[torch.randperm(len(rows), generator=generator)].split(size.batch):
            step += 1
            for group in optimiser.param_groups:
                group["lr"] = size.rate * min(1.0, step / 20)
            descend(model, optimiser, batch)
        if (epoch + 1) % size.every == 0:
            held_out.append(mean_loss(model, unseen))
    alphas = [mixer.alpha for mixer in model.mixers if isinstance(mixer, GINAttention)]
    return {
        "held out": held_out,
        "training": mean_loss(model, windows(known, size.length)),
        "alpha": [float(alpha.detach()) for alpha in alphas if alpha is not None],
        "parameters": parameters(model),
    }


def gaps(results: list[dict[str, Any]]) -> list[float]:
    return [one["held out"][-1] - one["training"] for one in results]


def descend(model: Any, optimiser: torch.optim.Optimizer, batch: Tensor, clip: float = 1.0) -> None:
    loss = model(batch, labels=batch, use_cache=False).loss
    optimiser.zero_grad()
    loss.backward()
    trained = [p for group in optimiser.param_groups for p in group["params"]]
    nn.utils.clip_grad_norm_(trained, clip)
    optimiser.step()


@torch.no_grad()
def losses_of(model: Any, rows: Tensor) -> list[float]:
    """Nats a token of every window, in evaluation."""
    was = model.training
    model.eval()
    logits = model(rows, use_cache=False).logits[:, :-1].float()
    found = nn.functional.cross_entropy(logits.mT, rows[:, 1:], reduction="none").mean(-1)
    model.train(was)
    return found.tolist()


def mean_loss(model: Any, rows: Tensor) -> float:
    return fmean(losses_of(model, rows))


def base_model(size: Size, steps: int, seed: int) -> LanguageModel:
    """The reference, trained on English."""
    rows = windows(bytes_of(texts.prose(100_000)), size.length)
    torch.manual_seed(seed)
    model = make("reference", size)
    optimiser = torch.optim.AdamW(model.parameters(), lr=size.rate, weight_decay=0.01, fused=True)
    for batch in draws(rows, size.batch, steps, seed):
        descend(model, optimiser, batch)
    return model.eval()


def draws(rows: Tensor, batch: int, steps: int, seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        yield rows[torch.randint(len(rows), (batch,), generator=generator)]


def problems(tokenizer: Any, count: int, length: int, seed: int) -> Tensor:
    """Windows of word problems with their solutions."""
    lines = [
        f"{one.question}\n{'; '.join(one.steps)}. The answer is {one.answer}.\n\n"
        for one in texts.arithmetic_problems(count, seed)
    ]
    ids = tokenizer("".join(lines), add_special_tokens=False)["input_ids"]
    return windows(torch.tensor(ids), length)


Adapter = Callable[[Any], tuple[list[nn.Parameter], list[SparseGIN], Any]]
"""Puts itself on a model: what is trained, what is attached, and the model to run."""


def adapters(hidden: int, rank: int) -> dict[str, Adapter]:
    """The three arms by name, of about equal trainable parameters when `hidden` and `rank` say so."""

    def gin(kind: type[SparseGIN]) -> Adapter:
        def put(model: Any) -> tuple[list[nn.Parameter], list[SparseGIN], Any]:
            made = sparse_gin(model, hidden, kind=kind)
            return list(made.parameters()), [made], model

        return put

    def low_rank(model: Any) -> tuple[list[nn.Parameter], list[SparseGIN], Any]:
        wrapped = lora(model, rank, ("q_proj", "v_proj"), extra=())
        return [p for p in wrapped.parameters() if p.requires_grad], [], wrapped

    return {"neighbours": gin(SparseGIN), "self-loops": gin(SelfLoopGIN), "LoRA": low_rank}


def adapt(
    base: Any,
    put: Adapter,
    train: Tensor,
    unseen: Tensor,
    *,
    rate: float,
    steps: int,
    batch: int,
    seed: int,
    every: int,
) -> dict[str, Any]:
    """Held-out losses of the windows at first and every `every` steps; the scales lambda at first and after every step.

    `base` is copied and stays as it is.
    """
    torch.manual_seed(seed)
    trained, attached, model = put(copy.deepcopy(base).eval())
    optimiser = torch.optim.AdamW(trained, lr=rate, weight_decay=0.01)
    warm = max(1, steps // 10)
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    losses: list[list[float]] = []
    scales: list[list[float]] = []

    def measure() -> None:
        for method in attached:
            method.eval()
        losses.append(losses_of(model, unseen))
        for method in attached:
            method.train()

    with regard.attach(inner, *attached):
        measure()
        scales += [method.scales.tolist() for method in attached]
        for step, rows in enumerate(draws(train, batch, steps, seed)):
            for group in optimiser.param_groups:
                group["lr"] = rate * min(1.0, (step + 1) / warm)
            descend(model, optimiser, rows, clip=0.5)
            scales += [method.scales.tolist() for method in attached]
            if (step + 1) % every == 0:
                measure()
    count = sum(p.numel() for p in trained)
    return {"losses": losses, "scales": scales, "parameters": count}


Courses = dict[str, dict[float, list[dict[str, Any]]]]
"""What `adapt` found, by arm, rate and seed."""


def best_rate(courses: dict[float, list[dict[str, Any]]]) -> float:
    """The rate with the lowest mean held-out loss at the end."""
    return min(courses, key=lambda rate: fmean(course(courses[rate])[-1:]))


def course(results: list[dict[str, Any]]) -> list[float]:
    """Held-out loss over the training, mean over windows and seeds."""
    return [
        fmean(map(fmean, moment)) for moment in zip(*(r["losses"] for r in results), strict=True)
    ]


class Graphs(Method):
    """The sparse graph of each layer, from the attention of one text."""

    reads_only = True

    def __init__(self) -> None:
        self.rows: dict[int, list[Tensor]] = {}

    def weights(self, block: Block) -> None:
        shared = shared_attention(block.weights)
        shared = nn.functional.pad(shared, (block.keys.start, block.call.keys - block.keys.stop))
        self.rows.setdefault(block.site.layer, []).append(shared[0])

    def edges(self) -> list[Tensor]:
        """By layer, `[queries, keys]`."""
        return [sparse_attention_graph(torch.cat(rows)) for _, rows in sorted(self.rows.items())]


@torch.no_grad()
def graphs(model: Any, ids: Tensor) -> list[dict[str, float]]:
    """The graph of every layer of a pretrained model on one text."""
    reader = Graphs()
    with regard.attach(model, reader):
        model(ids, use_cache=False)
    found = []
    for edges in reader.edges():
        graph = attention_graph(edges)
        to_first = float((graph.source == 0).double().mean()) if len(graph.source) else 0.0
        numbers = {
            name: getattr(graph, name) for name in ("density", "degree", "loops", "distance")
        }
        found.append(numbers | {"to the first token": to_first})
    return found
