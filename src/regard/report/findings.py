"""The first screen: what a report found, as plain sentences with their figures, each with its causal proof.

A finding is written only from numbers of this report. Severity says how much a reader should care: "high" where much attention
or one dimension does something unusual, "good" where something can be saved, "info" otherwise.
"""

from __future__ import annotations

import re

import numpy as np

from regard.report.measuring import Measured, proof
from regard.report.schema import Finding, Proof, Stack


def write_findings(stack: Stack, measured: Measured, command: str) -> list[Finding]:
    """All findings that this report's numbers support, the most telling first."""
    found = [
        _parked(stack, measured, command),
        _massive(stack, measured, command),
        _budget(stack, command),
        _retrieval(stack, measured, command),
        _copying(stack, measured, command),
        _dormant(stack, measured, command),
        _domains(measured, command),
    ]
    kept = [finding for finding in found if finding is not None]
    for finding in kept:
        finding.sentence = re.sub(r"(?<= )-(?=\d)", "\u2212", finding.sentence)
    return kept


def _values(stack: Stack, key: str) -> np.ndarray | None:
    return next((m.values for m in stack.measures if m.key == key), None)


def _names(stack: Stack, chosen: np.ndarray) -> list[str]:
    return [f"L{layer}H{head}" for layer, head in np.argwhere(chosen)]


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _effect(low: float, high: float, change: float) -> str:
    return f"{change:+.3f} nats a token (95 % interval {low:+.3f} to {high:+.3f})"


def _parked(stack: Stack, measured: Measured, command: str) -> Finding | None:
    sink = _values(stack, "sink")
    if sink is None or not stack.causal:
        return None
    many = sink > 0.8
    share, total = float(np.nanmean(sink)), int(np.isfinite(sink).sum())
    twin = measured.twins.get("parked")
    sentence = f"{share:.0%} of all attention goes to the first token"
    if many.any():
        sentence += f"; {int(many.sum())} of {total} heads put more than 80% there."
    else:
        sentence += "; no head puts more than 80% there."
    if twin is not None:
        controls = float(twin.controls.mean())
        sentence += (
            f" Silencing these heads together changes the loss by {twin.effect:+.3f} nats a token; as many random"
            f" heads of the same layers, {controls:+.3f} on average."
        )
    return Finding(
        "high" if share > 0.25 else "notable",
        "Attention parked on the first token",
        sentence,
        "Mean weight on the first visible key over queries from the ninth on; heads silenced on held-out text.",
        command,
        None if twin is None else proof(twin, "Loss on held-out text, parked heads silenced"),
        _names(stack, many),
        "sink",
        "atlas",
    )


def _runs(sites: np.ndarray) -> str:
    first, last = int(sites[0]), int(sites[-1])
    return (
        f"after block {first - 1}"
        if first == last
        else f"from block {first - 1} to block {last - 1}"
    )


def _massive(stack: Stack, measured: Measured, command: str) -> Finding | None:
    sky = stack.skyline
    if sky is None:
        return None
    ratio = sky.peak / np.maximum(sky.median, 1e-9)
    huge = np.flatnonzero((ratio >= 1000) & (sky.peak > 100))
    if len(huge) == 0:
        top = int(ratio.argmax())
        return Finding(
            "info",
            "No massive activation",
            f"The largest residual activation is {sky.peak[top]:.3g}, {ratio[top]:,.0f} times the median; by the rule"
            " (1,000 times the median and above 100) none is massive.",
            "Largest |activation| of the residual stream after each block.",
            command,
            panel="skyline",
        )
    sentence = (
        f"Dimension {sky.dimension} of token {sky.token} reaches {float(sky.peak.max()):,.0f} after block"
        f" {int(sky.peak.argmax()) - 1}; it is massive {_runs(huge)}, up to {float(ratio.max()):,.0f} times the median."
    )
    adding = [w for w in sky.writers if w.share is not None and w.share > 0.05]
    erasing = [w for w in sky.writers if w.share is not None and w.share < -0.05]
    if adding:
        share = sum(w.share or 0.0 for w in adding[:2])
        verb = "writes" if len(adding) == 1 else "write"
        sentence += f" {' and '.join(w.site for w in adding[:2])} {verb} {share:.0%} of it"
        sentence += f"; {erasing[0].site} erases it." if erasing else "."
    evidence = None
    if measured.dose is not None:
        zero = measured.dose[0.0]
        sentence += (
            f" Removing it changes the loss by {zero.nll.mean:+.2f} nats a token and the mass on the first token from"
            f" {measured.dose.sink:.0%} to {measured.dose.sink + zero.sink.mean:.0%}."
        )
        evidence = Proof(
            "Loss on held-out text, massive entries set to 0",
            "nats",
            zero.nll.mean,
            zero.nll.low,
            zero.nll.high,
            0.95,
            measured.dose.controls,
            f"{len(measured.dose.controls)} draws of random dimensions of the same tokens set to 0",
            measured.dose.tokens,
        )
    return Finding(
        "high",
        "One residual dimension stands out",
        sentence,
        "Largest |activation| after each block; exact decomposition into heads and neurons; entries capped on held-out text.",
        command,
        evidence,
        panel="skyline",
    )


