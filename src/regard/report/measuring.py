"""The slower parts of a report: probes, needle task, ablation, dormancy, domains, massive activations - each with its proof."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from regard.instruments.causal import CausalTwin, causal_twin
from regard.instruments.domains import DomainSensitivity, domain_sensitivity
from regard.instruments.dormant import DormantHeads
from regard.instruments.importance import HeadImportance, head_importance, held_out
from regard.instruments.massive import DoseResponse, dose_response
from regard.instruments.needles import RetrievalReport
from regard.instruments.probes import probe_heads
from regard.instruments.results import HeadMeasure
from regard.instruments.retrieval import retrieval_heads
from regard.instruments.writers import writers
from regard.report.definitions import definition, measure
from regard.report.schema import (
    DomainRow,
    DomainTable,
    DormantSet,
    DosePoint,
    Probe,
    Proof,
    Retrieval,
    RetrievalHead,
    Skyline,
    Stack,
    Writer,
)

DRAWS = 8
CONTROL = f"{DRAWS} random draws of as many heads of the same layers"


@dataclass
class Measured:
    """Results of the slow sections, kept for the findings."""

    twins: dict[str, CausalTwin] = field(default_factory=dict)
    importance: HeadImportance | None = None
    retrieval: RetrievalReport | None = None
    dormant: DormantHeads | None = None
    domains: DomainSensitivity | None = None
    dose: DoseResponse | None = None
    probes: dict[str, HeadMeasure] = field(default_factory=dict)


def proof(twin: CausalTwin, label: str, counted: str = "held-out tokens") -> Proof:
    """A causal twin as the page shows it."""
    low, high = twin.interval
    controls = twin.controls.tolist()
    return Proof(
        label, "nats", twin.effect, low, high, 0.95, controls, CONTROL, twin.samples, counted
    )


def probes(model: nn.Module, stack: Stack, measured: Measured, seed: int) -> None:
    """Previous-token, duplicate-token and induction scores, and what the best heads are worth on repeated text."""
    found = probe_heads(model, seed=seed)
    measured.probes = found
    evaluate = copying_loss(model, seed + 1)
    for key in ("previous_token", "duplicate_token", "induction"):
        stack.measures.append(measure(key, found[key].matrix().numpy()))
        best = found[key].top(named_heads(found[key]))
        twin = causal_twin(
            model, [head for head, _ in best], evaluate, draws=DRAWS, seed=seed, unit="nats/token"
        )
        measured.twins[key] = twin
        stack.probes.append(
            Probe(
                definition(key),
                [str(head) for head, _ in best],
                [score for _, score in best],
                proof(
                    twin,
                    "Loss on the repeated half of fresh random tokens, best heads silenced",
                    "held-out sequences",
                ),
            )
        )


def named_heads(scores: HeadMeasure, most: int = 5) -> int:
    """How many best heads are silenced together: 5, fewer in small models, so that enough others are left as controls."""
    total = sum(len(values) for values in scores.values.values())
    return max(1, min(most, total // 8))


def copying_loss(
    model: Any, seed: int, length: int = 32, batch: int = 4
) -> Callable[[Any], Tensor]:
    """A function of the model: loss on the second copy of random tokens, one number for each sequence."""
    from regard.pretrained import tokenizer_of
    from regard.texts import induction_batch

    probe = induction_batch(tokenizer_of(model), length, 2, batch, seed)
    ids = probe.tokens.to(next(model.parameters()).device)

    def loss(subject: Any) -> Tensor:
        with torch.inference_mode():
            logits = subject(input_ids=ids).logits[:, -length - 1 : -1].float()
        rows = torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), ids[:, -length:], reduction="none"
        )
        return rows.mean(1)

    return loss


def answer_loss(
    model: Any, seed: int, needles: int = 6, length: int = 200
) -> Callable[[Any], Tensor]:
    """A function of the model: loss of the right answer after a needle prompt, nats per answer token, one for each prompt.

    The needles are the last of the built-in ones; the scores come from the first.
    """
    from regard.pretrained import tokenizer_of
    from regard.texts import NEEDLES, needle_prompts

    prompts = needle_prompts(
        tokenizer_of(model), lengths=(length,), depths=(0.5,), needles=NEEDLES[-needles:], seed=seed
    )
    device = next(model.parameters()).device

    def loss(subject: Any) -> Tensor:
        found = []
        with torch.inference_mode():
            for prompt in prompts:
                answer = prompt.answer_ids.to(device)
                ids = torch.cat([prompt.ids.to(device), answer])[None]
                logits = subject(input_ids=ids).logits[0, -len(answer) - 1 : -1].float()
                found.append(torch.nn.functional.cross_entropy(logits, answer))
        return torch.stack(found)

    return loss


def retrieval(model: nn.Module, stack: Stack, measured: Measured, seed: int) -> None:
    """The needle task, and what the retrieval heads are worth on needles that did not choose them."""
    found = retrieval_heads(model, seed=seed)
    measured.retrieval = found
    scores = found.scores.matrix().numpy()
    if np.isnan(scores).all():
        stack.retrieval = Retrieval(len(found.runs), 0, 0.1, [])
        return
    stack.measures.append(measure("retrieval", scores))
    named = found.heads(0.1)
    if named:
        heads = [head for head, _ in named]
        measured.twins["retrieval"] = causal_twin(
            model, heads, answer_loss(model, seed + 1), draws=DRAWS, seed=seed, unit="nats/token"
        )
    activation = dict(found.activation.items())
    alone = dict(measured.importance.change.items()) if measured.importance is not None else {}
    rows = [
        RetrievalHead(str(h), s, activation.get(h), alone.get(h))
        for h, s in found.scores.top(12)
        if s > 0
    ]
    stack.retrieval = Retrieval(
        runs=len(found.runs),
        answered=found.answered,
        threshold=0.1,
        heads=rows,
        base_recall=float(np.mean([run.recall for run in found.runs])),
        control_label=CONTROL,
    )


def ablation(model: nn.Module, stack: Stack, measured: Measured, tokens: int) -> None:
    """The loss change of every head, on held-out English."""
    measured.importance = head_importance(model, held_out(model, tokens))
    change = measured.importance.change
    stack.measures.append(
        measure("ablation", change.matrix().numpy(), change.matrix(error=True).numpy())
    )


def dormant(
    stack: Stack,
    measured: Measured,
    sink: HeadMeasure,
    relative: HeadMeasure,
    ablation: float = 0.005,
) -> None:
    """Three definitions of dormant side by side, from numbers that other sections measured."""
    assert measured.importance is not None
    thresholds = {"sink": 0.8, "output": 0.5, "ablation": ablation}
    keys = [key for key in sink.values if key[0] == ""]

    def only(found: HeadMeasure) -> HeadMeasure:
        return HeadMeasure(
            found.name, found.unit, {k: found.values[k] for k in keys}, {}, found.definition
        )

    table = {
        "sink": only(sink),
        "output": only(relative),
        "ablation": only(measured.importance.change),
    }
    measured.dormant = DormantHeads(table, thresholds)
    labels = {
        "sink": "more than 80% on the first key",
        "output": "writes less than half the median head of its layer",
        "ablation": f"silencing it alone changes the loss by less than {ablation} nats",
    }
    for name, label in labels.items():
        heads = sorted(measured.dormant.heads(name), key=lambda head: (head.layer, head.head))
        stack.dormant.append(
            DormantSet(definition(f"dormant_{name}"), label, [str(head) for head in heads])
        )


def domains(model: nn.Module, stack: Stack, measured: Measured, seed: int) -> None:
    """Heads that park on the first key in code but not in prose, or the other way round."""
    found = domain_sensitivity(model, seed=seed, windows=8)
    measured.domains = found
    a, b = (dict(found.means[name].items()) for name in found.domains)
    corrected = dict(found.corrected.items())
    order = sorted(found.difference.items(), key=lambda pair: -abs(pair[1]))[:10]
    rows = [DomainRow(str(h), [a[h], b[h]], gap, corrected[h]) for h, gap in order]
    stack.domains = DomainTable(list(found.domains), rows, 8, found.window)


def skyline(peaks: Any, stack: Stack) -> None:
    """The residual skyline from the observed pass."""
    stack.skyline = Skyline(
        peak=peaks.peak.numpy(),
        median=peaks.median.numpy(),
        peak_token=peaks.peak_token.numpy(),
        peak_dimension=peaks.peak_dimension.numpy(),
        first_norm=peaks.first_norm.numpy(),
        median_norm=peaks.median_norm.numpy(),
        token=peaks.summit[1],
        dimension=peaks.summit[2],
    )


def massive(model: nn.Module, ids: Tensor, stack: Stack, measured: Measured, seed: int) -> None:
    """Who writes and erases the largest activation, and what capping it costs."""
    assert stack.skyline is not None
    found = writers(
        model, ids[:, :512], token=stack.skyline.token, dimension=stack.skyline.dimension
    )
    stack.skyline.attention_write = found.attention.numpy()
    stack.skyline.mlp_write = found.mlp.numpy()
    parts = [*found.writers(4), *found.erasers(3)]
    stack.skyline.writers = [Writer(str(part.site), part.amount, part.share) for part in parts]
    windows = held_out(model, 128 * 6)
    windows = windows[:, : windows.shape[1] // 128 * 128].view(-1, 128)
    measured.dose = dose_response(
        model, windows, fractions=(1.0, 0.25, 0.05, 0.0), controls=DRAWS, seed=seed
    )
    largest = max(max(table.values()) for table in measured.dose.natural.values())
    stack.skyline.dose = [
        DosePoint(dose.fraction * largest, dose.nll.mean, dose.nll.low, dose.nll.high)
        for dose in measured.dose.doses
    ]


def parked(
    model: nn.Module, sink: HeadMeasure, measured: Measured, seed: int, edge: float = 0.8
) -> list[Any]:
    """The heads that put more than `edge` of their attention on the first key, silenced together."""
    heads = [head for head, value in sink.items() if value > edge and not head.stack]
    if heads:
        measured.twins["parked"] = causal_twin(
            model, heads, held_out(model, 512), draws=DRAWS, seed=seed
        )
    return heads
