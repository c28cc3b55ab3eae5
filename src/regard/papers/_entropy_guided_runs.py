"""Measurements of the entropy-guided experiment: small decoders on Python source, with nonlinearities taken away."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

import regard
from regard.instruments import Entropy
from regard.nn import (
    RowEntropyRegularizer,
    ScaledFusedFFN,
    SoftmaxAttention,
    TemperatureAttention,
)
from regard.texts import code


@dataclass(frozen=True)
class Arm:
    """What a decoder keeps: layer norms, an activation, the scaled fused layer, temperatures, the regularizer's strength."""

    norms: bool = False
    activation: str = ""
    fused: bool = False
    temperature: bool = False
    strength: float = 0.0


ARMS = {
    "SM + LN + GELU": Arm(norms=True, activation="gelu"),
    "SM + LN + ReLU": Arm(norms=True, activation="relu"),
    "SM + GELU": Arm(activation="gelu"),
    "SM + ReLU": Arm(activation="relu"),
    "SM": Arm(),
    "SM + ScFuFFN": Arm(fused=True),
    "EReg 1e-6": Arm(fused=True, temperature=True, strength=1e-6),
    "EReg 1e-5": Arm(fused=True, temperature=True, strength=1e-5),
    "EReg 1e-4": Arm(fused=True, temperature=True, strength=1e-4),
}
PLAIN = "SM + ScFuFFN"
REGULARIZED = tuple(name for name, arm in ARMS.items() if arm.strength)


@dataclass(frozen=True)
class Scale:
    """Sizes of the training runs."""

    steps: int
    layers: int = 6
    heads: int = 4
    width: int = 64
    tokens: int = 64
    batch: int = 8
    rate: float = 2e-3
    windows: int = 128


class FeedForward(nn.Module):
    """`W_down f(W_up h)`, f the identity without an activation."""

    def __init__(self, width: int, activation: str) -> None:
        super().__init__()
        self.up_proj = nn.Linear(width, 4 * width, bias=False)
        self.down_proj = nn.Linear(4 * width, width, bias=False)
        kinds = {"gelu": nn.GELU(), "relu": nn.ReLU(), "": nn.Identity()}
        self.activation = kinds[activation]

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down_proj(self.activation(self.up_proj(hidden)))


class Layer(nn.Module):
    """A pre-norm decoder layer without whatever the arm leaves out."""

    def __init__(self, scale: Scale, arm: Arm) -> None:
        super().__init__()
        width = scale.width
        self.input_norm, self.post_norm = (
            nn.LayerNorm(width) if arm.norms else nn.Identity() for _ in range(2)
        )
        self.self_attn = (
            TemperatureAttention(width, scale.heads, positions=scale.tokens)
            if arm.temperature
            else SoftmaxAttention(width, scale.heads)
        )
        self.fused = arm.fused
        self.mlp = ScaledFusedFFN(width) if arm.fused else FeedForward(width, arm.activation)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.self_attn(self.input_norm(hidden))
        change = self.mlp(self.post_norm(hidden))
        return change if self.fused else hidden + change