def _budget(stack: Stack, command: str) -> Finding | None:
    if stack.budget is None:
        return None
    level = next((lv for lv in stack.budget.levels if lv.fraction == 0.2), stack.budget.levels[0])
    held = float(np.nanmean(level.retained))
    sentence = f"In each KV head, the {level.fraction:.0%} of the keys that H2O keeps hold {held:.0%} of the attention"
    layer = int(np.nanargmin(level.retained))
    sentence += f" ({float(level.retained[layer]):.0%} in layer {layer}, the least)."
    if level.delta is not None:
        sentence += f" Forgetting the rest changes the loss of later tokens by {level.delta:+.3f} nats a token."
        if stack.budget.bytes_per_token:
            saved = stack.budget.bytes_per_token * (1 - level.fraction) / 1024
            sentence += f" It would save {saved:.0f} KiB of cache a token."
    cheap = level.delta is not None and level.delta < 0.05
    evidence = None
    if level.delta is not None:
        evidence = Proof(
            f"Loss of later tokens with {level.fraction:.0%} of the cache",
            "nats",
            level.delta,
            level.low,
            level.high,
        )
    return Finding(
        "good" if cheap else "info",
        "What a key-value budget keeps",
        sentence,
        "regard.cache.H2O, the same budget for every KV head; the loss is measured on the last quarter of at most 1,024 tokens.",
        command,
        evidence,
        panel="budget",
    )


def _retrieval(stack: Stack, measured: Measured, command: str) -> Finding | None:
    found = measured.retrieval
    if found is None:
        return None
    if not found.answered:
        return Finding(
            "info",
            "The needle task is too hard",
            f"The model answered none of {len(found.runs)} needle questions, so no head can be scored.",
            "Greedy answers to questions whose answer is hidden in a text of 300 tokens.",
            command,
            panel="retrieval",
        )
    named, total = found.heads(0.1), sum(1 for _ in found.scores.items())
    sentence = f"{len(named)} of {total} heads ({len(named) / total:.1%}) copy the hidden answer in the needle task"
    if named:
        sentence += f"; the strongest is {named[0][0]} with a score of {named[0][1]:.2f}."
    else:
        sentence += "."
    twin = measured.twins.get("retrieval")
    if twin is not None:
        sentence += (
            f" Silencing them raises the loss of the right answer by {twin.effect:.2f} nats a token on other needles;"
            f" random heads of the same layers, {float(twin.controls.mean()):.2f}."
        )
    return Finding(
        "notable",
        "Few heads retrieve",
        sentence,
        f"{found.answered} of {len(found.runs)} needle questions answered; score = share of the answer copied by the head.",
        command,
        None
        if twin is None
        else proof(
            twin,
            "Loss of the answer on held-out needles, retrieval heads silenced",
            counted="held-out needles",
        ),
        [str(head) for head, _ in named],
        "retrieval",
        "retrieval",
    )


def _copying(stack: Stack, measured: Measured, command: str) -> Finding | None:
    twin = measured.twins.get("induction")
    if twin is None:
        return None
    best = measured.probes["induction"].top(len(twin.heads))
    sentence = (
        f"{best[0][0]} gives {best[0][1]:.0%} of its attention to the token that followed last time. Silencing the top"
        f" {_plural(len(best), 'induction head')} changes the loss on repeated tokens by {twin.effect:+.2f} nats a token;"
        f" random heads of the same layers, {float(twin.controls.mean()):+.2f}."
    )
    return Finding(
        "info",
        "Copying rests on induction heads",
        sentence,
        "Random tokens repeated once; scored on one batch, silenced on another.",
        command,
        proof(
            twin,
            "Loss on the repeated half of fresh random tokens, best heads silenced",
            counted="held-out sequences",
        ),
        [str(head) for head, _ in best],
        "induction",
        "retrieval",
    )


def _dormant(stack: Stack, measured: Measured, command: str) -> Finding | None:
    found = measured.dormant
    if found is None:
        return None
    counts = {name: len(found.heads(name)) for name in found.measures}
    jaccard = found.jaccard("sink", "ablation")
    return Finding(
        "info",
        "Definitions of dormant disagree",
        f"{counts['sink']} heads are dormant by where they look, {counts['output']} by how little they write,"
        f" {counts['ablation']} by what silencing each alone costs; {_plural(len(found.agreed()), 'head')} by all three."
        f" Looking idle and being idle overlap by {jaccard:.0%}.",
        "Three definitions over the same heads; overlap = shared heads over heads in either set (sink, ablation).",
        command,
        None,
        [str(head) for head in sorted(found.agreed(), key=lambda head: (head.layer, head.head))],
        "sink",
        "dormant",
    )


def _domains(measured: Measured, command: str) -> Finding | None:
    found = measured.domains
    if found is None:
        return None
    return Finding(
        "info",
        "Heads that switch with the kind of text",
        found.sentence(),
        f"{found.window}-token windows of {found.domains[0]} and {found.domains[1]}; permutation test over all heads at once.",
        command,
        None,
        [str(head) for head, _ in found.sensitive()],
        "sink",
        "domains",
    )
