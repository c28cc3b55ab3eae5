"""Training and measuring the variants of "Deconstructing Attention": losses, the skip test, score ranges, and maps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from regard.attach import attach
from regard.engine import Block, Method
from regard.labs.tasks import characters
from regard.labs.training import train
from regard.nn import LanguageModelConfig
from regard.nn.deconstructed import SelfGatedAttention
from regard.nn.deconstructed_model import DeconstructedLanguageModel, replaced, without_layers
from regard.ops.position_softmax import position_softmax, self_gate
from regard.ops.taylor_attention import taylor_attention

KINDS = ("no_mixing", "taylor", "self_gated", "random_qk", "fixed_text_qk", "static_qk")


@dataclass(frozen=True)
class Setting:
    """One training run on windows of `length` characters."""

    length: int = 64
    layers: int = 2
    width: int = 64
    heads: int = 4
    steps: int = 250
    batch: int = 16
    rate: float = 5e-3
    windows: int = 64


def build(kind: str, placement: str, setting: Setting) -> DeconstructedLanguageModel:
    """`kind` in the layers that the placement does not keep; the fixed text is the first of those trained on."""
    mixers = ["softmax"] if kind == "standard" else replaced(kind, setting.layers, placement)
    config = LanguageModelConfig(
        vocab_size=256,
        hidden_size=setting.width,
        num_hidden_layers=setting.layers,
        num_attention_heads=setting.heads,
        mixers=mixers,
        max_position_embeddings=setting.length,
        fixed_text=characters(setting.length).draw(1, 0).ids[0].tolist(),
    )
    return DeconstructedLanguageModel(config)


def trained(kind: str, placement: str, setting: Setting, seed: int) -> dict[str, Any]:
    """Held-out nats of every window, of a short context, without the replaced layers; and what the maps and scores are like."""
    torch.manual_seed(seed)
    task = characters(setting.length)
    model = build(kind, placement, setting)
    training = train(model, task, setting.steps, batch=setting.batch, rate=setting.rate, seed=seed)
    ids = task.draw(setting.windows, 10**6, held_out=True).ids
    found: dict[str, Any] = {
        "losses": training.losses,
        "nats": nats(model, ids).mean(1).tolist(),
        "by position": nats(model, ids).mean(0).tolist(),
        "short": short_context(model, ids),
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    if placement != "uniform" and kind != "standard":
        names = replaced(kind, setting.layers, placement)
        gone = [i for i, name in enumerate(names) if name == kind]
        found["skipped"] = float(nats(without_layers(model, gone), ids).mean())
    if kind == "self_gated":
        found["scores"] = score_ranges(model, ids[:8])
    if kind in ("standard", "static_qk", "random_qk", "fixed_text_qk"):
        found["indicators"] = indicators_of(model, ids[:8])
    return found


@torch.no_grad()
def nats(model: nn.Module, ids: Tensor) -> Float[Tensor, "windows next"]:
    """The loss at every character."""
    rows = []
    for part in ids.split(16):
        logits = model(part, use_cache=False).logits[:, :-1]
        rows.append(cross_entropy(logits.transpose(1, 2), part[:, 1:], reduction="none"))
    return torch.cat(rows)


def short_context(model: nn.Module, ids: Tensor, last: int = 8) -> dict[str, float]:
    """Mean nats of the last characters of each window, with all that stands before and with `2 * last` characters."""
    whole = nats(model, ids)[:, -last:].mean()
    return {
        "whole": float(whole),
        "short": float(nats(model, ids[:, -2 * last - 1 :])[:, -last:].mean()),
    }


@torch.no_grad()
def score_ranges(model: nn.Module, ids: Tensor) -> list[float]:
    """The largest absolute score of each self-gated layer, before the softmax."""
    found: list[float] = []

    def note(mixer: SelfGatedAttention, given: tuple[Tensor]) -> None:
        found.append(float(self_gate(*mixer.query_key_of(given[0])).abs().max()))

    mixers = [m for m in model.modules() if isinstance(m, SelfGatedAttention)]
    handles = [mixer.register_forward_pre_hook(note) for mixer in mixers]
    model(ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return found


class Maps(Method):
    """Whole attention maps by layer, of short texts."""

    reads_only = True

    def __init__(self) -> None:
        self.seen: dict[int, Tensor] = {}

    def weights(self, block: Block) -> None:
        held = self.seen.setdefault(
            block.site.layer,
            block.weights.new_zeros(*block.weights.shape[:2], block.call.queries, block.call.keys),
        )
        held[:, :, block.rows, block.keys] = block.weights


@torch.no_grad()
def indicators_of(model: nn.Module, ids: Tensor) -> list[dict[str, float]]:
    """The indicators of every layer with a softmax over keys."""
    model(ids, use_cache=False)  # a second stream runs here once, unseen
    reader = Maps()
    with attach(model, reader):
        model(ids, use_cache=False)
    return [attention_indicators(reader.seen[layer]) for layer in sorted(reader.seen)]


def attention_indicators(maps: Float[Tensor, "batch heads tokens tokens"]) -> dict[str, float]:
    """Eight numbers of a layer's causal maps, means over batch and heads.

    Entropy is the mean over rows (the source prints the sum over the map), concentration the Frobenius norm, diversity the
    standard deviation over heads averaged over the pairs j <= i, sink the mean weight of the first key, local focus N the mean
    of the N-th diagonal below the main one.
    """
    tokens = maps.shape[-1]
    earlier = torch.ones(tokens, tokens, dtype=torch.bool, device=maps.device).tril()
    found = {
        "entropy": torch.special.entr(maps).sum(-1).mean(),
        "concentration": maps.square().sum((-1, -2)).sqrt().mean(),
        "diversity": maps.std(1, correction=0)[:, earlier].mean(),
        "sink": maps[..., 0].mean(),
    }
    for apart in range(min(4, tokens)):
        diagonal = maps.diagonal(-apart, dim1=-2, dim2=-1)
        found[f"local focus {apart}"] = diagonal.mean()
    return {name: float(value) for name, value in found.items()}


def deviation() -> float:
    """The largest difference of the variants from what they must equal, in float64."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(
        3, 2, 2, 50, 8, generator=generator, dtype=torch.float64
    ).unbind()
    hidden = torch.ones(50, 50, dtype=torch.bool).triu(1)
    products = query @ key.mT / 8**0.5
    weights = (1 + products + products**2 / 2).tril()
    series = weights / weights.sum(-1, keepdim=True) @ value
    worst = float((taylor_attention(query, key, value, chunk=7)[0] - series).abs().max())
    gate = self_gate(query, key)
    rows = gate[..., None, :].expand(*gate.shape, 50).masked_fill(hidden, -torch.inf)
    gated = position_softmax(gate, value)[0] - rows.softmax(-1) @ value
    worst = max(worst, float(gated.abs().max()))
    torch.manual_seed(0)
    model = (
        build("fixed_text_qk", "uniform", Setting(length=32, layers=2, width=32, heads=2))
        .double()
        .eval()
    )
    plain = (
        build("standard", "uniform", Setting(length=32, layers=2, width=32, heads=2))
        .double()
        .eval()
    )
    plain.load_state_dict({n: t for n, t in model.state_dict().items() if n != "text"})
    with torch.no_grad():  # the fixed text as input: its maps are those of ordinary attention
        change = model(model.text[None]).logits - plain(model.text[None]).logits
    return max(worst, float(change.abs().max()))


def perplexity(found: dict[str, Any]) -> float:
    return math.exp(sum(found["nats"]) / len(found["nats"]))
