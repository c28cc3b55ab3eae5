"""Measurements of the DHSA experiment: boundaries found, attention mass caught, loss and needles, by the way keys are chosen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from regard.attach import attach
from regard.engine import AttentionCall, Block, Method, blockwise
from regard.nn.boundary_predictor import BoundaryPredictor, boundary_targets, inner_gaps
from regard.ops.chunks import chunk_mean, chunk_representation, equal_cuts
from regard.sparse._teacher import attention_boundaries, shared_keys
from regard.sparse.dhsa import DHSA, boundary_cuts
from regard.sparse.hierarchical import FixedChunks, HierarchicalSparse, block_scores, select_tokens

if TYPE_CHECKING:
    from regard.texts import NeedlePrompt

BLOCK, EDGE, INSTRUCTION = 64, 32, 32
"""Queries in a block; tokens kept at either end (local and global); last queries that attend densely."""
READ = (0, 5, 10, 20, 29)
"""Layers on whose keys the predictor is judged."""


def held_out(tokenizer: Any, length: int, count: int) -> list[Tensor]:
    """Token ids that the predictor was not trained on: half from Python's reference, half programs."""
    from regard import texts

    reference = tokenizer(texts.default_text(tokenizer, 84_000), return_tensors="pt").input_ids[0]
    code = tokenizer(texts.code(380_000, seed=1)[260_000:], return_tensors="pt").input_ids[0]
    found = []
    for i in range(count):
        stream, start = ((reference, 61_000), (code, 0))[i % 2]
        first = start + (i // 2) * 2_500
        found.append(stream[first : first + length])
    return found


def cuts_of(scores: Tensor, threshold: float = -float("inf")) -> Tensor:
    """Cuts from scores of the gaps, as DHSA makes them at this scale."""
    return boundary_cuts(scores, block=BLOCK, instruction=INSTRUCTION, threshold=threshold)


class Mass(Method):
    """What each block of queries pays to every key, mean over heads and queries, of one call."""

    reads_only = True

    def __init__(self, call: AttentionCall) -> None:
        self.paid = torch.zeros(-(-call.queries // BLOCK), call.keys)
        rows = torch.arange(call.queries)
        blockwise.attend(call, (), (self,), rows=rows)

    def weights(self, block: Block) -> None:
        mean = block.weights[0].mean(0) / BLOCK
        self.paid[:, block.keys].index_add_(0, block.rows // BLOCK, mean)


class Study(Method):
    """Reads one text in a dense forward pass: boundaries at some layers, mass captured at all.

    Attributes:
        found: for each layer of `READ`, how well the predictor's logits find the gaps with R >= 2.
        recall: for each way to choose and each budget, the mean share of attention mass over layers and query blocks.
        chunks: the mean number of chunks of each way to cut.
    """

    reads_only = True

    def __init__(
        self, predictor: BoundaryPredictor, ids: Tensor, breaks: Tensor, shares: Sequence[float]
    ) -> None:
        self.predictor, self.breaks, self.shares = predictor, breaks, shares
        self.length = len(ids)
        self.found: dict[int, dict[str, float]] = {}
        self.recall: dict[str, dict[float, list[float]]] = {}
        self.chunks: dict[str, list[int]] = {}
        self.cuts: dict[str, Tensor] = {}
        self.related: list[float] = []

    def before(self, call: AttentionCall) -> None:
        layer, length = call.site.layer, self.length
        ratio = attention_boundaries(call)[0]
        logits = None
        if layer in READ:
            logits = self.predictor(shared_keys(call.key[0])[None])[0]
            self.found[layer] = agreement(logits, ratio, self.breaks)
        if layer == 0 and logits is not None:
            self.first = ratio
            predicted = cuts_of(logits)
            generator = torch.Generator().manual_seed(length)
            order = torch.randperm(len(predicted) - 1, generator=generator)
            size = round(length / (len(predicted) - 1))
            self.cuts = {
                "predicted": predicted,
                "teacher, layer 0": cuts_of(ratio),
                "shuffled": torch.cat([predicted[:1], predicted.diff()[order].cumsum(0)]),
                "fixed 8": equal_cuts(length, BLOCK // 8),
                "fixed, as many": equal_cuts(length, size),
                "tokens": torch.arange(length + 1),
            }
        else:
            inner = inner_gaps(length)
            both = torch.stack([self.first[inner], ratio[inner]])
            self.related.append(float(both.argsort(1).argsort(1).double().corrcoef()[0, 1]))
        self._measure(call, {**self.cuts, "teacher, own layer": cuts_of(ratio)})

    def _measure(self, call: AttentionCall, cuts: dict[str, Tensor]) -> None:
        mass, length = Mass(call).paid, self.length
        sparse = length - INSTRUCTION
        query, key = call.query[0][:, :sparse], call.key[0]
        scored = {name: block_scores(query, key, ends, BLOCK) for name, ends in cuts.items()}
        for name in ("predicted", "teacher, own layer"):
            scored[f"{name}, no root"] = block_scores(query, key, cuts[name], BLOCK, chunk_mean)
        scored["best possible"] = mass
        scored["window and sinks"] = torch.arange(length).float().expand(len(mass), -1)
        for name, ends in cuts.items():
            self.chunks.setdefault(name, []).append(len(ends) - 1)
        for share in self.shares:
            budget = round(share * length)
            for name, scores in scored.items():
                caught = [
                    float(paid[chosen].sum())
                    for i, paid in enumerate(mass[: sparse // BLOCK])
                    if (i + 1) * BLOCK > budget
                    for chosen in [_chosen(scores[i], (i + 1) * BLOCK, budget)]
                ]
                held = self.recall.setdefault(name, {}).setdefault(share, [])
                held.append(sum(caught) / len(caught))


def _chosen(scores: Tensor, hi: int, budget: int) -> Tensor:
    return select_tokens(scores, 0, hi, budget=budget, local=EDGE, first=EDGE)


def agreement(logits: Tensor, ratio: Tensor, breaks: Tensor) -> dict[str, float]:
    """How well the gaps with R >= 2 are found: by the logits, by breaks in the text, by chance.

    `area` is the area under the ROC curve (0.5 is chance). `f1` takes the n highest logits, n the number of true boundaries;
    `f1 text` the gaps after punctuation; `f1 chance` is what n random gaps give on average, which is their share.
    """
    inner = inner_gaps(len(logits))
    wanted, scores, text = boundary_targets(ratio)[inner], logits[inner], breaks[inner]
    n, count = int(wanted.sum()), len(scores)
    if n in (0, count):
        return {}
    rank = scores.argsort().argsort().double() + 1
    area = (float(rank[wanted].sum()) - n * (n + 1) / 2) / (n * (count - n))
    best = float(wanted[scores.topk(n).indices].float().mean())
    by_text = 2 * int((text & wanted).sum()) / max(int(text.sum()) + n, 1)
    return {"area": area, "f1": best, "f1 text": by_text, "f1 chance": n / count}


def text_breaks(tokenizer: Any, ids: Tensor) -> Tensor:
    """The gaps after a token that ends in punctuation or a line break."""
    pieces = [tokenizer.decode([token]) for token in ids.tolist()]
    return torch.tensor(
        [
            piece.rstrip(" ")[-1:] in tuple(".,;:!?)]}\n") and bool(piece.strip(" "))
            for piece in pieces
        ]
    )


@torch.no_grad()
def study(
    model: Any, predictor: BoundaryPredictor, ids: Tensor, shares: Sequence[float]
) -> dict[str, Any]:
    """`Study` of one text, averaged over layers."""
    seen = Study(predictor, ids, text_breaks(model.tokenizer, ids), shares)
    with attach(model, seen):
        model(ids[None], use_cache=False, logits_to_keep=1)
    return {
        "found": {str(layer): values for layer, values in seen.found.items()},
        "recall": {
            name: {str(share): sum(v) / len(v) for share, v in by.items()}
            for name, by in seen.recall.items()
        },
        "layers": {
            name: seen.recall[name][shares[0]] for name in ("predicted", "fixed 8", "best possible")
        },
        "chunks": {name: sum(v) / len(v) for name, v in seen.chunks.items()},
        "related": sum(seen.related) / len(seen.related),
    }


class TeacherChunks(HierarchicalSparse):
    """Cuts from the dense attention of every layer itself: what no predictor can know before the layer has run."""

    shared = False

    def cuts(self, call: AttentionCall) -> Tensor:
        return cuts_of(attention_boundaries(call)[0])


class PlainMean(DHSA):
    """DHSA without the root of the chunk length."""

    def represent(self, vectors: Tensor, cuts: Tensor) -> Tensor:
        return chunk_mean(vectors, cuts)


def methods(
    predictor: BoundaryPredictor, length: int, share: float, instruction: int = INSTRUCTION
) -> dict[str, Callable[[], Method | None]]:
    """Every way to choose keys, at one budget."""
    budget = round(share * length)
    rest: dict[str, Any] = {
        "budget": budget,
        "block": BLOCK,
        "first": EDGE,
        "instruction": instruction,
    }
    chosen = {**rest, "local": EDGE}
    return {
        "dense": lambda: None,
        "predicted": lambda: DHSA(predictor, threshold=-float("inf"), **chosen),
        "predicted, no root": lambda: PlainMean(predictor, threshold=-float("inf"), **chosen),
        "teacher, own layer": lambda: TeacherChunks(**chosen),
        "fixed 8": lambda: FixedChunks(BLOCK // 8, **chosen),
        # all that is not a sink is the latest: nothing is left to choose
        "window and sinks": lambda: FixedChunks(BLOCK // 8, **rest, local=budget - EDGE),
    }


@torch.no_grad()
def losses(model: Any, ids: Tensor, method: Method | None) -> float:
    """Mean negative log-likelihood, nats per token, of the tokens that sparse queries predict."""
    with attach(model, *([method] if method else [])):
        logits = model(ids[None], use_cache=False).logits[0, : len(ids) - INSTRUCTION]
    return float(torch.nn.functional.cross_entropy(logits.float(), ids[1 : len(logits) + 1]))


@torch.no_grad()
def needles(model: Any, prompts: Sequence[NeedlePrompt], method: Method | None) -> list[float]:
    """Log-probability per answer token with the prompt read under `method` and the answer decoded densely."""
    from regard.instruments.decoding import answer_logprob, prefill

    with attach(model, *([method] if method else [])):
        prefix = prefill(model, [p.ids for p in prompts])
    tokenizer = model.tokenizer
    starts = [
        tokenizer(p.needle.statement, add_special_tokens=False, return_tensors="pt").input_ids[0]
        for p in prompts
    ]
    sentences = [torch.cat([s, p.answer_ids]) for s, p in zip(starts, prompts, strict=True)]
    return answer_logprob(model, prefix, sentences, given=[len(s) for s in starts]).tolist()


@torch.no_grad()
def gap_to_dense(model: Any, predictor: BoundaryPredictor, ids: Tensor) -> float:
    """Largest difference of a logit between DHSA with a budget of everything and the untouched model."""
    plain = model(ids[None], use_cache=False).logits
    method = DHSA(
        predictor, budget=len(ids), block=BLOCK, local=EDGE, first=EDGE, instruction=INSTRUCTION
    )
    with attach(model, method):
        return float((model(ids[None], use_cache=False).logits - plain).abs().max())


def root_on_uneven(seed: int, ratio: int, chunks: int = 64, dim: int = 64) -> dict[str, float]:
    """Planted keys: chunks of length 8 and 8 * `ratio`, one token in each along the query as strongly; which chunks win?

    Returns:
        The share of the chosen half of the chunks' scores that is long, with and without the root (0.5 is even-handed).
    """
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.tensor([8, 8 * ratio]).repeat(chunks // 2)
    cuts = torch.cat([torch.zeros(1, dtype=torch.long), sizes.cumsum(0)])
    keys = torch.randn(int(cuts[-1]), dim, generator=generator)
    query = torch.randn(dim, generator=generator)
    long = sizes > 8
    found = {}
    for name, represent in (("root", chunk_representation), ("mean", chunk_mean)):
        best = (represent(keys, cuts) @ query).topk(chunks // 4).indices
        found[name] = float(long[best].float().mean())
    return found
