"""What the mixture-of-heads experiment trains and measures: gates of other kinds, usage of heads, SmolLM2 with routed heads."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

import regard
from regard import texts
from regard.engine import AttentionCall
from regard.labs.tasks import Task
from regard.labs.training import train
from regard.nn import LanguageModel, LanguageModelConfig, MixtureOfHeads
from regard.nn.mixer import Mixer
from regard.ops import chosen_heads
from regard.weights import QueryNormHeads, RoutedHeads, lora

HEADS = 12


class FixedHeads(MixtureOfHeads):
    """The first `shared` heads alone, at full weight: attention with so many heads of the same size."""

    def gates(
        self, hidden: Float[Tensor, "batch tokens width"]
    ) -> Float[Tensor, "batch tokens heads"]:
        on = torch.arange(self.heads) < self.shared
        return on.to(hidden.dtype).expand(*hidden.shape[:2], -1)


class RandomHeads(MixtureOfHeads):
    """Shared heads, and `active` others drawn for each token at random, all at full weight."""

    def gates(
        self, hidden: Float[Tensor, "batch tokens width"]
    ) -> Float[Tensor, "batch tokens heads"]:
        on = chosen_heads(torch.rand(*hidden.shape[:2], self.heads - self.shared), self.active)
        shared = hidden.new_ones(*hidden.shape[:2], self.shared)
        return torch.cat([shared, on.to(hidden.dtype)], -1)


Arm = Callable[[int, int], Mixer]

ARMS: dict[str, Arm] = {
    "dense": lambda w, h: FixedHeads(w, h, shared=h, active=0),
    "MoH 75 %": lambda w, h: MixtureOfHeads(w, h, shared=h // 4, active=h // 2),
    "MoH 50 %": lambda w, h: MixtureOfHeads(w, h, shared=h // 6, active=h // 3),
    "all heads weighted": lambda w, h: MixtureOfHeads(w, h, shared=h // 4, active=h - h // 4),
    "MoH 75 %, no balance": lambda w, h: MixtureOfHeads(
        w, h, shared=h // 4, active=h // 2, balance=0
    ),
    "random 75 %": lambda w, h: RandomHeads(w, h, shared=h // 4, active=h // 2, balance=0),
    "9 heads": lambda w, h: FixedHeads(w, h, shared=h * 3 // 4, active=1, balance=0),
    "6 heads": lambda w, h: FixedHeads(w, h, shared=h // 2, active=1, balance=0),
}


@dataclass(frozen=True)
class Size:
    """Of a character model and its training."""

    steps: int
    width: int = 48
    layers: int = 2
    batch: int = 8
    rate: float = 5e-3


def build(task: Task, size: Size, arm: Arm, seed: int) -> LanguageModel:
    """A model with these gates; what all arms share begins with the same weights for one seed."""
    torch.manual_seed(seed)
    config = LanguageModelConfig(
        vocab_size=task.vocabulary,
        hidden_size=size.width,
        num_hidden_layers=size.layers,
        num_attention_heads=HEADS,
        mixers=["softmax"],
    )
    model = LanguageModel(config)
    for layer, plain in zip(model.layers, model.mixers, strict=True):
        mixer = arm(size.width, HEADS)
        mixer.load_state_dict(plain.state_dict(), strict=False)
        layer.self_attn = mixer
    return model


def fit(task: Task, size: Size, name: str, seed: int, held_out: int) -> dict[str, Any]:
    """Nats a character on held-out text, and how evenly the routed heads are used, after training."""
    model = build(task, size, ARMS[name], seed)
    train(model, task, size.steps, batch=size.batch, rate=size.rate, seed=seed)
    torch.manual_seed(seed)  # for the arm that draws
    found: dict[str, Any] = {"nats": task.loss(model, held_out)}
    if "MoH" in name:
        found["usage"] = usage(model, task)
    return found


@torch.no_grad()
def usage(model: LanguageModel, task: Task, count: int = 32) -> list[list[float]]:
    """By layer: the share of held-out tokens that switch each routed head on."""
    seen: list[Tensor] = []
    handles = [
        mixer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        for mixer in model.mixers
    ]
    model(task.draw(count, 10**6, held_out=True).ids)
    for handle in handles:
        handle.remove()
    table = []
    for mixer, hidden in zip(model.mixers, seen, strict=True):
        assert isinstance(mixer, MixtureOfHeads)
        on = chosen_heads(mixer.routed_logits(hidden), mixer.active)
        table.append(on.float().mean((0, 1)).tolist())
    return table


def evenness(table: Sequence[Sequence[float]]) -> float:
    """Entropy of the use of the routed heads over its largest value, a mean over layers."""
    rows = [torch.tensor(row) / sum(row) for row in table]
    return sum(float(torch.special.entr(row).sum()) / math.log(len(row)) for row in rows) / len(
        rows
    )


class ShortestHeads(QueryNormHeads):
    """The opposite choice: the routed heads in which a token's query is shortest."""

    def logits(
        self, call: AttentionCall, query: Float[Tensor, "batch routed tokens dim"]
    ) -> Float[Tensor, "batch tokens routed"]:
        return -super().logits(call, query)


