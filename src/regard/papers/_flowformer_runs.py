"""Data, hosts and trainings of `flowformer` (and `aaren`): sequences to classify, a post-norm encoder, character models."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from regard.labs import tasks, training
from regard.nn import (
    BidirectionalFlowAttention,
    FlowAttention,
    LanguageModel,
    LanguageModelConfig,
    LinearAttention,
    Mixer,
)
from regard.nn.mixer import State
from regard.nn.projections import merge_heads, split_heads
from regard.ops import (
    causal_flow_attention,
    causal_linear_attention,
    conserved_flows,
    flow_attention,
    linear_attention,
)
from regard.ops.flow_attention import capacities

Mix = Callable[[Tensor, Tensor, Tensor], Tensor]


# what is classified


@dataclass(frozen=True)
class Sequences:
    """Standardised sequences `[count, tokens, channels]` with their classes, apart for training and for the test."""

    train: Float[Tensor, "count tokens channels"]
    train_labels: Int[Tensor, " count"]
    test: Float[Tensor, "held tokens channels"]
    test_labels: Int[Tensor, " held"]
    classes: int


def digits() -> Sequences:
    """scikit-learn's 1797 handwritten digits, read as 16 tokens of 2 x 2 pixels; every third is held out."""
    from sklearn.datasets import load_digits

    found: Any = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32).view(-1, 4, 2, 4, 2)
    patches = images.permute(0, 1, 3, 2, 4).reshape(len(images), 16, 4)
    return apart(patches, torch.tensor(found.target), torch.arange(len(images)) % 3 == 0, 10)


def order_of_events(count: int = 2000, tokens: int = 24, noise: float = 0.3) -> Sequences:
    """Two of three events somewhere in four channels of noise; the class is which two, in which order (6 classes).

    Where an event is tells nothing, and neither does the sum over all tokens tell the order.
    """
    generator = torch.Generator().manual_seed(7)
    series = noise * torch.randn(count, tokens, 4, generator=generator)
    shapes = torch.tensor([[1.0, 1, -1, -1], [1, -1, 1, -1], [1, -1, -1, 1]]) * 1.5
    events = torch.rand(count, 3, generator=generator).argsort(-1)[:, :2]
    places = torch.rand(count, tokens, generator=generator).argsort(-1)[:, :2].sort(-1).values
    series.scatter_add_(1, places[..., None].expand(-1, -1, 4), shapes[events])
    second = events[:, 1] - (events[:, 1] > events[:, 0]).long()
    return apart(series, 2 * events[:, 0] + second, torch.arange(count) % 3 == 0, 6)


def apart(
    series: Float[Tensor, "count tokens channels"],
    labels: Int[Tensor, " count"],
    held: Bool[Tensor, " count"],
    classes: int,
) -> Sequences:
    """Standardised channel by channel with the training part's mean and deviation."""
    known = series[~held].flatten(0, 1)
    series = (series - known.mean(0)) / known.std(0)
    return Sequences(series[~held], labels[~held], series[held], labels[held], classes)


# the attentions that are compared


class Projected(nn.Module):
    """An attention between four linear layers with biases, those of `BidirectionalFlowAttention`."""

    def __init__(self, width: int, heads: int, mix: Mix) -> None:
        super().__init__()
        self.heads, self.mix = heads, mix
        self.q_proj, self.k_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.v_proj, self.o_proj = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        layers = (self.q_proj, self.k_proj, self.v_proj)
        parts = (split_heads(one(hidden), self.heads) for one in layers)
        return self.o_proj(merge_heads(self.mix(*parts)))


def without_competition(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Flow attention with w = 1: sinks still get their share."""
    flows = conserved_flows(query, key)
    share = torch.sigmoid(flows.conserved_incoming)[..., None]
    query, key = capacities(query), capacities(key)
    return share * ((query / flows.incoming[..., None]) @ (key.mT @ value))


def without_allocation(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Flow attention in which every sink passes on all that it collects: sources still compete."""
    flows = conserved_flows(query, key)
    strength = flows.conserved_outgoing.softmax(-1)[..., None] * key.shape[2]
    query, key = capacities(query), capacities(key)
    return (query / flows.incoming[..., None]) @ (key.mT @ (strength * value))


ENCODERS: dict[str, Callable[[int, int], nn.Module]] = {
    "flow": BidirectionalFlowAttention,
    "softmax": lambda w, h: Projected(w, h, scaled_dot_product_attention),
    "linear": lambda w, h: Projected(w, h, linear_attention),
    "no competition": lambda w, h: Projected(w, h, without_competition),
    "no allocation": lambda w, h: Projected(w, h, without_allocation),
}


class Encoder(nn.Module):
    """The released classifier's host, small: positions, post-norm layers, GELU, all tokens into one linear layer."""

    def __init__(
        self, data: Sequences, attention: Callable[[int, int], nn.Module], width: int = 32
    ) -> None:
        super().__init__()
        _, tokens, channels = data.train.shape
        self.scale = math.sqrt(width)
        self.embed = nn.Linear(channels, width)
        self.positions = nn.Parameter(torch.empty(tokens, width).uniform_(-0.02, 0.02))
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    "attention": attention(width, 4),
                    "first": nn.LayerNorm(width),
                    "feed": nn.Sequential(
                        nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
                    ),
                    "second": nn.LayerNorm(width),
                }
            )
            for _ in range(2)
        )
        self.dropout = nn.Dropout(0.1)
        self.head = nn.Linear(tokens * width, data.classes)

    def forward(self, series: Tensor) -> Tensor:
        hidden = self.embed(series) * self.scale + self.positions
        for layer in self.layers:
            hidden = layer["first"](hidden + self.dropout(layer["attention"](hidden)))  # type: ignore[index]
            hidden = layer["second"](hidden + self.dropout(layer["feed"](hidden)))  # type: ignore[index]
        return self.head(self.dropout(nn.functional.gelu(hidden)).flatten(1))


