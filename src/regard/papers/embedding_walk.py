"""Analyzing Transformer Dynamics as Movement through Embedding Space (arXiv 2308.10874): walks, concepts, a mean for attention.

A position paper with two experiments. Checked here on SmolLM2-135M and in the laboratory `embedding-walk`:

* the walk: its steps add up, how straight it is, when the token that will be said is first nearest, whether order matters;
* T2, choices by the product of aggregated vectors, over a grid of ways to aggregate; the way is chosen on one half of the
  items and tested on the other, beside a bag of words; T1, choices by likelihood behind aggregated vectors;
* whether attention's association is redundant: weights replaced by a running mean, layer by layer and everywhere;
* in the laboratory: what sums of random vectors must give, and two tasks that need association less and more.

The paper's tasks and models are larger (HellaSwag, WebQs, 1.3 to 7.1 B parameters). The items here are sentences of Python's
reference, cut at 60 % of their words; measures of the walk and the replacements are ours, as the paper describes them in words.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from regard.labs.embedding_walk import EmbeddingWalk
from regard.labs.embedding_walk.laboratory import REDUNDANT
from regard.papers import Claim, Paper, Run
from regard.papers import _embedding_walk_runs as runs
from regard.papers._embedding_walk_figures import (
    draw_association,
    draw_concepts,
    draw_steps,
    draw_walk,
)

if TYPE_CHECKING:
    pass

GRID = (0, 5, 10, 15, 20, -1)
MIDDLE = 15
MIXES = (0.1, 0.25, 0.5)

PAPER = Paper(
    "embedding-walk",
    claims=[
        Claim(
            "sum",
            "A pass is a walk: the last state is the first plus what attention and MLPs add, largest relative gap of a token",
            setting="the paper's view",
            paper="0",
            expect="below 1e-4",
            holds=lambda gap: gap < 1e-4,
        ),
        Claim(
            "straight",
            "Trained steps pull one way: displacement over that of as long steps which know nothing of each other, median",
            setting="our measure",
            expect="above 1, the whole interval",
        ),
        Claim(
            "late",
            "What will be said is settled late: block of 30 after which the final nearest token is first nearest, median",
            setting="our measure",
            expect="above 20, two thirds of the way",
            holds=lambda block: block > 20,
        ),
        Claim(
            "order",
            "A context vector folds in the order of the tokens: |C - C'| / |C| after the others were shuffled, median",
            setting="the paper's view",
            expect="above 0.1",
            holds=lambda effect: effect > 0.1,
        ),
        Claim(
            "cross",
            "Ordinary scoring, the ceiling: share of items whose own ending is likeliest",
            setting="the paper's baseline",
            unit=" %",
            expect="above 50 %, so that the items can be solved",
            holds=lambda share: share > 50,
        ),
        Claim(
            "t2",
            "T2: products of aggregated vectors choose better than chance: right with the best way, on other items",
            setting="GPT-Neo-1.3B, 5-shot HellaSwag",
            paper="29.7 +- 1.4 %, chance 25 %",
            unit=" %",
            expect="above the 95 % band of guesses",
        ),
        Claim(
            "t2 settings",
            "... for many ways to aggregate: share of the grid above the band of guesses",
            setting="GPT-Neo 1.3B and 2.7B, BLOOMZ-7.1B, Flan-T5-XL",
            paper="many",
            unit=" %",
            expect="at least half",
            holds=lambda share: share >= 50,
        ),
        Claim(
            "t2 words",
            "... and better than shared words: right answers above those of a bag of words, same items",
            setting="our control",
            unit=" points",
            expect="above 0, the whole interval; undecided when it holds 0",
        ),
        Claim(
            "first",
            "A mean needs the first token's state left out: right answers gained by leaving it out, middle layer",
            setting="our control",
            unit=" points",
            expect="above 0, the whole interval; undecided when it holds 0",
        ),
        Claim(
            "t1 mean",
            "T1: a model tells its ending from others behind one aggregated vector: right with the mean of -act(-E)",
            setting="GPT-Neo-1.3B, 5-shot HellaSwag",
            paper="31.8 %, chance 25 %",
            unit=" %",
            expect="above the 95 % band of guesses",
        ),
        Claim(
            "t1 all",
            "T1 behind all top states, one for each token",
            setting="GPT-Neo 1.3B and larger",
            paper="above chance",
            unit=" %",
            expect="above the 95 % band of guesses",
        ),
        Claim(
            "t1 bare",
            "T1 with a decoder without parameters: right behind input embeddings",
            setting="the paper's parameterless decoder",
            unit=" %",
            expect="above the 95 % band of guesses",
        ),
        Claim(
            "redundant layer",
            f"Association is redundant in single layers: share of layers where a running mean costs below {REDUNDANT} nats",
            setting="conjecture",
            unit=" %",
            expect="above 50 %",
            holds=lambda share: share > 50,
        ),
        Claim(
            "redundant",
            "Association is redundant: nats that a running mean in all layers costs",
            setting="conjecture",
            paper="0",
            unit=" nats",
            expect=f"below {REDUNDANT}",
            holds=lambda cost: cost < REDUNDANT,
        ),
        Claim(
            "sums",
            "Sums of random vectors choose as often as they must: measured over predicted share, the worst of all lengths",
            setting="laboratory, our prediction",
            expect="1 within 2/d and the error bar",
        ),
        Claim(
            "sink",
            "... and lose what a constant vector in front of every text must cost: the same behind a sink",
            setting="laboratory, our prediction",
            expect="1 within 2/d and the error bar",
        ),
        Claim(
            "counts",
            "Where counts are enough a running mean does as well: nats that it costs a trained layer",
            setting="laboratory",
            unit=" nats",
            expect=f"below {REDUNDANT}, for a layer that has learnt",
        ),
        Claim(
            "pairs",
            "Where a pair must be found association is needed: nats that a running mean costs a trained layer",
            setting="laboratory",
            unit=" nats",
            expect=f"above {REDUNDANT}, for a layer that has learnt",
        ),
        Claim(
            "larger",
            "T1 and T2 on HellaSwag and WebQs with models of billions of parameters",
            setting="GPT-Neo 1.3B and 2.7B, BLOOMZ-7.1B, Flan-T5-XL",
            paper="some evidence above chance",
            beyond="the data sets and models of this size are not at hand",
        ),
    ],
    needs=("matplotlib", "scipy"),
)


def experiment(run: Run) -> None:
    run.seed(0)
    record_laboratory(run)
    record_walks(run)
    record_concepts(run)
    record_association(run)


def record_laboratory(run: Run) -> None:
    settings = run.pick(
        quick={
            "steps": 2,
            "samples": 16,
            "trials": 200,
            "seeds": 2,
            "words": (2,),
            "sinks": (0.0, 2.0),
        },
        full={},
    )
    result = EmbeddingWalk(**settings).run()
    worst = max(
        (result.checks[name] for name in ("mean", "w1mean")),
        key=lambda one: abs(one.measured - one.predicted),
    )
    for claim, one in (("sums", worst), ("sink", result.checks["sink"])):
        ratio, bar = one.measured / one.predicted, one.error / one.predicted
        run.record(
            claim,
            here=ratio,
            interval=(ratio - bar, ratio + bar),
            holds=one.holds,
            setting="64 dimensions, choices of 3 words, 4 choices",
            note=f"{one.says}: {one.measured:.3f}, predicted {one.predicted:.3f}; interval: 95 %"
            + ("" if one.holds is not None else "; the error bar leaves it open"),
        )
    for claim, name in (("counts", "bags"), ("pairs", "lookups")):
        one, curve = result.checks[name], result.series[name].measured
        learnt = "" if one.holds is not None else "the layer has not learnt the task; "
        run.record(
            claim,
            here=float(curve[-1] - curve[0]),
            holds=one.holds,
            setting=f"one layer, two heads, width 32, task {name}",
            note=f"{learnt}nats at e = 0: {curve[0]:.3f}, at e = 1: {curve[-1]:.3f}",
        )
    if not run.quick:
        run.figure("laboratory", result.plot(["walk", "concepts", "association"]))


def record_walks(run: Run) -> None:
    model = run.model()
    count, length = run.pick(quick=(1, 5), full=(24, 20))
    found = run.partial("walks", lambda: runs.walks(model, count, length, seed=3))
    here = f"SmolLM2-135M-Instruct (4-bit weights), {count} passages of {length} tokens, the first token aside"
    shown = ", ".join(
        f"{100 * part:.0f} %" for part in (np.mean(found["share"]), *sorted(found["share"])[::29])
    )
    ratio, _ = runs.resampled(np.array(found["tortuosity"]))
    run.record(
        "sum",
        here=found["gap"],
        setting=here,
        note=f"all tokens; the path is {ratio:.2f} times as long as the displacement (mean over passages of the median token)",
    )
    middle, ends = runs.resampled(np.array(found["straight"]))
    run.record(
        "straight",
        here=middle,
        interval=ends,
        holds=ends[0] > 1,
        setting=here,
        note="mean over passages of the median token; interval: 95 % bootstrap over passages; attention's share of step lengths: "
        f"mean, least and most of the layers {shown}",
    )
    sites = np.array(found["arrival"])
    run.record(
        "late",
        here=float(np.median(sites)),
        interval=tuple(np.quantile(sites, [0.25, 0.75])),
        setting=here,
        note=f"interval: quartiles of {len(sites)} tokens; the passages cost {found['nats']:.2f} nats a token",
    )
    effect = np.array(found["order"])
    run.record(
        "order",
        here=float(np.median(effect)),
        interval=(float(effect.min()), float(effect.max())),
        setting=here,
        note="the last token stays in place; interval: range over passages",
    )
    if not run.quick:
        run.figure("walk", draw_walk(model))
        run.figure("steps", draw_steps(found))


def record_concepts(run: Run) -> None:
    model = run.model()
    count, scored = run.pick(quick=(4, 1), full=(320, 100))
    layers = run.pick(quick=(0, MIDDLE), full=GRID)
    made, endings = runs.items(count, seed=1)
    half = count // 2
    kept = runs.Cell(MIDDLE, "identity", "mean", "none", drop_first=False)
    found = run.partial(
        "similarity",
        lambda: runs.choices_by_similarity(model, made, endings, layers, [kept]),
    )
    words = np.array(runs.bag_of_words(made, endings), float)
    low, high = runs.chance_band(count - half)
    here = f"SmolLM2-135M-Instruct, {count} sentences of Python's reference; chosen on {half}, tested on the others"
    best = runs.best_cell(found, half)
    right = np.array(found[best], float)
    middle, ends = runs.share(right[half:].tolist())
    run.record(
        "t2",
        here=100 * middle,
        interval=(100 * ends[0], 100 * ends[1]),
        holds=middle > high,
        setting=here,
        note=f"chosen: {best}, {100 * right[:half].mean():.0f} % on the items it was chosen on; 95 % of guesses lie in "
        f"{100 * low:.0f} to {100 * high:.0f} %; interval: 95 % bootstrap",
    )
    wide = runs.chance_band(count)[1]
    grid = {name: np.mean(rows) for name, rows in found.items() if "first kept" not in name}
    above = [name for name, rate in grid.items() if rate > wide]
    run.record(
        "t2 settings",
        here=100 * len(above) / len(grid),
        setting=f"{len(grid)} ways, all {count} items",
        note=f"band ends at {100 * wide:.1f} %; best {max(grid, key=grid.__getitem__)} {100 * max(grid.values()):.0f} %, "
        f"worst {min(grid, key=grid.__getitem__)} {100 * min(grid.values()):.0f} %",
    )
    gain, ends = runs.resampled((right - words)[half:])
    run.record(
        "t2 words",
        here=100 * gain,
        interval=(100 * ends[0], 100 * ends[1]),
        holds=sign(ends),
        setting=here,
        note=f"bag of words, cosine of counts: {100 * words[half:].mean():.0f} %; interval: 95 % bootstrap over items, paired",
    )
    dropped = runs.Cell(MIDDLE, "identity", "mean", "none")
    rates = {cell: np.array(found[str(cell)], float) for cell in (dropped, kept)}
    gain, ends = runs.resampled(rates[dropped] - rates[kept])
    run.record(
        "first",
        here=100 * gain,
        interval=(100 * ends[0], 100 * ends[1]),
        holds=sign(ends),
        setting=f"layer {MIDDLE} of 30, mean, no norm, all {count} items",
        note=f"{100 * rates[dropped].mean():.0f} % without, {100 * rates[kept].mean():.0f} % with it; interval: 95 % bootstrap "
        "over items, paired",
    )
    told = run.partial(
        "generation",
        lambda: runs.choices_by_generation(model, made[half : half + scored], endings),
    )
    record_generation(run, told, scored)
    if not run.quick:
        run.figure("concepts", draw_concepts(found, told, words, layers, count, scored))


def record_generation(run: Run, told: dict[str, list[bool]], scored: int) -> None:
    low, high = runs.chance_band(scored)
    here = f"SmolLM2-135M-Instruct, {scored} of the test items; vectors rescaled to the mean length of input embeddings"
    for claim, name in (
        ("cross", "cross"),
        ("t1 mean", "embedding mean"),
        ("t1 all", "top all"),
        ("t1 bare", "bare"),
    ):
        middle, ends = runs.share(told[name])
        verdict: dict[str, Any] = {} if claim == "cross" else {"holds": middle > high}
        more = ""
        if claim == "t1 mean":
            more = f"; the mean of top states: {100 * np.mean(told['top mean']):.0f} %"
        run.record(
            claim,
            here=100 * middle,
            interval=(100 * ends[0], 100 * ends[1]),
            setting=here,
            note=f"95 % of guesses lie in {100 * low:.0f} to {100 * high:.0f} %{more}; interval: 95 % bootstrap",
            **verdict,
        )


def record_association(run: Run) -> None:
    model = run.model()
    count, length = run.pick(quick=(1, 8), full=(8, 48))
    layers = run.pick(quick=(0, MIDDLE), full=tuple(range(30)))
    mixes = run.pick(quick=MIXES[:1], full=MIXES)
    found = run.partial(
        "association",
        lambda: runs.replaced_attention(model, count, length, layers, mixes, seed=5),
    )
    clean = np.array(found["clean"])
    costs = np.array(found["by layer"]) - clean
    cheap = [layer for layer, row in zip(layers, costs, strict=True) if row.mean() < REDUNDANT]
    here = f"SmolLM2-135M-Instruct, {count} windows of {length} tokens, clean loss {clean.mean():.2f} nats"
    worst = sorted(zip(costs.mean(1), layers, strict=True), reverse=True)[:3]
    run.record(
        "redundant layer",
        here=100 * len(cheap) / len(layers),
        setting=here,
        note="dearest layers: " + ", ".join(f"{layer} ({cost:.2f} nats)" for cost, layer in worst),
    )
    everywhere = {name: np.array(rows) - clean for name, rows in found["all"].items()}
    middle, ends = runs.resampled(everywhere["running mean"])
    others = ", ".join(
        f"{name} {rows.mean():.2f}" for name, rows in everywhere.items() if name != "running mean"
    )
    mixed = ", ".join(
        f"{100 * mix:.0f} % {np.mean(rows) - clean.mean():.2f}"
        for mix, rows in zip(mixes, found["mixed"], strict=True)
    )
    run.record(
        "redundant",
        here=middle,
        interval=ends,
        setting=here,
        note=f"other weights that do not look at tokens: {others}; mixed in: {mixed} nats. A running mean also takes the "
        "sink away, where heads park that have nothing to add; interval: 95 % bootstrap over windows",
    )
    if not run.quick:
        run.figure("association", draw_association(found, clean, costs, mixes))


def sign(ends: tuple[float, float]) -> bool | None:
    """Whether an interval lies above 0; None when it holds 0."""
    return True if ends[0] > 0 else False if ends[1] < 0 else None
