"""Results with made-up numbers, for the page and the tables."""

from __future__ import annotations

import random

from regard.bench.results import FULL, LIBRARY, Results, Row

METHODS = {
    "random": "Random", "streaming": "StreamingLLM", "h2o": "H2O", "snapkv": "SnapKV",
    "expected": "Expected Attention", "calibrated-h2o": "H2O, calibrated",
}  # fmt: skip
LOSS = {
    "random": 2.6,
    "streaming": 1.9,
    "h2o": 1.4,
    "snapkv": 3.3,
    "expected": 2.0,
    "calibrated-h2o": 0.1,
}
KL = {
    "random": 0.9,
    "streaming": 0.15,
    "h2o": 0.06,
    "snapkv": 0.02,
    "expected": 0.05,
    "calibrated-h2o": 0.03,
}


def make_results(
    budgets: tuple[str, ...] = ("0.1", "0.2", "0.5"), documents: int = 3, length: int = 2048
) -> Results:
    draw = random.Random(0)
    rows: list[Row] = []
    settings = [(LIBRARY, "1"), (FULL, "1"), *((m, b) for m in METHODS for b in budgets)]
    for document in range(documents):
        name, kind = f"document {document + 1}", ("prose", "code", "licence")[document % 3]
        for method, budget in settings:
            size = float(budget)

            def add(measure: str, value: float, depth: float | None = None) -> None:
                rows.append(Row(name, kind, length, method, budget, measure, value, depth))  # noqa: B023

            hard = 0.0 if method in (FULL, LIBRARY) else (1 - size) * 1.1
            add("kl", 0.0 if not hard else KL[method] * hard * draw.uniform(0.7, 1.4))
            add("nll", 2.6 + (KL.get(method, 0) * hard) * 0.9)
            add("top1", 1 - min(0.6, KL.get(method, 0) * hard))
            for question in range(10):
                loss = LOSS.get(method, 0) * hard * draw.uniform(0.6, 1.3)
                add("needle", -0.2 - loss, question / 10)
            add("multikey", -0.5 - LOSS.get(method, 0) * hard, 0.4)
            add("variables", -2.0 - LOSS.get(method, 0) * hard, 0.6)
            add("copy", -0.8 - LOSS.get(method, 0) * hard / 2, 0.3)
            add("bytes", 94.4 * size)
            add("kept", size)
            if document == 0:
                add("prefill", 9.8 + hard * 0.2)
                add("peak", 280.0)
                add("decode", 80 + 34 * size + (20 if method == LIBRARY else 0))
                add("floor", 27 + 5 * size)
    titles = {k: {"title": v, "source": "made up"} for k, v in METHODS.items()}
    titles[FULL] = {"title": "Full cache", "source": "regard.cache.Full"}
    titles[LIBRARY] = {"title": "DynamicCache", "source": "transformers"}
    about = {
        "model": "someone/A model & <b>more</b>", "architecture": "LlamaForCausalLM", "dtype": "float32",
        "threads": 2, "bandwidth": 18.4e9, "methods": titles, "command": "regard bench smollm2", "seed": 0,
        "versions": {"torch": "2.13.0", "transformers": "5.23.0"}, "date": "2026-11-26", "seconds": 700,
    }  # fmt: skip
    texts = [
        {
            "method": m,
            "budget": b,
            "document": "prose 1",
            "text": f"<script>alert('{m}')</script> and so on",
        }
        for m, b in settings
    ]
    return Results(rows, texts, about)
