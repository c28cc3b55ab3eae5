"""Trainable dynamic masks (arXiv 2508.02124): a sparse layer whose values say which keys are worth reading.

Checked here:

* the layer against transformers' DogeAttention, outputs and gradients;
* associative recall, trained from scratch: the same layer with keys chosen by importance, by age, by the values' norm, at random,
  and with all keys; what the importance learns to tell apart;
* a character model with the same choices;
* copying, where every token is needed once: a choice that does not depend on the query must fail there;
* what the choice and the attention over chosen keys cost beside the fused kernel over all keys.

Beyond our scale: models of up to 1.7B parameters at their optimal numbers of tokens, and the speed of GPU kernels.
"""

from __future__ import annotations

from dataclasses import replace
from statistics import fmean
from typing import TYPE_CHECKING, Any

from regard.labs.tasks import Task, characters, recall
from regard.papers import Claim, Paper, Run
from regard.papers._dma_runs import Size, choices, copying, doge_difference, fit, speed

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAPER = Paper(
    "dma",
    claims=[
        Claim(
            "exact",
            "The layer is transformers' DogeAttention: largest difference of outputs and gradients",
            setting="not in the paper: a check of the implementation",
            expect="both at most 1e-6, in float32",
        ),
        Claim(
            "recall",
            "Associative recall is better than with a sliding window of the same size: difference in accuracy",
            setting="multi-query associative recall, models trained from scratch",
            unit=" points",
            expect="at least 10 points in every seed",
        ),
        Claim(
            "recall-full",
            "Associative recall is better than with full attention: difference in accuracy",
            setting="multi-query associative recall, models trained from scratch",
            unit=" points",
            expect="above 0 in every seed",
        ),
        Claim(
            "trained",
            "The learnt choice of keys is better than a random one of the same size: difference in accuracy",
            setting="not in the paper: what would refute that the choice is learnt",
            unit=" points",
            expect="at least 10 points in every seed",
        ),
        Claim(
            "norm",
            "The learnt choice is better than keeping the largest values: difference in accuracy",
            setting="not in the paper: the simplest choice by values",
            unit=" points",
            expect="above 0 in every seed",
        ),
        Claim(
            "importance",
            "The importance tells the tokens that will be asked for from filler: best AUC of a layer and head",
            setting="the paper shows learnt masks on single examples",
            expect="above 0.9, mean over seeds",
            holds=lambda auc: auc > 0.9,
        ),
        Claim(
            "language-sliding",
            "Language modelling is better than with a sliding window of the same size: nats a character less",
            setting="perplexity of models of 80M to 1.7B parameters",
            paper="lower perplexity",
            unit=" nats",
            expect="above 0 in every seed",
        ),
        Claim(
            "language-full",
            "Language modelling is better than with full attention: nats a character less",
            setting="perplexity of models of 80M to 1.7B parameters",
            paper="lower perplexity",
            unit=" nats",
            expect="above 0 in every seed",
        ),
        Claim(
            "local",
            "Half of the window kept for the newest keys makes a better language model: nats a character less",
            setting="not in the paper: a small window of important keys need not hold the neighbours",
            unit=" nats",
            expect="above 0 in every seed",
        ),
        Claim(
            "copy",
            "Where every token is needed once, a choice that does not depend on the query fails: accuracy behind full attention",
            setting="not in the paper; the authors' design notes name this limit",
            unit=" points",
            expect="at least 20 points behind, where full attention is above 80 %",
        ),
        Claim(
            "cost",
            "Time of choosing and reading the keys over that of the fused kernel over all keys",
            setting="GPU kernels of the authors",
            paper="up to 10 x faster",
            unit=" x the time",
            expect="below 1",
            holds=lambda ratio: ratio < 1,
        ),
        Claim(
            "large",
            "At 1.7B parameters, better benchmarks and needle tests than multi-head attention, also beyond the trained length",
            setting="1.7B parameters, 40B tokens",
            beyond="needs a model of 1.7B parameters trained from scratch",
        ),
    ],
    needs=("matplotlib",),
)


def experiment(run: Run) -> None:
    gap = run.partial("doge", lambda: doge_difference(0))
    run.record(
        "exact",
        here=gap or "not compared",
        holds=None if gap is None else max(gap.values()) <= 1e-6,
        note="windows of 8, 24 and 64 for 48 tokens, grouped heads and not"
        if gap
        else "this version of transformers has no Doge",
    )
    seeds = list(range(run.pick(quick=1, full=2)))
    lookup = recalls(run, seeds)
    language = characters_(run, seeds)
    copies(run)
    cost(run)
    run.figure("choices", draw(lookup, language))


def trained(
    run: Run, name: str, task: Task, size: Size, window: int, kinds: list[str], seeds: list[int]
) -> dict[str, list[dict[str, Any]]]:
    """Every kind of choice for every seed."""
    known = choices(window, task.length)
    cases = [(kind, seed) for kind in kinds for seed in seeds]
    found: dict[str, list[dict[str, Any]]] = {kind: [] for kind in kinds}
    for kind, seed in run.progress(cases, name):
        run.seed(seed)
        found[kind].append(
            run.partial(
                f"{name}/{kind}/{seed}",
                lambda k=kind, s=seed: fit(task, size, known[k], s, run.pick(quick=8, full=128)),
            )
        )
    return found


def gaps(
    found: dict[str, list[dict[str, Any]]], one: str, other: str, field: str, scale: float | int
) -> list[float]:
    """What `one` has more than `other`, for each seed."""
    pairs = zip(found[one], found[other], strict=True)
    return [scale * (a[field] - b[field]) for a, b in pairs]


