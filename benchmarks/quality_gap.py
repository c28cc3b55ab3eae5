"""`python -m benchmarks.quality_gap`: what each cache method forgets at 20 % and 10 % kept, and what it costs.

Twelve documents of three kinds (English, code, licence texts), 2 048 tokens each, ten needles stated twice, questions unseen
while the context is read. Every method is scored on the same prefill of a document. Budgets per head are calibrated on other
documents without needles. Intervals: bootstrap over documents.

    python -m benchmarks.quality_gap measure --part 1/2     (resumable; parts may run side by side)
    python -m benchmarks.quality_gap table                  (writes results/quality_gap.json and docs/quality-gap.md)
    python -m benchmarks.quality_gap refresh                (the same with new prefill times, methods and kvpress)
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers

import regard
from benchmarks.quality_page import page
from regard.bench import controls
from regard.bench.documents import KINDS, builtin_documents
from regard.bench.exam import Exam, make_exam
from regard.bench.replay import Prefill
from regard.bench.results import FULL, Results, Row
from regard.bench.scoring import agreement, answers, continuation
from regard.bench.store import Store
from regard.cache import Cache, scorers
from regard.cache.budgets import Ada, CakePreference, Calibrated, Global, Uniform
from regard.cache.calibration import Calibration, calibrate
from regard.cache.reconstruction import reconstruct
from regard.metrics import bootstrap
from regard.texts import sources

HERE = Path(__file__).parent / "results"
LENGTH, EACH, BUDGETS = 2048, 4, (0.2, 0.1)


def exams(tokenizer: Any) -> list[Exam]:
    found = builtin_documents(tokenizer, LENGTH, each=EACH)
    made = [make_exam(tokenizer, document, LENGTH) for document in found]
    asked = ("needle", "copy")
    return [
        replace(exam, questions=tuple(q for q in exam.questions if q.measure in asked))
        for exam in made
    ]


def calibrations(model: Any, store: Store) -> dict[str, Calibration]:
    """One from a text of each kind together, one from code alone; no text is among the documents of the test."""
    tokenizer = model.tokenizer
    apart = builtin_documents(tokenizer, LENGTH, each=1, skip=EACH)
    texts = {one.kind: tokenizer.decode(one.ids[:1024]) for one in apart}

    def made(name: str, kinds: tuple[str, ...]) -> Calibration:
        path = HERE / f"quality_gap.{name}.partial.json"
        if not path.is_file():
            start = time.process_time()
            calibrate(model, [texts[kind] for kind in kinds], tokens=1024).save(path)
            store.put(f"seconds/{name}", time.process_time() - start)
        return Calibration.load(path)

    return {
        "calibrated": made("calibrated", KINDS),
        "calibrated-code": made("calibrated-code", ("code",)),
    }


def methods(
    exam: Exam, prefill: Prefill, model: Any, held: dict[str, Calibration]
) -> Iterator[tuple[str, Any, Any]]:
    """Name, scorer and rule of everything that is compared; scorers that come in a row share one watching."""
    config, tokens = model.config, exam.length
    shape = (config.num_hidden_layers, config.num_key_value_heads)
    both, code = held.get("calibrated"), held.get("calibrated-code")
    yield "random", controls.chance(*shape, tokens), Uniform
    yield "streaming", scorers.Streaming(), Uniform
    yield "snapkv", scorers.SnapKV(), Uniform
    wide = scorers.SnapKV(window=64)
    yield "snapkv 64", wide, Uniform
    yield "snapkv 64 by head", wide, Ada
    yield "cake", scorers.CAKE(), CakePreference
    h2o, sampled, expected = scorers.H2O(), scorers.H2O(sample=8), scorers.ExpectedAttention()
    yield "h2o", h2o, Uniform
    yield "h2o+calibrated", h2o, lambda size: Calibrated(size, both)
    yield "h2o+calibrated on code", h2o, lambda size: Calibrated(size, code)
    yield "h2o sampled+calibrated", sampled, lambda size: Calibrated(size, both)
    yield "expected", expected, Uniform
    yield "expected+calibrated", expected, lambda size: Calibrated(size, both)
    peaks = reconstruct(model, exam.context[None], cache=prefill.full)
    yield "kvzip", controls.Given(table=peaks), Global
    yield "oracle", controls.oracle(exam, *shape), Uniform


def measure(part: int, parts: int, only: set[str] | None = None) -> None:
    torch.set_num_threads(1)
    model = regard.load("smollm2")
    store = Store(
        HERE / f"quality_gap.{part}of{parts}.partial.jsonl", {"length": LENGTH, "each": EACH}
    )
    uncalibrated = only is not None and not any("calibrated" in name for name in only)
    held = {} if uncalibrated else calibrations(model, store)
    for exam in exams(model.tokenizer)[part - 1 :: parts]:
        if f"done/{exam.name}" in store:
            continue
        start = time.process_time()
        prefill = Prefill(model, exam.context)
        reference = continuation(model, prefill.full, exam)
        plain = sum(2 * layer.keys.nbytes for layer in prefill.full.held)  # type: ignore[union-attr]
        grade(store, model, exam, FULL, "1", prefill.full, reference, reference, plain)
        scorer, watched, waiting = None, None, set(only or ())
        for name, wanted, rule in methods(exam, prefill, model, held):
            if only is not None and name not in only:
                continue
            waiting.discard(name)
            if wanted is not scorer:
                if watched is not None:
                    watched.close()
                scorer, watched = wanted, prefill.watched(wanted)
            assert watched is not None
            for size in BUDGETS:
                if f"{exam.name}/{name}/{size}" in store:
                    continue
                cache, _ = watched.evicted(rule(size))
                logits = continuation(model, cache, exam)
                grade(store, model, exam, name, str(size), cache, logits, reference, plain)
                cache.close()
            if only is not None and not waiting:
                break
        prefill.close()
        store.put(f"done/{exam.name}", time.process_time() - start)
        print(f"{exam.name}: {time.process_time() - start:.0f} CPU s", flush=True)


def grade(
    store: Store,
    model: Any,
    exam: Exam,
    method: str,
    size: str,
    cache: Cache,
    logits: Any,
    reference: Any,
    plain: int,
) -> None:
    def compute() -> list[list[Any]]:
        rows = [
            [measure, value, None] for measure, value in agreement(logits, reference, exam).items()
        ]
        rows += [[measure, value, depth] for measure, depth, value in answers(model, cache, exam)]
        bytes_held = plain if method == FULL else cache.memory()
        states = sum(sum(layer.rows.sizes) for layer in cache.held) * 512  # keys and values alone
        return [
            *rows,
            ["bytes", bytes_held / 1e6, None],
            ["kept", bytes_held / plain, None],
            ["states", states / plain, None],
        ]

    found = store.get(f"{exam.name}/{method}/{size}", compute)
    needles = [value for measure, value, _ in found if measure == "needle"]
    print(f"{exam.name:12} {method:24} {size:4} needle {statistics.mean(needles):.3f}", flush=True)


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")


def collect() -> Results:
    rows = []
    for path in sorted(HERE.glob("quality_gap.*of*.partial.jsonl")):
        cells = [json.loads(line) for line in path.read_text().splitlines()[1:]]
        done = {
            cell["name"].removeprefix("done/") for cell in cells if cell["name"].startswith("done/")
        }
        for cell in cells:
            document, _, rest = cell["name"].partition("/")
            if document not in done:
                continue
            method, _, size = rest.rpartition("/")
            if method:
                kind = document.rpartition(" ")[0]
                rows += [
                    Row(document, kind, LENGTH, method, size, m, v, d) for m, v, d in cell["value"]
                ]
    return Results(rows)


def prefill_ratios() -> dict[str, float]:
    """What `benchmarks.prefill` measured, by method."""
    rows = json.loads((HERE / "prefill.json").read_text())["rows"]
    return {row["method"]: row["ratio"] for row in rows}


def refresh() -> None:
    """The page anew: graded methods are added to those that it had, with the newest prefill times and peers."""
    result = json.loads((HERE / "quality_gap.json").read_text())
    prefills = prefill_ratios()
    lines = {(one["method"], one["budget"]): one for one in result["settings"]}
    new = {(one["method"], one["budget"]): one for one in summarise(collect())}
    lines |= {key: one for key, one in new.items() if key[0] != FULL}
    for line in lines.values():
        line["prefill_ratio"] = prefills.get(line["method"].removesuffix(" on code"))
    result["settings"] = list(lines.values())
    result["peer"] = peer()
    finish(result)


def finish(result: dict[str, Any]) -> None:
    write(HERE / "quality_gap.json", result)
    (HERE.parents[1] / "docs" / "quality-gap.md").write_text(page(result))


def summarise(found: Results) -> list[dict[str, Any]]:
    """A line for each method and budget."""
    prefills = prefill_ratios()
    lines = []
    for setting in found.settings():
        lost = {m: found.lost(setting, m) for m in ("needle", "copy")}
        needle, closeness = found.estimate(setting, "needle"), found.estimate(setting, "kl")
        kept, states = found.estimate(setting, "kept"), found.by_document(setting, "states")
        assert needle and closeness and kept and lost["needle"]
        by_kind = {}
        for kind in KINDS:
            own = Results([row for row in found.rows if row.kind == kind])
            part = own.lost(setting, "needle")
            by_kind[kind] = None if part is None else round(part.mean, 4)
        lines.append(
            {
                "method": setting.method, "budget": setting.budget, "documents": needle.n,
                "needle": round(needle.mean, 4), "needle_lost": spread(lost["needle"]), "by_kind": by_kind,
                "lost": {m: spread(e) for m, e in lost.items() if e}, "kl": spread(closeness),
                "bytes_ratio": round(kept.mean, 4), "states_ratio": round(statistics.mean(states.values()), 4),
                "prefill_ratio": prefills.get(setting.method.removesuffix(" on code")),
            }
        )  # fmt: skip
    return lines


def table() -> None:
    found = collect()
    lines = summarise(found)
    result = {
        "what": __doc__.split("\n\n")[0].partition(": ")[2],
        "length": LENGTH, "peer": peer(), "documents": sorted({row.document for row in found.rows}), "texts": sources(),
        "versions": {"regard": regard.__version__, "torch": torch.__version__, "transformers": transformers.__version__,
                     "python": platform.python_version()}, "settings": lines,
    }  # fmt: skip
    finish(result)
    for line in lines:
        low, high = line["needle_lost"]["low"], line["needle_lost"]["high"]
        print(
            f"{line['method']:24} {line['budget']:4} n={line['documents']:2} "
            f"lost {line['needle_lost']['mean']:6.3f} [{low}, {high}] "
            f"kl {line['kl']['mean']:.4f} copy {line['lost']['copy']['mean']:.3f} bytes {line['bytes_ratio']:.3f}"
        )


def peer() -> dict[str, Any] | None:
    """What `benchmarks.peer_kvpress` measured on the same documents, each method against its own full cache."""
    path = HERE / "kvpress.json"
    if not path.is_file():
        return None
    found = json.loads(path.read_text())
    by_document: dict[str, dict[str, Any]] = {}
    for row in found["rows"]:
        by_document.setdefault(row["document"], {})[row["method"]] = row
    lines, failed = [], {}
    for method in next(iter(by_document.values())):
        if method == FULL:
            continue
        rows = [(own[FULL], own[method]) for own in by_document.values()]
        broken = [one["failed"] for _, one in rows if "failed" in one]
        if broken:
            failed[method] = broken[0]
            continue
        estimate = bootstrap([plain["needle"] - one["needle"] for plain, one in rows])
        middle = {
            name: round(statistics.median(one[name] for _, one in rows), 4)
            for name in ("bytes", "prefill", "decode")
        }
        lines.append({"method": method, "needle_lost": spread(estimate), **middle})
    return {
        "versions": found["versions"],
        "budget": found["budget"],
        "documents": len(by_document),
        "lines": lines,
        "failed": failed,
    }


def spread(estimate: Any) -> dict[str, float | None]:
    ends = (estimate.mean, estimate.low, estimate.high)
    mean, low, high = (None if math.isnan(end) else round(end, 4) for end in ends)
    return {"mean": mean, "low": low, "high": high}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality_gap", description=__doc__)
    parser.add_argument("what", choices=["measure", "table", "refresh"])
    parser.add_argument("--part", default="1/1", help="of the documents, such as 1/2")
    parser.add_argument("--only", nargs="*", help="these methods alone, to be added by refresh")
    given = parser.parse_args()
    if given.what == "measure":
        measure(*map(int, given.part.split("/")), only=given.only and set(given.only))
    elif given.what == "table":
        table()
    else:
        refresh()


if __name__ == "__main__":
    main()
