"""Filtering with Self-Attention and Storing with MLP (arXiv 2508.00901): facts acquired, and facts that can be asked for.

Checked here:

* pre-training of the one-layer model reaches its least loss, and attention leaves tokens without meaning out;
* fine-tuning on questions about some facts makes others answerable, over |R|, K and N;
* the update is one direction in the column of the question token, and low-rank updates do as well;
* the same without an MLP, and with falling rates;
* capitals of real countries in a small language model with layers, positions and norms.

The paper's theorems could be read in abstracts only: data, model and training here are a reconstruction
(`regard.labs.filtering_storing`). Beyond our scale: PopQA with GPT-2 and Llama-3.2-1B.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from regard.labs.filtering_storing import FilteringStoring, template_coverage
from regard.labs.results import Result, interval
from regard.papers import Claim, Paper, Run
from regard.papers import _filtering_storing_runs as runs

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RANKS = (1, 2, 4)
MULTIPLICITIES = (1, 3, 8)  # of the countries

PAPER = Paper(
    "filtering-storing",
    claims=[
        Claim(
            "floor",
            "Pre-training reaches the least next-token loss: largest excess after the subject over log K, and largest loss "
            "after the template, nats",
            setting="acquisition theorem",
            paper="near-optimal",
            expect="both within 0.02 nats",
        ),
        Claim(
            "filtered",
            "Attention leaves uninformative tokens out: its mass on distractors between subject and template",
            setting="acquisition theorem",
            paper="0 in the limit",
            unit=" %",
            expect="below 10 %",
        ),
        Claim(
            "seen",
            "Fine-tuned facts are answered: smallest accuracy of all worlds",
            setting="extraction theorem",
            unit=" %",
            expect="100 %",
        ),
        Claim(
            "multiplicity",
            "Pre-training multiplicity makes untouched facts extractable: gain in accuracy from the smallest to the largest K",
            setting="extraction theorem: error below exp(- N K^2 log|R| / (2 |R|^2)), up to constants",
            unit=" points",
            expect="above 0, beyond the error bar",
        ),
        Claim(
            "questions",
            "More fine-tuning makes more untouched facts extractable: gain from the smallest to the largest N",
            setting="extraction theorem",
            unit=" points",
            expect="above 0, beyond the error bar",
        ),
        Claim(
            "pool",
            "A larger template universe makes it harder: loss from the smallest to the largest |R|",
            setting="extraction theorem",
            unit=" points",
            expect="above 0, beyond the error bar",
        ),
        Claim(
            "order",
            "Accuracy on untouched facts is ordered like N K^2 log|R| / (2 |R|^2): rank correlation over all worlds",
            setting="extraction theorem",
            expect="above 0.8",
        ),
        Claim(
            "bound",
            "The error on untouched facts is below exp(- N K^2 log|R| / (2 |R|^2)): largest excess of all worlds",
            setting="extraction theorem, up to constants",
            paper="0",
            unit=" points",
            expect="at most 2 points, constants taken as 1",
        ),
        Claim(
            "hallucination",
            "With too few templates covered, facts are stored and not accessible: accuracy on untouched facts at the smallest "
            "K and N and the largest |R|",
            setting="failure regime",
            unit=" %",
            expect="below 10 %, with the loss after the template within 0.02 nats",
        ),
        Claim(
            "rank one",
            "The fine-tuning update of W1 has one dominant component: smallest share of its squared norm in the first "
            "singular value",
            setting="gradient analysis of fine-tuning",
            unit=" %",
            expect="above 50 %",
        ),
        Claim(
            "token",
            "... aligned with the question token: smallest norm of its column over that of the whole update",
            setting="gradient analysis of fine-tuning",
            unit=" %",
            expect="above 70 %",
        ),
        Claim(
            "trigger",
            "... which moves into the directions stored for templates: share of its update in their span, above a random "
            "direction's",
            setting="mechanism: the question token triggers stored relation directions",
            unit=" points",
            expect="above 0, beyond the error bar",
        ),
        Claim(
            "lora",
            "Low-rank fine-tuning suffices: accuracy on untouched facts at rank 1, 2 or 4, the worst, minus full fine-tuning's",
            setting="LoRA",
            paper="suffices",
            unit=" points",
            expect="at least -5 points",
        ),
        Claim(
            "attention only",
            "Without an MLP the model acquires less: summed excess loss after pre-training, minus that with an MLP, nats",
            setting="attention-only models may be unable to acquire or extract",
            expect="above 0.1, beyond the error bar",
        ),
        Claim(
            "attention only, extraction",
            "Without an MLP fewer untouched facts are extracted: accuracy lost without it",
            setting="attention-only models may be unable to acquire or extract",
            unit=" points",
            expect="above 0, beyond the error bar",
        ),
        Claim(
            "schedule",
            "A rate that falls once the trigger is learnt leaves a lower loss on untouched facts: constant rate's minus falling "
            "rate's, nats",
            setting="learning-rate schedules matter",
            expect="above 0, beyond the error bar",
        ),
        Claim(
            "countries",
            "The same order in K on real facts, in a language model: accuracy on capitals that fine-tuning never asked for",
            setting="PopQA, GPT-2 and Llama-3.2-1B",
            unit=" points",
            expect="not falling from K to the next in any seed, and the largest K above the smallest in all",
        ),
        Claim(
            "popqa",
            "The same trends on PopQA",
            setting="GPT-2 and Llama-3.2-1B",
            beyond="neither the models nor PopQA are at hand, and fine-tuning them takes a GPU",
        ),
    ],
    needs=("matplotlib", "scipy"),
)


def experiment(run: Run) -> None:
    run.seed(0)
    lab = FilteringStoring(
        subjects=run.pick(quick=16, full=96),
        templates=run.pick(quick=(4, 8), full=(8, 24, 60)),
        multiplicities=run.pick(quick=(1, 3), full=(1, 3, 8)),
        finetuned=run.pick(quick=(2, 6), full=(4, 16, 64)),
        width=run.pick(quick=32, full=128),
        steps=run.pick(quick=30, full=400),
        finetune_steps=run.pick(quick=30, full=150),
        seeds=run.pick(quick=2, full=4),
    )
    grid = [(pool, count) for pool in lab.templates for count in lab.multiplicities]
    cells = [
        run.partial(f"world/{pool}/{count}", lambda r=pool, k=count: lab.cell(r, k))
        for pool, count in run.progress(grid, "worlds")
    ]
    middle = lab.templates[len(lab.templates) // 2]
    filtered = run.partial("filtering", lambda: lab.filtering(middle, lab.multiplicities[1]))
    result = lab.report(cells, filtered)
    record_lab(run, lab, result, cells, middle)
    run.figure("extraction", result.plot())
    record_ablations(run, lab, middle)
    record_countries(run)


def where_of(lab: FilteringStoring) -> str:
    return (
        f"S = A = {lab.subjects}, |R| in {lab.templates}, K in {lab.multiplicities}, N in {lab.finetuned}, "
        f"{lab.width} neurons, {lab.seeds} seeds"
    )


def record_lab(
    run: Run, lab: FilteringStoring, result: Result, cells: list[dict[str, Any]], middle: int
) -> None:
    """The claims that the laboratory itself checks."""
    checks, where = result.checks, where_of(lab)
    floor, stored = checks["floor"], checks["stored"]
    verdicts = (floor.holds, stored.holds)
    run.record(
        "floor",
        here={"after the subject": floor.measured, "after the template": stored.measured},
        holds=None if None in verdicts and False not in verdicts else all(verdicts),
        setting=where,
        note="the largest mean over seeds",
    )
    filtered = checks["filtered"]
    _record(
        run,
        "filtered",
        filtered,
        setting=f"{lab.noise} of {lab.distractors} distractors, drawn anew at every step; |R| = {middle}, "
        f"K = {lab.multiplicities[1]}, {lab.seeds} seeds",
        note=f"{filtered.why}; interval: 95 % over seeds",
    )
    for name, check in (
        ("multiplicity", "more templates"),
        ("questions", "more questions"),
        ("pool", "larger pool"),
        ("bound", "bound"),
        ("rank one", "rank one"),
        ("token", "token"),
        ("trigger", "trigger"),
    ):
        _record(run, name, checks[check], setting=where, note="interval: 95 % over seeds")
    seen, order = checks["seen"], checks["order"]
    run.record("seen", here=100 * seen.measured, holds=seen.holds, setting=where)
    run.record(
        "order",
        here=order.measured,
        holds=order.holds,
        setting=where,
        note="accuracies are means over seeds; worlds of accuracy 1 are ties",
    )
    pool, count, size = max(lab.templates), min(lab.multiplicities), min(lab.finetuned)
    world = next(c for c in cells if (c["templates"], c["multiplicity"]) == (pool, count))
    row = next(one for one in world["tuned"] if one["finetuned"] == size)
    mean, half = (float(part) for part in interval(100 * np.array(row["unseen"])))
    run.record(
        "hallucination",
        here=mean,
        interval=(mean - half, mean + half),
        holds=False
        if max(world["after template"]) >= 0.02 or mean - half >= 10
        else mean + half < 10 or None,
        setting=f"|R| = {pool}, K = {count}, N = {size}, {lab.seeds} seeds",
        note=f"expected share of templates touched: {100 * template_coverage(size, count, pool):.0f} %; loss on untouched "
        f"facts {np.mean(row['unseen loss']):.2f} nats, after their templates {np.mean(world['after template']):.4f}; "
        "interval: 95 % over seeds",
    )


def _record(run: Run, name: str, check: Any, *, setting: str, note: str) -> None:
    """A check in per cent, with its interval."""
    low, high = check.measured - check.error, check.measured + check.error
    undecided = "; the error bar reaches over the bound" if check.holds is None else ""
    run.record(
        name,
        here=100 * check.measured,
        interval=(100 * low, 100 * high),
        holds=check.holds,
        setting=setting,
        note=note + undecided,
    )


def record_ablations(run: Run, lab: FilteringStoring, middle: int) -> None:
    """Low ranks, falling rates, and the model without an MLP."""
    count, size = lab.multiplicities[1], lab.finetuned[1]
    ranks = run.pick(quick=(1,), full=RANKS)
    found = run.partial(
        "variants", lambda: runs.variants(lab, middle, count, count=size, ranks=ranks)
    )
    where = f"|R| = {middle}, K = {count}, N = {size}, {lab.seeds} seeds"
    gaps = {
        rank: 100 * (np.array(found[f"rank {rank}"]["unseen"]) - found["full"]["unseen"])
        for rank in ranks
    }
    worst = min(gaps, key=lambda rank: gaps[rank].mean())
    mean, half = (float(part) for part in interval(gaps[worst]))
    accuracy = lambda name: f"{100 * np.mean(found[name]['unseen']):.1f} %"  # noqa: E731
    run.record(
        "lora",
        here=mean,
        interval=(mean - half, mean + half),
        holds=True if mean - half >= -5 else False if mean + half < -5 else None,
        setting=f"{where}; rank {worst} of W1 only",
        note=f"full: {accuracy('full')}; "
        + ", ".join(
            f"rank {rank}: {accuracy(f'rank {rank}')} (fine-tuned facts "
            f"{100 * np.mean(found[f'rank {rank}']['seen']):.0f} %)"
            for rank in ranks
        )
        + "; interval: 95 % over seeds of the paired difference",
    )
    saved = np.array(found["full"]["unseen loss"]) - found["falling"]["unseen loss"]
    mean, half = (float(part) for part in interval(saved))
    run.record(
        "schedule",
        here=mean,
        interval=(mean - half, mean + half),
        holds=True if mean - half > 0 else False if mean + half < 0 else None,
        setting=f"{where}; {lab.finetune_steps} steps, a tenth of the rate after a third of them",
        note=f"untouched facts at a constant rate {accuracy('full')}, at the falling one {accuracy('falling')}; with Adam in "
        f"place of plain descent {accuracy('adam')}; interval: 95 % over seeds of the paired difference",
    )
    run.figure("finetuning", draw_courses(found))
    record_attention_only(run, lab, middle, count)


def record_attention_only(run: Run, lab: FilteringStoring, middle: int, count: int) -> None:
    shared = FilteringStoring(
        **{
            **lab.values(),
            "subjects": 2 * lab.subjects,
            "answers": run.pick(quick=4, full=12),
            "finetuned": (lab.finetuned[-1],),
        }
    )
    found = run.partial("without mlp", lambda: runs.without_mlp(shared, middle, count))
    bare, whole = found["attention"], found["mlp"]
    excess = [
        np.array(one["after subject"]) + np.array(one["after template"]) for one in (bare, whole)
    ]
    where = (
        f"S = {shared.subjects}, {shared.answers} answers shared by them, |R| = {middle}, K = {count}, {shared.steps} steps "
        f"of Adam, {shared.seeds} seeds"
    )
    mean, half = (float(part) for part in interval(excess[0] - excess[1]))
    run.record(
        "attention only",
        here=mean,
        interval=(mean - half, mean + half),
        holds=True if mean - half > 0.1 else False if mean + half < 0.1 else None,
        setting=where,
        note=f"excess after the subject {np.mean(bare['after subject']):.3f} without, {np.mean(whole['after subject']):.3f} "
        f"with an MLP; loss after the template {np.mean(bare['after template']):.3f} and "
        f"{np.mean(whole['after template']):.3f}; interval: 95 % over seeds of the paired difference",
    )
    lost = 100 * (np.array(whole["unseen"]) - bare["unseen"])
    mean, half = (float(part) for part in interval(lost))
    run.record(
        "attention only, extraction",
        here=mean,
        interval=(mean - half, mean + half),
        holds=True if mean - half > 0 else False if mean + half < 0 or mean <= 0 else None,
        setting=f"{where}, N = {shared.finetuned[0]}",
        note=f"accuracy on untouched facts {100 * np.mean(bare['unseen']):.1f} % without, {100 * np.mean(whole['unseen']):.1f} "
        "% with an MLP; answers are shared here, so that fine-tuning names all of them; interval: 95 % over seeds of the paired "
        "difference",
    )


def record_countries(run: Run) -> None:
    size = run.pick(
        quick=runs.Size(
            layers=1, width=16, heads=2, steps=6, batch=16, tuning_steps=3, asked=10, countries=20
        ),
        full=runs.Size(),
    )
    seeds = run.pick(quick=[0], full=[0, 1, 2])
    found: dict[int, list[dict[str, float]]] = {count: [] for count in MULTIPLICITIES}
    for seed in run.progress(seeds, "countries"):
        run.seed(seed)
        for count in MULTIPLICITIES:
            found[count].append(
                run.partial(
                    f"countries/{count}/{seed}", lambda k=count, s=seed: runs.countries(size, k, s)
                )
            )
    unseen = np.array([[100 * one["unseen"] for one in found[count]] for count in MULTIPLICITIES])
    gain = unseen[-1] - unseen[0]
    run.record(
        "countries",
        here={f"K = {k}": float(row.mean()) for k, row in zip(MULTIPLICITIES, unseen, strict=True)},
        holds=bool((np.diff(unseen, axis=0) >= 0).all() and (gain > 0).all()),
        setting=f"{size.countries} countries, {len(runs.TEMPLATES)} templates, {size.layers} layers of width {size.width}, "
        f"{size.asked} questions, {len(seeds)} seed(s)",
        note="; ".join(
            f"K = {k}: sentences of pre-training completed {100 * np.mean([o['stored'] for o in rows]):.0f} %, fine-tuned "
            f"questions {100 * np.mean([o['seen'] for o in rows]):.0f} %, untouched ones by seed "
            + ", ".join(f"{100 * o['unseen']:.0f} %" for o in rows)
            for k, rows in found.items()
        ),
    )


def draw_courses(found: dict[str, Any]) -> Figure:
    """Loss on untouched facts along fine-tuning, and where it ends."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    names = {"full": "W1, W2 and W, constant rate", "falling": "falling rate", "adam": "Adam"}
    for i, (key, one) in enumerate(found.items()):
        label = names.get(key, f"LoRA, {key}")
        axes[0].plot(one["course"], color=f"C{i}", label=label, lw=1.3)
        mean, half = interval(100 * np.array(one["unseen"]))
        axes[1].errorbar([i], [mean], yerr=[half], fmt="o", color=f"C{i}", capsize=3)
    axes[0].set(xlabel="step of fine-tuning", ylabel="loss on untouched facts, nats", yscale="log")
    axes[0].legend(frameon=False, fontsize=8)
    axes[1].set_xticks(range(len(found)), list(found), rotation=20)
    axes[1].set(ylabel="accuracy on untouched facts, %", ylim=(-5, 108))
    return figure