def classify(model: nn.Module, data: Sequences, steps: int, seed: int, rate: float = 2e-3) -> float:
    """Accuracy on the held-out part after training with RAdam, batches of 32, the rate falling to 0 over the last half, %."""
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.RAdam(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda i: min(1.0, 2 - 2 * i / steps))
    model.train()
    for _ in range(steps):
        chosen = torch.randint(len(data.train), (32,), generator=generator)
        loss = nn.functional.cross_entropy(model(data.train[chosen]), data.train_labels[chosen])
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 4.0)
        optimiser.step()
        schedule.step()
    model.eval()
    with torch.no_grad():
        found = model(data.test).argmax(-1)
    return 100 * float((found == data.test_labels).float().mean())


# character models


class AbsoluteSoftmax(Mixer):
    """Causal softmax attention without rotary angles: the baseline under the positions that linear forms are given."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.inner = Projected(
            width, heads, lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=True)
        )

    def forward(
        self,
        hidden: Float[Tensor, "batch tokens width"],
        *,
        valid: Bool[Tensor, "batch tokens"] | None = None,
        state: State | None = None,
    ) -> Float[Tensor, "batch tokens width"]:
        assert valid is None and not state, "trained and measured on whole texts only"
        return self.inner(hidden)


CAUSAL: dict[str, Callable[[int, int], Mixer]] = {
    "softmax": AbsoluteSoftmax,
    "flow": FlowAttention,
    "linear": LinearAttention,
    "flow, not clipped": lambda w, h: FlowAttention(w, h, clip=None),
}


def language_model(
    mixer: Callable[[int, int], Mixer],
    task: tasks.Task,
    *,
    width: int = 64,
    layers: int = 2,
    heads: int = 4,
) -> LanguageModel:
    """A model with embedded positions whose layers have mixers of one kind."""
    config = LanguageModelConfig(
        vocab_size=task.vocabulary,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        mixers=["linear"],
        max_position_embeddings=task.length,
    )
    model = LanguageModel(config)
    for block in model.layers:
        block.self_attn = mixer(width, heads)
    return model


@dataclass(frozen=True)
class Writing:
    """How much a character model is trained."""

    length: int = 96
    steps: int = 300
    batch: int = 8
    width: int = 48
    samples: int = 128


def write(name: str, setting: Writing, seed: int) -> dict[str, Any]:
    """Trains a character model; its bits a character, those of each sample, and how flat its layers' weights are."""
    torch.manual_seed(seed)
    task = tasks.characters(setting.length)
    model = language_model(CAUSAL[name], task, width=setting.width)
    training.train(model, task, setting.steps, batch=setting.batch, rate=3e-3, seed=seed)
    samples = task.draw(setting.samples, 10**6, held_out=True)
    return {
        "bits": task.loss(model, setting.samples) / math.log(2),
        "flatness": flatness(model, samples.ids[:4]),
        "parameters": sum(p.numel() for p in model.parameters()),
    }


