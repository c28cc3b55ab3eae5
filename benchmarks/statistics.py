"""What reading attention statistics costs a prefill, and what sampling query rows loses; `python -m benchmarks.statistics`.

One prefill with the full cache; then each scorer watches the very calls of that prefill. Process CPU time on one thread, the
least of several interleaved rounds, as a share of the prefill's. Writes benchmarks/results/statistics.json.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HERE = Path(__file__).parent
GOALS = {"exact": 0.40, "sampled": 0.15, "rank correlation of sampled": 0.95}


def cpu(action: Callable[[], Any]) -> tuple[float, Any]:
    start = time.process_time()
    result = action()
    return time.process_time() - start, result


def scores(watched: Any) -> Tensor:
    """The scores of all heads, `[layers * kv_heads, tokens]`."""
    scorer = watched.cache.scorer
    return torch.stack([scorer.score(layer)[0] for layer in watched.cache.held]).flatten(0, 1)


def overlap(one: Tensor, other: Tensor, share: float) -> float:
    """The mean share of a head's best keys that two scores agree on."""
    count = round(share * one.shape[-1])
    best = [torch.zeros_like(x, dtype=torch.bool) for x in (one, other)]
    for marks, values in zip(best, (one, other), strict=True):
        marks.scatter_(1, values.topk(count, 1).indices, True)
    return float((best[0] & best[1]).sum(1).double().mean() / count)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.statistics", description=__doc__)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "statistics.json")
    given = parser.parse_args()
    torch.set_num_threads(1)

    import transformers
    from scipy.stats import spearmanr

    import regard
    from regard.bench.replay import Prefill
    from regard.cache import Full
    from regard.cache.scorers import CAKE, H2O, TOVA, ExpectedAttention, SnapKV
    from regard.texts import default_text

    model = regard.load("smollm2")
    text = default_text(model.tokenizer, given.length)
    ids = model.tokenizer(text, return_tensors="pt").input_ids[0, : given.length]
    scorers: dict[str, Any] = {
        "H2O, every row": H2O(),
        **{f"H2O, one row in {every}": H2O(sample=every) for every in (2, 4, 8)},
        "SnapKV": SnapKV(),
        "TOVA": TOVA(),
        "CAKE": CAKE(),
        "Expected Attention": ExpectedAttention(),
    }
    prefill = Prefill(model, ids)
    base, times = [], {name: [] for name in scorers}
    found: dict[str, Tensor] = {}
    for _ in range(given.rounds):
        with Full(model) as cache:
            base.append(cpu(lambda c=cache: c.prefill(ids[None]))[0])
        for name, scorer in scorers.items():
            seconds, watched = cpu(lambda s=scorer: prefill.watched(s))
            times[name].append(seconds)
            found[name] = scores(watched)
            watched.close()
    exact = found["H2O, every row"]
    rows = []
    for name in scorers:
        row: dict[str, Any] = {"method": name, "extra": round(min(times[name]) / min(base), 4)}
        if name.startswith("H2O, one"):
            ranks: Any = [spearmanr(a, b)[0] for a, b in zip(exact, found[name], strict=True)]
            pooled: Any = spearmanr(exact.flatten(), found[name].flatten())[0]
            row |= {
                "rank_correlation": round(float(pooled), 4),
                "rank_correlation_per_head": round(float(sum(ranks)) / len(ranks), 4),
                "best_fifth_shared": round(overlap(exact, found[name], 0.2), 4),
            }
        rows.append(row)
        print(json.dumps(row), flush=True)
    held = {
        "length": given.length,
        "prefill_cpu_seconds": round(min(base), 2),
        "rounds": given.rounds,
        "threads": 1,
        "cores": os.cpu_count(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "goals": GOALS,
        "rows": rows,
    }
    given.out.parent.mkdir(parents=True, exist_ok=True)
    scratch = given.out.with_suffix(".tmp")
    scratch.write_text(json.dumps(held, indent=1))
    scratch.replace(given.out)


if __name__ == "__main__":
    main()
