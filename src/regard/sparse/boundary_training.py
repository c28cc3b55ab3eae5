"""Trains the boundary predictor of a model from the model's own attention.

    python -m regard.sparse.boundary_training boundaries.safetensors          # for the embedded SmolLM2, some minutes

Each text gives, for some layers, the keys of the layer (what the predictor sees) and R of its dense attention (what it must
find). Layer 0 is always among them, since its keys are the ones that are read in use; the paper takes every layer.
Source: arXiv 2510.24606 (focal loss, Adam); it trains on thousands of texts at a rate of 1e-4 for two epochs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from regard._errors import InputError
from regard._progress import track
from regard.attach import attach
from regard.engine import AttentionCall, Method
from regard.nn.boundary_predictor import (
    BoundaryPredictor,
    boundary_targets,
    focal_loss,
    inner_gaps,
)
from regard.sparse._teacher import attention_boundaries, shared_keys


@dataclass(frozen=True)
class Lesson:
    """One layer's reading of one text: keys (float16, to be kept by the hundred) and R of every gap."""

    layer: int
    keys: Float[Tensor, "length channels"]
    ratio: Float64[Tensor, " length"]


class _Teacher(Method):
    reads_only = True

    def __init__(self, layers: set[int], window: int) -> None:
        self.layers, self.window = layers, window
        self.lessons: list[Lesson] = []

    def before(self, call: AttentionCall) -> None:
        if call.site.layer in self.layers and call.site.causal:
            ratio = attention_boundaries(call, self.window)[0]
            self.lessons.append(Lesson(call.site.layer, shared_keys(call.key[0]).half(), ratio))


@torch.no_grad()
def lessons(
    model: Any, ids: Int[Tensor, " length"], layers: Sequence[int], window: int = 4
) -> list[Lesson]:
    """Keys and boundary ratios of some layers for one text; the cost of one forward pass."""
    teacher = _Teacher(set(layers), window)
    with attach(model, teacher):
        model(ids[None].to(next(model.parameters()).device), use_cache=False)
    if not teacher.lessons:
        raise InputError(
            f"none of the layers {sorted(layers)} attends causally in {type(model).__name__}; choose others"
        )
    return teacher.lessons


def collect(
    model: Any,
    texts: Sequence[Int[Tensor, " length"]],
    *,
    layers: int = 6,
    window: int = 4,
    seed: int = 0,
) -> list[list[Lesson]]:
    """The lessons of every text: of layer 0 and of `layers - 1` others, drawn anew for each text.

    Raises:
        InputError: no text, or one too short to have a gap to learn from.

    Cost: one forward pass a text; memory `texts x layers x length x channels` halves.
    """
    short = [len(ids) for ids in texts if not bool(inner_gaps(len(ids), window).any())]
    if not texts or short:
        raise InputError.of(
            "texts",
            given=short or "none",
            expected=f"one or more, of at least {4 * window} tokens each",
        )
    generator = torch.Generator().manual_seed(seed)
    depth = model.config.get_text_config().num_hidden_layers
    held = []
    for ids in track(texts, "reading the model's attention"):
        others = (torch.randperm(depth - 1, generator=generator) + 1)[: layers - 1].tolist()
        held.append(lessons(model, ids, [0, *others], window))
    return held


def fit(
    held: Sequence[Sequence[Lesson]],
    *,
    epochs: int = 2,
    rate: float = 1e-4,
    window: int = 4,
    heads: int = 4,
    seed: int = 0,
) -> BoundaryPredictor:
    """A predictor trained on lessons: one step of Adam a text, on the sum of its layers' losses; the texts in random order."""
    torch.manual_seed(seed)
    predictor = BoundaryPredictor(held[0][0].keys.shape[1], window, heads)
    optimizer = torch.optim.Adam(predictor.parameters(), lr=rate)
    order = [i for _ in range(epochs) for i in torch.randperm(len(held)).tolist()]
    for i in track(order, "training the boundary predictor"):
        optimizer.zero_grad()
        for lesson in held[i]:
            logits = predictor(lesson.keys.float()[None])[0]
            counted = inner_gaps(len(logits), window)
            focal_loss(logits, boundary_targets(lesson.ratio), counted).backward()
        optimizer.step()
    return predictor.eval()


def train_boundary_predictor(
    model: Any,
    texts: Sequence[Int[Tensor, " length"]],
    *,
    layers: int = 6,
    epochs: int = 2,
    rate: float = 1e-4,
    window: int = 4,
    seed: int = 0,
) -> BoundaryPredictor:
    """A boundary predictor for `model`: `collect`, then `fit`.

    Args:
        texts: token ids, each of 4 x window tokens or more (512 to 8192 in the paper).
        layers: layers read for each text.
        epochs: passes over all lessons.
        rate: Adam's learning rate.
    """
    held = collect(model, texts, layers=layers, window=window, seed=seed)
    return fit(held, epochs=epochs, rate=rate, window=window, seed=seed)


def smollm2_texts(tokenizer: Any, count: int, seed: int = 0) -> list[Int[Tensor, " length"]]:
    """Texts of 512, 768 and 1024 tokens: three fifths from Python's reference, the rest programs.

    Only the first 60,000 tokens of the reference and the first 250,000 characters of code are used; what follows is free for
    evaluation.
    """
    from regard import texts

    reference = tokenizer(texts.default_text(tokenizer, 60_000), return_tensors="pt").input_ids[0]
    code = tokenizer(texts.code(250_000, seed=1), return_tensors="pt").input_ids[0]
    generator = torch.Generator().manual_seed(seed)
    found, places = [], [0, 0]
    for i in range(count):
        which = int(i % 5 >= 3)
        stream = (reference, code)[which]
        length = 512 + 256 * int(torch.randint(3, (), generator=generator))
        if places[which] + length > len(stream):
            places[which] = 0
        found.append(stream[places[which] : places[which] + length])
        places[which] += length
    return found


def _main(out: Path) -> None:
    import regard
    from regard.sparse.dhsa import save_predictor

    model = regard.load("smollm2")
    texts = smollm2_texts(model.tokenizer, 60)
    predictor = train_boundary_predictor(model, texts, epochs=2, rate=3e-3)
    save_predictor(predictor, out, model="SmolLM2-135M-Instruct")


if __name__ == "__main__":
    import argparse

    parser = argparse.ArgumentParser(description="Train SmolLM2's boundary predictor.")
    parser.add_argument("out", type=Path, help="the safetensors file to write")
    _main(parser.parse_args().out)