def listed(
    found: dict[str, list[dict[str, Any]]], field: str, scale: float | int, digits: int
) -> str:
    rows = (
        f"{kind} " + "/".join(f"{scale * one[field]:.{digits}f}" for one in runs)
        for kind, runs in found.items()
    )
    return ", ".join(rows) + " by seed"


def record_gap(
    run: Run,
    claim: str,
    values: list[float],
    least: float | int,
    setting: str,
    note: str,
    digits: int = 1,
    decided: bool = True,
) -> None:
    run.record(
        claim,
        here=round(fmean(values), digits),
        interval=(round(min(values), digits), round(max(values), digits)),
        holds=min(values) > least if decided else None,
        setting=setting,
        note=f"interval: lowest and highest of {len(values)} seeds; {note}",
    )


def recalls(run: Run, seeds: list[int]) -> dict[str, list[dict[str, Any]]]:
    window, task = 16, recall(16, 48, 4)
    small = Size(steps=2, width=32, heads=2, batch=4, rate=5e-3)
    size = run.pick(quick=small, full=replace(small, steps=1500, batch=32))
    kinds = ["full", "DMA", "sliding", "value norm", "random"]
    found = trained(run, "recall", task, size, window, kinds, seeds)
    here = (
        f"2 layers, 2 heads, width {size.width}, {task.length} tokens with 4 pairs asked once each, window {window},"
        f" {size.steps} steps of {size.batch}"
    )
    note = "accuracy in %: " + listed(found, "accuracy", 100, 1)
    solved = min(one["accuracy"] for one in found["full"]) > 0.6
    if not solved:
        note += "; full attention has not learnt the task, so nothing follows"
    for claim, other, least in (
        ("recall", "sliding", 10),
        ("recall-full", "full", 0),
        ("trained", "random", 10),
        ("norm", "value norm", 0),
    ):
        record_gap(
            run,
            claim,
            gaps(found, "DMA", other, "accuracy", 100),
            least,
            here,
            note,
            decided=solved,
        )
    best = [max(max(row) for row in one["separation"]) for one in found["DMA"]]
    run.record(
        "importance",
        here=round(fmean(best), 3),
        interval=(round(min(best), 3), round(max(best), 3)),
        setting=here,
        note="interval: lowest and highest over seeds; by layer and head: "
        + "; ".join(
            " | ".join(" ".join(f"{value:.2f}" for value in row) for row in one["separation"])
            for one in found["DMA"]
        ),
    )
    return found


def characters_(run: Run, seeds: list[int]) -> dict[str, list[dict[str, Any]]]:
    window = run.pick(quick=8, full=16)
    task = characters(run.pick(quick=48, full=128))
    size = Size(steps=run.pick(quick=2, full=150), batch=run.pick(quick=2, full=8))
    kinds = ["full", "DMA", "sliding", "DMA + local"]
    found = trained(run, "characters", task, size, window, kinds, seeds)
    here = (
        f"2 layers, 4 heads, width {size.width}, windows of {task.length} bytes of Python's reference, window {window},"
        f" {size.steps} steps of {size.batch}"
    )
    note = "nats a character: " + listed(found, "nats", 1, 3)
    for claim, one, other in (
        ("language-sliding", "sliding", "DMA"),
        ("language-full", "full", "DMA"),
        ("local", "DMA", "DMA + local"),
    ):
        record_gap(run, claim, gaps(found, one, other, "nats", 1), 0, here, note, digits=3)
    return found


def copies(run: Run) -> None:
    length, window = run.pick(quick=16, full=40), run.pick(quick=4, full=5)
    task = copying(16, length)
    small = Size(steps=2, width=32, heads=2, batch=4, rate=8e-3)
    size = run.pick(quick=small, full=replace(small, steps=600, batch=32))
    found = trained(run, "copying", task, size, window, ["full", "DMA"], [0])
    behind = gaps(found, "full", "DMA", "accuracy", 100)[0]
    solved = found["full"][0]["accuracy"] > 0.8
    run.record(
        "copy",
        here=round(behind, 1),
        holds=behind >= 20 if solved else None,
        setting=f"{length // 2} tokens copied, 2 layers of 2 heads of {window} keys each, {size.steps} steps, 1 seed",
        note="accuracy in %: "
        + listed(found, "accuracy", 100, 1)
        + ("" if solved else "; full attention has not learnt the task, so nothing follows"),
    )


def cost(run: Run) -> None:
    tokens, window = run.pick(quick=256, full=4096), run.pick(quick=32, full=256)
    found = run.partial("speed", lambda: speed(tokens, window, run.pick(quick=1, full=3)))
    sparse = found["choice"] + found["dynamic mask"]
    run.record(
        "cost",
        here=round(sparse / found["full"], 2),
        setting=f"processor, one layer of 4 heads of 64, {tokens} tokens, window {window}, prefill",
        note=f"medians: choice {found['choice']:.3f} s, attention {found['dynamic mask']:.3f} s,"
        f" fused kernel over all keys {found['full']:.3f} s",
    )


def draw(
    lookup: dict[str, list[dict[str, Any]]], language: dict[str, list[dict[str, Any]]]
) -> Figure:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 2.9), layout="constrained")
    for ax, found, field, scale in (
        (axes[0], lookup, "accuracy", 100),
        (axes[1], language, "nats", 1),
    ):
        for index, runs in enumerate(found.values()):
            values = [scale * one[field] for one in runs]
            ax.plot(values, [index] * len(values), ".", color="0.6", markersize=7)
            ax.plot(fmean(values), index, "|", color="tab:blue", markersize=15, markeredgewidth=2)
        ax.set_yticks(range(len(found)), list(found))
        ax.invert_yaxis()
    axes[0].set(xlabel="accuracy, %", title="associative recall, by choice of keys", xlim=(0, 104))
    axes[1].set(xlabel="nats a character", title="character model (dots: seeds)")
    return figure
