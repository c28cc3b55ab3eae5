"""The papers: what each one claims, and an experiment that checks it at our scale.

One file a paper, named after its slug (`retrieval_head.py` for `retrieval-head`). It states the
claims with the paper's numbers and the rule by which each will be judged, then measures::

    from __future__ import annotations

    from regard.papers import Claim, Paper, Run

    PAPER = Paper(
        "retrieval-head",
        claims=[
            Claim(
                "sparse",
                "Few heads retrieve: share of heads with a score of at least 0.1",
                setting="Llama-2-7B-80K, 586 needle prompts",
                paper="3.2 %",
                unit=" %",
                expect="below 15 %",
                holds=lambda share: share < 15,
            ),
            Claim(
                "long",
                "The same heads retrieve at 50k tokens",
                setting="Llama-2-7B-80K",
                beyond="the model at hand reads 8k tokens",
            ),
        ],
        needs=("matplotlib",),
    )


    def experiment(run: Run) -> None:
        model = run.model()
        shares = []
        for seed in run.progress(range(run.pick(quick=1, full=5)), "needle prompts"):
            run.seed(seed)
            shares.append(run.partial(f"share/{seed}", lambda: measure(model, run.quick)))
        low, high = min(shares), max(shares)
        run.record(
            "sparse",
            here=sum(shares) / len(shares),
            interval=(low, high),
            setting="SmolLM2-135M-Instruct",
            note="interval: range over seeds",
        )
        run.figure("shares", draw(shares))

`regard reproduce SLUG` runs it and writes `evidence/<slug>.json`. A verdict is always computed,
by the claim's `holds` rule or from the measurement in `record(holds=...)`; a claim that does not
hold is written down as not holding.
"""

from __future__ import annotations

from regard.papers._catalogue import Entry, catalogue, entry, load, runnable, search
from regard.papers._paper import Claim, Paper
from regard.papers._reproduce import reproduce
from regard.papers._run import Run

__all__ = [
    "Claim",
    "Entry",
    "Paper",
    "Run",
    "catalogue",
    "entry",
    "load",
    "reproduce",
    "runnable",
    "search",
]
