"""The documentation's page about what forgetting costs, drawn from `results/quality_gap.json`."""

from __future__ import annotations

from typing import Any

from regard.bench.documents import KINDS
from regard.bench.results import FULL

TITLES = {
    FULL: "full cache",
    "random": "random keys",
    "streaming": "StreamingLLM",
    "snapkv": "SnapKV",
    "snapkv 64": "SnapKV, window of 64",
    "snapkv 64 by head": "SnapKV, window of 64, AdaKV's budgets",
    "cake": "CAKE",
    "h2o": "H2O",
    "h2o+calibrated": "H2O, calibrated",
    "h2o+calibrated on code": "H2O, calibrated on code alone",
    "h2o sampled+calibrated": "H2O from 1 row in 8, calibrated",
    "expected": "Expected Attention",
    "expected+calibrated": "Expected Attention, calibrated",
    "kvzip": "KVzip",
    "oracle": "oracle: the planted sentences",
}
INTRODUCTION = """\
# What forgetting costs

SmolLM2-135M, contexts of {length} tokens, {count} documents: English, code and licence texts. Ten needles a document, each
stated twice; the questions are unknown while the context is read. *Lost* is the log-probability an answer token falls by, against
the full cache on the same document, with a 95 % bootstrap interval over documents. Head budgets are calibrated once, on three
other documents without needles. *Bytes* is what the cache really holds against the keys and values of all tokens, positions and
statistics included; *prefill* is the CPU time of a whole prefill, scores and eviction included, over transformers' own with
`DynamicCache` (`python -m benchmarks.prefill`: one other text, 20 % kept).
"""
HEAD = """\
| method | needle lost, nats | interval | English / code / licence | copy lost | KL | bytes | prefill |
|---|---|---|---|---|---|---|---|"""
CLAIM = """\
## The claim

That cheap scores in calibrated head budgets lose at most 0.15 nats at 20 %, with at most 1.15 prefills and 0.21 of the memory.
The loss is tested by the upper end of its interval.

| method | loss | prefill | memory |
|---|---|---|---|"""
PEER = """
## Beside kvpress

{documents} of the documents, with the same questions and methods, under kvpress {kvpress} with transformers
{transformers} (what it supports), at {budget:.0%} kept. Each side is compared with its own full cache; regard's losses are
those above, over all documents. *Bytes* are those of the keys and values that a cache of kvpress holds afterwards;
*prefill* and *decode* are CPU time of one thread over transformers' own cache in the same process, medians over documents.
kvpress hides what a budget by head drops instead of freeing it.

| method | lost, kvpress | lost, regard | bytes, kvpress | bytes, regard | prefill, kvpress | prefill, regard | decode, kvpress |
|---|---|---|---|---|---|---|---|"""
LIMITS = """
What is planted takes a fifth of a context, so at 10 % the oracle cannot keep all of it. Limits: one model, one kind of needle,
one length; the model's own answers with the full cache are the reference, not the truth. The form of the question was chosen
because the full cache answers it well, and one of the English texts had been read with the calibrated methods while the
experiment was made. Global budgets without calibration, SnapKV in calibrated budgets and RULER's other questions are not in
this table; the bench measures them.

```sh
python -m benchmarks.quality_gap measure   # goes on where it stopped
python -m benchmarks.prefill                # prefill times
python -m benchmarks.peer_kvpress --peer-python PYTHON
python -m benchmarks.quality_gap table     # this page
```
"""


def page(result: dict[str, Any]) -> str:
    """The page as Markdown."""
    count = len(result["documents"])
    lines = [INTRODUCTION.format(length=f"{result['length']:,}", count=count)]
    for budget in ("0.2", "0.1"):
        own = [
            one for one in result["settings"] if one["budget"] == budget or one["method"] == FULL
        ]
        lines += [f"## {float(budget):.0%} kept\n", HEAD, *map(_row, own), ""]
    lines.append(CLAIM)
    for line in result["settings"]:
        if "calibrated" in line["method"] and line["budget"] == "0.2":
            cells = (
                _verdict(line["needle_lost"]["high"], 0.15),
                _verdict(line["prefill_ratio"], 1.15),
                _verdict(line["bytes_ratio"], 0.21),
            )
            lines.append(f"| {TITLES[line['method']]} | {' | '.join(cells)} |")
    if result["peer"] is not None:
        lines += _peer(result)
    return "\n".join([*lines, LIMITS])


def _peer(result: dict[str, Any]) -> list[str]:
    """The table beside kvpress, and what failed there."""
    peer = result["peer"]
    ours = {
        one["method"]: one for one in result["settings"] if one["budget"] == str(peer["budget"])
    }
    lines = [PEER.format(budget=peer["budget"], documents=peer["documents"], **peer["versions"])]
    for line in peer["lines"]:
        own = ours.get(line["method"])
        ratio = None if own is None else own["prefill_ratio"]
        cells = (
            TITLES[line["method"]],
            _loss(line["needle_lost"]),
            "" if own is None else _loss(own["needle_lost"]),
            f"{line['bytes']:.3f}",
            "" if own is None else f"{own['bytes_ratio']:.3f}",
            f"{line['prefill']:.2f} x",
            "" if ratio is None else f"{ratio:.2f} x",
            f"{line['decode']:.2f} x",
        )
        lines.append(f"| {' | '.join(cells)} |")
    for method, error in peer["failed"].items():
        lines.append(f"\n{TITLES[method]} failed there: `{error}`")
    return lines


def _loss(spread: dict[str, float]) -> str:
    return f"{spread['mean']:.3f} [{spread['low']:.3f}, {spread['high']:.3f}]"


def _row(line: dict[str, Any]) -> str:
    lost, kinds, ratio = line["needle_lost"], line["by_kind"], line["prefill_ratio"]
    cells = (
        TITLES[line["method"]],
        f"{lost['mean']:.3f}",
        "" if lost["low"] is None else f"[{lost['low']:.3f}, {lost['high']:.3f}]",
        " / ".join("–" if kinds[kind] is None else f"{kinds[kind]:.2f}" for kind in KINDS),
        f"{line['lost']['copy']['mean']:.2f}",
        f"{line['kl']['mean']:.3f}",
        f"{line['bytes_ratio']:.3f}",
        "" if ratio is None else f"{ratio:.2f} x",
    )
    return f"| {' | '.join(cells)} |"


def _verdict(value: float | None, bound: float) -> str:
    if value is None:
        return "not measured"
    return f"{value:.3f}, {'holds' if value <= bound else 'does not hold'}"