class DrawnHeads(RoutedHeads):
    """Routed heads drawn anew for each token and layer."""

    def logits(
        self, call: AttentionCall, query: Float[Tensor, "batch routed tokens dim"]
    ) -> Float[Tensor, "batch tokens routed"]:
        return torch.rand(len(query), query.shape[2], query.shape[1])


class StaticHeads(RoutedHeads):
    """The same routed heads for every token, drawn once for each layer: the others are removed."""

    def logits(
        self, call: AttentionCall, query: Float[Tensor, "batch routed tokens dim"]
    ) -> Float[Tensor, "batch tokens routed"]:
        generator = torch.Generator().manual_seed(call.site.layer)
        drawn = torch.rand(query.shape[1], generator=generator)
        return drawn.expand(len(query), query.shape[2], -1)


def tokens_of(tokenizer: Any, text: str, rows: int, length: int) -> Int[Tensor, "rows length"]:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"][: rows * length]
    return torch.tensor(ids).view(rows, length)


@torch.no_grad()
def losses(
    model: Any, windows: Int[Tensor, "rows length"], method: RoutedHeads | None
) -> list[float]:
    """Nats a token of each window."""
    torch.manual_seed(0)
    with nullcontext() if method is None else regard.attach(model, method):
        return [float(model(input_ids=one[None], labels=one[None]).loss) for one in windows]


def tune(
    model: Any,
    rows: Int[Tensor, "rows length"],
    held: Int[Tensor, "held length"],
    method: RoutedHeads | None,
    measure: Iterable[int],
    watch: Callable[[Iterable[int]], Iterator[int]] = iter,
    rate: float = 1e-3,
) -> dict[str, list[float]]:
    """LoRA on the attention projections, a row a step: held-out nats after each number of steps in `measure`."""
    torch.manual_seed(0)
    tuned, curve, wanted = lora(copy.deepcopy(model), r=8, extra=()), {}, set(measure)
    parameters = [p for p in tuned.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    for step in watch(range(len(rows) + 1)):
        if step in wanted:
            curve[str(step)] = losses(tuned.eval(), held, method)
        if step == len(rows):
            break
        tuned.train()
        for group in optimiser.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 4)
        with nullcontext() if method is None else regard.attach(tuned, method):
            one = rows[step][None]
            loss = tuned(input_ids=one, labels=one).loss
            if method is not None:
                loss = loss + method.loss()
            loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
    return curve


def tables(n_chars: int) -> str:
    """Numbers in columns, as a third kind of text."""
    import random

    source = random.Random(0)
    names = ("north", "south", "east", "west", "centre")
    line = lambda i: (  # noqa: E731
        f"| {i} | {source.choice(names)} | {source.randint(1, 999)} | {source.random():.3f} |"
    )
    text = "| id | region | units | share |\n|---|---|---|---|\n"
    rows = 0
    while len(text) < n_chars:
        text, rows = text + line(rows) + "\n", rows + 1
    return text[:n_chars]


@torch.no_grad()
def choices_by_domain(
    model: Any, rows: int, length: int, method: RoutedHeads
) -> dict[str, list[list[list[float]]]]:
    """By kind of text and window: for each layer, the share of tokens that switch each routed head on."""
    kinds = {"prose": texts.prose, "code": texts.code, "table": tables}
    found: dict[str, list[list[list[float]]]] = {}
    for name, make in kinds.items():
        windows = tokens_of(model.tokenizer, make(8 * rows * length), rows, length)
        shares = []
        with regard.attach(model, method):
            for one in windows:
                model(input_ids=one[None], logits_to_keep=1)
                shares.append([on.float().mean((0, 1)).tolist() for on in method.chosen.values()])
        found[name] = shares
    return found


def information(found: dict[str, list[list[list[float]]]], labels: list[int]) -> float:
    """Mutual information in bits between the kind of text and which routed head is on, a mean over layers.

    Each switch of a head by a token counts as one draw of a head; windows are given the kinds `labels`.
    """
    shares = torch.tensor([window for windows in found.values() for window in windows])
    shares = shares / shares.sum(-1, keepdim=True)  # [windows, layers, routed]
    kinds = torch.nn.functional.one_hot(torch.tensor(labels)).to(shares.dtype)
    weight = kinds / kinds.sum(0)
    mean = torch.einsum("wk,wlr->klr", weight, shares)
    share = kinds.mean(0)
    overall = torch.einsum("k,klr->lr", share, mean)
    within = torch.einsum("k,kl->l", share, torch.special.entr(mean).sum(-1))
    return float((torch.special.entr(overall).sum(-1) - within).mean() / math.log(2))
