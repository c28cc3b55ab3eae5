"""How much each head matters: what changes when it is pruned, and what is left when it is the only one in its layer.

Pruning sets a head's output before the output projection to zero (or to its mean over images); the projection's bias stays.
With p = softmax(logits), y the label and c the embedding that the classifier reads, for each image:

* `probability`: p_y(x) - p_y(x | pruned);
* `divergence`: Jensen-Shannon divergence of p(x) and p(x | pruned), in nats, at most ln 2;
* `embedding`: 1 - cosine of c(x) and c(x | pruned);
* `accuracy`: right before minus right after.

A head's score is the mean over images. Source: Li et al. 2023, arXiv 2303.13731 (the formulas are our reading of its abstract).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from regard._errors import InputError
from regard.attach import attach
from regard.coordinates import Head
from regard.engine import AttentionCall, Method
from regard.instruments.results import HeadMeasure, SiteKey

METRICS = {
    "probability": ("share", "mean fall of the probability of the right class when pruned"),
    "divergence": ("nats", "mean Jensen-Shannon divergence of the predictions when pruned"),
    "embedding": ("1 - cosine", "mean cosine distance of the classifier's input when pruned"),
    "accuracy": ("share", "fall of accuracy when pruned"),
}


class Prune(Method):
    """Sets the outputs of some heads to zero, or to `means[stack, layer]` `[heads, dim]`. Costs one copy of the outputs."""

    def __init__(
        self, heads: Iterable[Head], means: Mapping[SiteKey, Tensor] | None = None
    ) -> None:
        self.by_site: dict[SiteKey, list[int]] = {}
        for head in heads:
            self.by_site.setdefault(head.key, []).append(head.head)
        self.means = means

    def heads(
        self, call: AttentionCall, output: Float[Tensor, "batch heads queries dim"]
    ) -> Float[Tensor, "batch heads queries dim"] | None:
        chosen = self.by_site.get(call.site.key)
        if not chosen:
            return None
        output = output.clone()
        if self.means is None:
            output[:, chosen] = 0
        else:
            output[:, chosen] = self.means[call.site.key][chosen][None, :, None].to(output)
        return output


class MeanOutput(Method):
    """The mean output of every head over tokens and images: what mean-ablation puts in its place."""

    def __init__(self) -> None:
        self.total: dict[SiteKey, Tensor] = {}
        self.rows = 0

    def heads(self, call: AttentionCall, output: Float[Tensor, "batch heads queries dim"]) -> None:
        key, part = call.site.key, output.double().sum((0, 2))
        self.total[key] = self.total.get(key, torch.zeros_like(part)) + part
        self.rows += output.shape[0] * output.shape[2] if key == next(iter(self.total)) else 0

    def compute(self) -> dict[SiteKey, Float[Tensor, "heads dim"]]:
        return {key: (total / self.rows).float() for key, total in self.total.items()}


@dataclass
class Predictions:
    """What a classifier says about some images: `[images, classes]` and what its last layer reads, `[images, dim]`."""

    logits: Float[Tensor, "images classes"]
    embedding: Float[Tensor, "images dim"]

    def right(self, labels: Int[Tensor, " images"]) -> Float[Tensor, " images"]:
        return (self.logits.argmax(-1) == labels).float()


@torch.no_grad()
def predict(
    model: Any, images: Float[Tensor, "images ..."], *methods: Method, batch: int = 128
) -> Predictions:
    """Runs an image classifier of transformers (`model.classifier` is its last layer) with methods attached."""
    last = getattr(model, "classifier", None)
    if not isinstance(last, torch.nn.Module):
        raise InputError(
            f"head importance needs an image classifier with a `classifier` layer, got {type(model).__name__}"
        )
    read: list[Tensor] = []
    handle = last.register_forward_pre_hook(lambda module, args: read.append(args[0].flatten(1)))
    try:
        with attach(model, *methods):
            parts = [model(pixel_values=part).logits for part in images.split(batch)]
    finally:
        handle.remove()
    return Predictions(torch.cat(parts), torch.cat(read))


def js_divergence(
    p: Float[Tensor, "*batch classes"], q: Float[Tensor, "*batch classes"]
) -> Float[Tensor, "*batch"]:
    """Jensen-Shannon divergence of two distributions in nats.

    >>> js_divergence(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]))  # ln 2
    tensor(0.6931)
    """
    mixed = (p + q) / 2
    entropy = torch.special.entr(mixed).sum(-1)
    return (entropy - (torch.special.entr(p) + torch.special.entr(q)).sum(-1) / 2).clamp_min(0)


def changes(
    before: Predictions, after: Predictions, labels: Int[Tensor, " images"]
) -> dict[str, Float[Tensor, " images"]]:
    """Every metric for every image."""
    p, q = (found.logits.double().softmax(-1) for found in (before, after))
    at = labels[:, None]
    cosine = torch.nn.functional.cosine_similarity(before.embedding, after.embedding, dim=-1)
    return {
        "probability": (p.gather(1, at) - q.gather(1, at))[:, 0].float(),
        "divergence": js_divergence(p, q).float(),
        "embedding": 1 - cosine,
        "accuracy": before.right(labels) - after.right(labels),
    }


@dataclass
class Importance:
    """Importance of every head by every metric.

    Attributes:
        images: `[heads, images]` for each metric and site.
        accuracy: of the whole model on these images.
    """

    images: dict[str, dict[SiteKey, Tensor]]
    accuracy: float

    def measure(self, metric: str) -> HeadMeasure:
        """The mean over images of one metric, by head."""
        if metric not in METRICS:
            raise InputError.of("metric", given=metric, expected=f"one of {', '.join(METRICS)}")
        unit, definition = METRICS[metric]
        table = self.images[metric]
        return HeadMeasure(metric, unit, {k: v.mean(-1) for k, v in table.items()}, {}, definition)

    def measures(self) -> dict[str, HeadMeasure]:
        return {metric: self.measure(metric) for metric in self.images}

    def order(self, metric: str) -> list[Head]:
        """Heads from the least to the most important."""
        return [head for head, _ in sorted(self.measure(metric).items(), key=lambda pair: pair[1])]

    def to_frame(self) -> Any:
        """Columns `stack, layer, head, measure, value, error` for all metrics (needs the `frames` extra)."""
        import polars

        return polars.concat([measure.to_frame() for measure in self.measures().values()])


def head_importance(
    model: Any,
    images: Float[Tensor, "images ..."],
    labels: Int[Tensor, " images"],
    *,
    mean: bool = False,
    alone: bool = False,
    batch: int = 128,
) -> Importance:
    """Prunes each head in turn and measures what changes.

    Args:
        model: an image classifier of transformers.
        images: `[images, channels, height, width]`.
        labels: the right classes.
        mean: replace a head's output by its mean over these images instead of zero.
        alone: prune all *other* heads of the layer instead (leave-one-in): what the layer loses when only this head is left.
        batch: images in a forward pass.

    Cost: one forward pass over the images for each head, and one more.
    """
    sums = MeanOutput()
    before = predict(model, images, sums, batch=batch)
    means = sums.compute()
    found: dict[str, dict[SiteKey, list[Tensor]]] = {metric: {} for metric in METRICS}
    for (stack, layer), table in means.items():
        for head in range(len(table)):
            others = [other for other in range(len(table)) if (other == head) != alone]
            prune = Prune((Head(layer, h, stack) for h in others), means if mean else None)
            after = predict(model, images, prune, batch=batch)
            for metric, change in changes(before, after, labels).items():
                found[metric].setdefault((stack, layer), []).append(change)
    stacked = {m: {k: torch.stack(v) for k, v in table.items()} for m, table in found.items()}
    return Importance(stacked, float(before.right(labels).mean()))


def pruning_curve(
    model: Any,
    images: Float[Tensor, "images ..."],
    labels: Int[Tensor, " images"],
    order: Sequence[Head],
    *,
    sizes: Sequence[int] | None = None,
    batch: int = 128,
) -> Float[Tensor, " sizes"]:
    """Accuracy after pruning the first n heads of `order`, for each n in `sizes` (by default 0 .. all).

    Cost: a forward pass over the images for each size.
    """
    sizes = range(len(order) + 1) if sizes is None else sizes
    curve = [
        float(predict(model, images, Prune(order[:n]), batch=batch).right(labels).mean())
        for n in sizes
    ]
    return torch.tensor(curve)


def area(curve: Float[Tensor, " sizes"], sizes: Sequence[int] | None = None) -> float:
    """Area under a pruning curve by trapezoids, over the share of heads pruned; 1 when nothing is ever lost.

    >>> area(torch.tensor([1.0, 0.5, 0.0]))
    0.5
    """
    x = torch.arange(len(curve)) if sizes is None else torch.tensor(list(sizes))
    return float(torch.trapezoid(curve, x.float()) / (x[-1] - x[0]))