@torch.no_grad()
def flatness(model: LanguageModel, ids: Int[Tensor, "batch tokens"]) -> float:
    """Entropy of the effective weights over its maximum, mean of all heads and of the rows from the ninth on."""
    found: list[Tensor] = []

    def look(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        weights = effective_weights(module, inputs[0])[:, :, 8:]
        entropy = -(weights * weights.clamp_min(1e-30).log()).sum(-1)
        found.append((entropy / torch.arange(9.0, ids.shape[1] + 1).log()).mean())

    hooks = [block.self_attn.register_forward_pre_hook(look) for block in model.layers]  # type: ignore[union-attr]
    model(ids)
    for hook in hooks:
        hook.remove()
    return float(torch.stack(found).mean())


def effective_weights(
    mixer: nn.Module, hidden: Float[Tensor, "batch tokens width"]
) -> Float[Tensor, "batch heads tokens tokens"]:
    """How much of each value is in each output, every row scaled to 1: the outputs for values that are unit vectors."""
    inner: Any = mixer.inner if isinstance(mixer, AbsoluteSoftmax) else mixer
    query, key = (split_heads(layer(hidden), inner.heads) for layer in (inner.q_proj, inner.k_proj))
    value = torch.eye(hidden.shape[1]).expand(*query.shape[:3], -1)
    if isinstance(mixer, FlowAttention):
        weights = causal_flow_attention(query, key, value, clip=mixer.clip)[0]
    elif isinstance(mixer, LinearAttention):
        weights = causal_linear_attention(query, key, value)[0]
    else:
        weights = scaled_dot_product_attention(query, key, value, is_causal=True)
    return weights / weights.sum(-1, keepdim=True)


# cost


def seconds(work: Callable[[], object], repeats: int = 3) -> float:
    """Least processor time of a few calls, after one that is not counted."""
    work()
    taken = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        taken.append(time.process_time() - start)
    return min(taken)


def kept_for_backward(work: Callable[[], object]) -> float:
    """Megabytes of the tensors that autograd keeps, each counted once."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = work()
    assert result is not None  # alive until here, so that no address is used twice
    return sum(kept.values()) / 1e6


def softmax_by_matrix(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal softmax attention with its matrix of weights in memory."""
    later = torch.ones(query.shape[2], query.shape[2], dtype=torch.bool).triu(1)
    scores = query @ key.mT * query.shape[-1] ** -0.5
    return scores.masked_fill(later, -torch.inf).softmax(-1) @ value


def slope(sizes: list[int], costs: list[float]) -> float:
    """Exponent of the power law that fits the costs best."""
    x, y = torch.tensor(sizes).double().log(), torch.tensor(costs).double().log()
    return float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())


# exactness


def conservation() -> float:
    """Largest relative departure of the conserved flows' sums from the numbers of sources and of sinks."""
    worst = 0.0
    for queries, keys, scale in ((16, 16, 1.0), (64, 16, 3.0), (16, 100, 0.3), (200, 200, 1.0)):
        query = scale * torch.randn(2, 4, queries, 16, dtype=torch.float64)
        key = scale * torch.randn(2, 4, keys, 16, dtype=torch.float64)
        flows = conserved_flows(query, key)
        into = (flows.conserved_incoming.sum(-1) / keys - 1).abs().max()
        out = (flows.conserved_outgoing.sum(-1) / queries - 1).abs().max()
        worst = max(worst, float(into), float(out))
    return worst


def by_matrix(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Flow attention with its queries x keys matrix of weights written out."""
    eps = 1e-6
    q, k = torch.sigmoid(query), torch.sigmoid(key)
    n, m = q.shape[2], k.shape[2]
    into = ((q + eps) * (k.sum(2, keepdim=True) + eps)).sum(-1, keepdim=True)
    out = ((k + eps) * (q.sum(2, keepdim=True) + eps)).sum(-1, keepdim=True)
    share = ((q + eps) * ((k / out).sum(2, keepdim=True) + eps)).sum(-1, keepdim=True)
    strength = ((k + eps) * ((q / into).sum(2, keepdim=True) + eps)).sum(-1, keepdim=True)
    weights = torch.sigmoid(share * n / m) / into * (q @ k.mT) * (strength.softmax(2) * m).mT
    return weights @ value


def deviations() -> dict[str, float]:
    """Largest differences in float64 between forms that must agree."""
    from regard.ops import flow_attention_step

    query, key, value = torch.randn(3, 1, 4, 150, 16, dtype=torch.float64)
    matrix = (flow_attention(query, key, value) - by_matrix(query, key, value)).abs().max()
    causal, _ = causal_flow_attention(query, key, value)
    state, worst = None, 0.0
    for t in range(query.shape[2]):
        one, state = flow_attention_step(query[:, :, t], key[:, :, t], value[:, :, t], state)
        worst = max(worst, float((one - causal[:, :, t]).abs().max()))
    changed = [part.clone() for part in (query, key, value)]
    for part in changed:
        part[:, :, 100:] = torch.randn_like(part[:, :, 100:])
    leak = (causal_flow_attention(*changed)[0] - causal)[:, :, :100].abs().max()
    return {
        "linear order against the matrix": float(matrix),
        "causal form against steps": worst,
        "past outputs when the future changes": float(leak),
    }


def clipped_share() -> dict[str, float]:
    """Share of sources whose conserved outgoing flow exceeds 1, normal queries and keys, %."""
    found = {}
    for name, queries, keys in (
        ("n = m", 256, 256),
        ("n = 4 m", 1024, 256),
        ("4 n = m", 256, 1024),
    ):
        flows = conserved_flows(torch.randn(4, 8, queries, 64), torch.randn(4, 8, keys, 64))
        found[name] = 100 * float((flows.conserved_outgoing > 1).float().mean())
    return found