class Decoder(nn.Module):
    """A language model of such layers; matrices start from N(0, 0.02^2), as in GPT-2."""

    def __init__(self, vocabulary: int, scale: Scale, arm: Arm) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, scale.width)
        self.layers = nn.ModuleList(Layer(scale, arm) for _ in range(scale.layers))
        self.norm = nn.LayerNorm(scale.width) if arm.norms else nn.Identity()
        self.head = nn.Linear(scale.width, vocabulary, bias=False)
        for name, module in self.named_modules():
            own = name.endswith("mlp.fused")  # starts as a product of two such matrices
            if isinstance(module, (nn.Linear, nn.Embedding)) and not own:
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, ids: Int[Tensor, "batch tokens"]) -> Float[Tensor, "batch tokens words"]:
        hidden = self.embed(ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return self.head(self.norm(hidden))

    def loss(self, ids: Int[Tensor, "batch longer"]) -> Float[Tensor, ""]:
        logits = self(ids[:, :-1])
        return functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


@cache
def corpus(characters: int = 640_000) -> tuple[Tensor, Tensor, int]:
    """Python source as characters: to train on, held out (other definitions, but for one cut in two), and the vocabulary."""
    text = code(characters)
    known = {char: index for index, char in enumerate(sorted(set(text)))}
    ids = torch.tensor([known[char] for char in text])
    cut = characters * 9 // 10
    return ids[:cut], ids[cut:], len(known)


def train_code(name: str, seed: int, scale: Scale) -> dict[str, Any]:
    """One arm: AdamW at a constant rate, then perplexity and head entropies on held-out source."""
    torch.manual_seed(seed)
    arm = ARMS[name]
    train, held, vocabulary = corpus()
    model = Decoder(vocabulary, scale, arm)
    regularizer = RowEntropyRegularizer(scale.layers, scale.heads, strength=arm.strength)
    optimiser = torch.optim.AdamW(
        [*model.parameters(), *regularizer.parameters()], lr=scale.rate, weight_decay=0.01
    )
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.arange(scale.tokens + 1)
    attached = [regularizer] if arm.strength else []
    losses: list[float] = []
    with regard.attach(model, *attached):
        for _ in range(scale.steps):
            starts = torch.randint(len(train) - scale.tokens, (scale.batch, 1), generator=generator)
            loss = model.loss(train[starts + offsets])
            total = loss + regularizer.loss() if attached else loss
            optimiser.zero_grad()
            total.backward()
            losses.append(float(loss.detach()))
            if not math.isfinite(losses[-1]):
                break
            optimiser.step()
    diverged = not math.isfinite(losses[-1])
    found: dict[str, Any] = {
        "losses": [value for value in losses if math.isfinite(value)],
        "diverged": diverged,
        "levels": regularizer.levels.detach().tolist(),
        "temperatures": [
            float(layer.self_attn.temperature.detach().mean())  # type: ignore[union-attr,operator]
            for layer in model.layers
            if arm.temperature
        ],
    }
    windows = held[: scale.windows * (scale.tokens + 1)].view(scale.windows, -1)
    entropy = Entropy()
    if not diverged:
        with torch.no_grad(), regard.attach(model, entropy):
            nats = float(model.loss(windows))
        found["perplexity"] = math.exp(nats)
        found["entropy"] = entropy.compute()["entropy"].matrix().tolist()
    return found


def operations(name: str, scale: Scale) -> dict[str, int]:
    """What one pass over a window costs under encryption: softmax rows, layer norms, activations, feed-forward products."""
    arm, tokens, layers = ARMS[name], scale.tokens, scale.layers
    feed = scale.width**2 if arm.fused else 8 * scale.width**2
    return {
        "softmax rows": layers * scale.heads * tokens,
        "norms": (2 * layers + 1) * tokens if arm.norms else 0,
        "activations": 4 * scale.width * layers * tokens if arm.activation else 0,
        "feed-forward products": feed * layers * tokens,
    }


def largest_difference() -> float:
    """The regularizer read through the engine against the algorithm on held maps: loss and gradient, in float64."""
    scale = Scale(steps=0, layers=2, width=16, tokens=12, batch=2)
    torch.manual_seed(0)
    model = Decoder(30, scale, ARMS["EReg 1e-5"]).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    regularizer = RowEntropyRegularizer(2, 4, strength=1.0).double()
    ids = torch.randint(30, (2, 12))
    with regard.attach(model, regularizer):
        model(ids)
        loss = regularizer.loss()
    weights = list(model.layers[0].self_attn.parameters())  # type: ignore[union-attr]
    own = torch.autograd.grad(loss, [*weights, regularizer.levels], allow_unused=True)
    hidden, total = model.embed(ids), torch.zeros((), dtype=torch.float64)
    for layer, levels in zip(model.layers, regularizer.levels, strict=True):
        kept = _weights(layer.self_attn, layer.input_norm(hidden))  # type: ignore[union-attr,operator]
        entropy = -torch.nansum(kept * torch.log(kept + 1e-9), -1)
        top = math.log(12)
        for head in range(4):
            gap = entropy[:, head] - levels[head] * top
            total = total + gap.square()[gap.abs() > 0.2 * top].sum() / 4 / 2
        hidden = layer(hidden)
    dense = torch.autograd.grad(total, [*weights, regularizer.levels], allow_unused=True)
    worst = float((loss - total).detach().abs() / total.detach())
    for one, other in zip(own, dense, strict=True):
        if one is not None and other is not None:
            worst = max(worst, float((one - other).abs().max() / other.abs().max().clamp_min(1e-9)))
    return worst


def _weights(attention: TemperatureAttention, hidden: Tensor) -> Tensor:
    """The dense causal map of one layer, from its projections, rotations and temperatures."""
    from regard.nn.rotary import rotate

    tokens, places = hidden.shape[1], torch.arange(hidden.shape[1])
    query, key = (
        rotate(project(hidden).unflatten(-1, (attention.heads, -1)).transpose(1, 2), places)
        for project in (attention.q_proj, attention.k_proj)
    )
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    scores = scores / attention.temperature[:, :tokens, None]
    return scores.masked_fill(places > places[:, None], -math.inf).softmax(-1)
