"""Measurements of the entropy-collapse experiment: the bound, SmolLM2's heads against it, and small vision transformers."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from regard import attach
from regard.engine import Block, Method
from regard.ops import attention_entropy, entropy_lower_bound, extremal_scores, score_norm
from regard.texts import prose
from regard.weights import convert_sigma_reparam

TOKENS, CLASSES = 16, 10
UNIFORM = math.log(TOKENS)
EVERY = 4
"""Steps from one measurement of entropy to the next."""


def bound_numbers(draws: int) -> dict[str, Any]:
    """Random score rows against the bound, the extremal rows against it, and its decay."""
    worst, below, total = 0.0, 0, 0
    for keys in (8, 64, 512):
        for size in (0.5, 2.0, 6.0, 12.0):
            norm = torch.tensor(size, dtype=torch.float64)
            bound = float(entropy_lower_bound(norm, keys))
            reached = float(_entropy(extremal_scores(norm, keys)))
            worst = max(worst, abs(reached - bound))
            rows = torch.randn(draws, keys, dtype=torch.float64)
            rows[: draws // 2] = rows[: draws // 2].pow(7)
            rows = size * rows / rows.norm(dim=-1, keepdim=True)
            below += int((_entropy(rows) < bound - 1e-9).sum())
            total += draws
    far = torch.tensor([40.0, 60.0], dtype=torch.float64)
    logs = (entropy_lower_bound(far, 64) / (64 * far)).log()
    return {
        "below": below,
        "rows": total,
        "gap": worst,
        "slope": float((logs[1] - logs[0]) / 20) / math.sqrt(64 / 63),
    }


def _entropy(scores: Float[Tensor, "*rows keys"]) -> Float[Tensor, "*rows"]:
    logs = scores.log_softmax(-1)
    return -(logs.exp() * logs).sum(-1)


def update_norms(widths: list[int], draws: int) -> dict[str, Any]:
    """Spectral norms of ideal Adam updates E[g] / sqrt(E[g^2]) of random mean and noise, against proposition 3.2."""
    below, norms = 0, {}
    for width in widths:
        found = []
        for _ in range(draws):
            mean = torch.randn(width, width, dtype=torch.float64)
            noise = torch.randn(width, width, dtype=torch.float64).exp()
            update = mean / (mean.square() + noise.square()).sqrt()
            share = (noise.square() / (mean.square() + noise.square())).mean()
            norm = float(torch.linalg.matrix_norm(update, 2))
            below += norm < math.sqrt(width) * math.sqrt(1 - float(share)) - 1e-9
            found.append(norm)
        norms[str(width)] = sum(found) / draws
    ends = (widths[0], widths[-1])
    growth = math.log(norms[str(ends[1])] / norms[str(ends[0])]) / math.log(ends[1] / ends[0])
    return {"below": below, "matrices": draws * len(widths), "norms": norms, "exponent": growth}


class _Rows(Method):
    """Every row of every head: its entropy, the norm of its centred scores, and its share on the first key, in float64."""

    reads_only = True

    def __init__(self) -> None:
        self.found: dict[int, list[tuple[Tensor, Tensor, Tensor]]] = {}

    def weights(self, block: Block) -> None:
        rows, keys = block.rows, torch.arange(block.call.keys)[block.keys]
        visible = keys <= rows[:, None]
        scores = block.scores.double().where(visible, -math.inf)
        logs = scores.log_softmax(-1)
        weights = logs.exp()
        entropy = -(weights * logs.where(visible, 0.0)).sum(-1)
        mean = scores.where(visible, 0.0).sum(-1, keepdim=True) / visible.sum(-1, keepdim=True)
        norm = (scores - mean).where(visible, 0.0).norm(dim=-1)
        self.found.setdefault(block.site.layer, []).append((entropy, norm, weights[..., 0]))


@torch.no_grad()
def pretrained_numbers(model: Any, tokens: int, texts: int) -> dict[str, Any]:
    """Entropies of SmolLM2's rows against the bounds from each row's own scores and from the weights and the input."""
    ids = torch.tensor(model.tokenizer(prose(8 * tokens * texts))["input_ids"])
    windows = ids[: tokens * texts].view(texts, tokens)
    reader, inputs, hooks = _Rows(), {}, []
    layers = model.model.layers
    for index, layer in enumerate(layers):
        hooks.append(
            layer.self_attn.register_forward_pre_hook(
                lambda module, args, kwargs, i=index: inputs.__setitem__(
                    i, kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
                ),
                with_kwargs=True,
            )
        )
    with attach(model, reader):
        model(input_ids=windows)
    for hook in hooks:
        hook.remove()
    counts = torch.arange(1, tokens + 1)
    below = {"own": 0, "rotary": 0, "paper": 0}
    heads: dict[str, list[float]] = {name: [] for name in ("entropy", "norm", "sink", "weights")}
    gaps, bounds, rows = [], [], 0
    for index, layer in enumerate(layers):
        attention = layer.self_attn
        entropy, norm, first = (
            torch.cat(part, -1) for part in zip(*reader.found[index], strict=True)
        )
        count = entropy.shape[1]
        group = count // (attention.k_proj.weight.shape[0] // attention.head_dim)
        queries = attention.q_proj.weight.double().unflatten(0, (count, -1))
        keys = attention.k_proj.weight.double().unflatten(0, (count // group, -1))
        hidden = inputs[index].double()
        own = entropy_lower_bound(norm, counts)
        below["own"] += int((entropy < own - 1e-9).sum())
        gaps.append((entropy - own)[..., 1:].flatten())
        rows += entropy.numel()
        for head in range(count):
            parts = queries[head], keys[head // group], hidden
            for name in ("rotary", "paper"):
                size = score_norm(*parts, scaling=attention.scaling, rotary=name == "rotary")
                bound = entropy_lower_bound(size[:, None], counts)
                below[name] += int((entropy[:, head] < bound - 1e-9).sum())
                if name == "rotary":
                    bounds.append(bound[:, 1:].flatten())
                    heads["weights"].append(float(size.mean()))
            heads["entropy"].append(float(entropy[:, head].mean()))
            heads["norm"].append(float(norm[:, head].mean()))
            heads["sink"].append(float(first[:, head, 1:].mean()))
    return {
        "below": below,
        "rows": rows,
        "heads": heads,
        "gap": float(torch.cat(gaps).median()),
        "largest bound from weights": float(torch.cat(bounds).max()),
        "median entropy": sorted(heads["entropy"])[len(heads["entropy"]) // 2],
    }


def rank_correlation(left: list[float], right: list[float]) -> float:
    from scipy.stats import spearmanr

    return float(spearmanr(left, right)[0])  # type: ignore[arg-type]


@dataclass(frozen=True)
class Arm:
    """How a vision transformer is made: with layer norms or without, reparametrised or not."""

    norms: bool
    sigma: bool


ARMS = {
    "pre-LN": Arm(norms=True, sigma=False),
    "pre-LN + sigmaReparam": Arm(norms=True, sigma=True),
    "no LN": Arm(norms=False, sigma=False),
    "no LN + sigmaReparam": Arm(norms=False, sigma=True),
}
SPREAD = 0.1
"""Of the truncated normal that weights start from, in all arms: pre-LN learns faster from it than from 0.02, and sigmaReparam
turns smaller weights too fast to learn (an update turns W by about rate / ||W||)."""


@dataclass(frozen=True)
class Scale:
    """Sizes of the training runs."""

    steps: int
    layers: int = 4
    width: int = 64
    heads: int = 4
    batch: int = 32


class Layer(nn.Module):
    """A pre-norm block with bidirectional attention that remembers the mean entropy of its rows."""

    def __init__(self, width: int, heads: int, norms: bool) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = (nn.LayerNorm(width) if norms else nn.Identity() for _ in range(2))
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            nn.Linear(width, width) for _ in range(4)
        )
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.entropy, self.measure = 0.0, True

    def forward(self, hidden: Tensor) -> Tensor:
        inner = self.norm1(hidden)
        query, key, value = (
            project(inner).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        weights = (query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5).softmax(-1)
        if self.measure:
            self.entropy = float(attention_entropy(weights.detach()).mean())
        hidden = hidden + self.o_proj((weights @ value).transpose(1, 2).flatten(2))
        return hidden + self.down(functional.gelu(self.up(self.norm2(hidden))))


class VisionTransformer(nn.Module):
    """8x8 images as 16 patches of 2x2, a few layers, mean pooling."""

    def __init__(self, scale: Scale, arm: Arm) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, scale.width, 2, stride=2)
        self.positions = nn.Parameter(0.02 * torch.randn(TOKENS, scale.width))
        self.layers = nn.ModuleList(
            Layer(scale.width, scale.heads, arm.norms) for _ in range(scale.layers)
        )
        self.norm = nn.LayerNorm(scale.width) if arm.norms else nn.Identity()
        self.head = nn.Linear(scale.width, CLASSES)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.trunc_normal_(module.weight, std=SPREAD)
                assert module.bias is not None
                nn.init.zeros_(module.bias)
        if arm.sigma:
            convert_sigma_reparam(self, gamma="one")

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.patches(images).flatten(2).transpose(1, 2) + self.positions
        for layer in self.layers:
            hidden = layer(hidden)
        return self.head(self.norm(hidden).mean(1))

    def lowest_entropy(self) -> float:
        """Of the layers, in the last pass."""
        return min(layer.entropy for layer in self.layers)  # type: ignore[type-var,return-value]


def digits(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The 1797 digits of scikit-learn, 8x8 in [-1, 1], in a seeded order: images and labels to train on and held out."""
    from sklearn.datasets import load_digits

    data: Any = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    labels = torch.tensor(data.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    train, held = order[:1437], order[1437:]
    return images[train], labels[train], images[held], labels[held]


def train_digits(
    name: str, rate: float, seed: int, scale: Scale, *, hot: float = 1.0
) -> dict[str, Any]:
    """AdamW at one rate, no warm-up, no decay; `hot` multiplies the rate of the query and key projections."""
    torch.manual_seed(seed)
    images, labels, held, answers = digits(seed)
    model = VisionTransformer(scale, ARMS[name])
    heated = [p for n, p in model.named_parameters() if "q_proj" in n or "k_proj" in n]
    rest = [p for n, p in model.named_parameters() if "q_proj" not in n and "k_proj" not in n]
    groups = [{"params": heated, "lr": rate * hot}, {"params": rest, "lr": rate}]
    optimiser = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
    generator = torch.Generator().manual_seed(seed)
    losses, entropies, start = [], [], time.process_time()
    for step in range(scale.steps):
        measured = step % EVERY == 0
        for layer in model.layers:
            layer.measure = measured  # type: ignore[assignment]
        chosen = torch.randint(len(images), (scale.batch,), generator=generator)
        loss = functional.cross_entropy(model(images[chosen]), labels[chosen])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
        if measured:
            entropies.append(model.lowest_entropy())
    seconds = time.process_time() - start
    with torch.no_grad():
        right = (model.eval()(held).argmax(-1) == answers).float().mean()
    finite = [value if math.isfinite(value) else 1e3 for value in losses]
    lowest, spike = finite[0], 0.0
    for value in finite:
        spike = max(spike, value - lowest)
        lowest = min(lowest, value)
    return {
        "accuracy": float(right),
        "entropy": [value if math.isfinite(value) else 0.0 for value in entropies],
        "loss": finite,
        "spike": spike,
        "seconds": seconds / scale.steps,
    }
