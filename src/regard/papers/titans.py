"""Titans (arXiv 2501.00663): a memory whose weights are written by gradient descent while a sequence is read, beside attention.

Checked here:

* the chunked form against one token at a time, in numbers and in time;
* how many pairs a matrix and a two-layer memory hold, how they forget, and what is left when a key is told again, untrained;
* a value told once, trained at one length and asked for at up to eight times that: the memory alone and as gate against
  window attention and full attention of the same width, and with the memory silenced.

Beyond our scale: language models of 340M to 760M parameters, 16K-token needles, BABILong.
Not done here: forecasting, overwriting after outer training.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from regard.ops import FastWeights, fast_weight_scan
from regard.papers import Claim, Paper, Run
from regard.papers._titans_runs import (
    by_the_token,
    fit,
    forgetting,
    overwritten,
    recall_curve,
    silence,
    speed,
    told,
    told_once,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

VALUES = 8
CHANCE = 100 / VALUES
WINDOW = 8

PAPER = Paper(
    "titans",
    claims=[
        Claim(
            "exact",
            "The chunked form equals the recurrences token by token: largest difference in float64",
            setting="section 3.2; gradients at the start of the chunk in both",
            paper="equal",
            expect="below 1e-10",
            holds=lambda worst: worst < 1e-10,
        ),
        Claim(
            "speed",
            "The chunked form against one token at a time, forward and backward on the same machine: times as fast",
            setting="not in the paper, which says that the chunked form suits matrix units",
            unit=" x",
            expect="at least 10 x",
            holds=lambda ratio: ratio >= 10,
        ),
        Claim(
            "forgetting",
            "A value fades by its age as the sum of (1 - alpha)^(age - j) eta^j: largest difference with orthonormal keys",
            setting="follows from equations 13 and 14",
            expect="below 1e-10",
            holds=lambda worst: worst < 1e-10,
        ),
        Claim(
            "matrix",
            "A matrix of 32 columns holds about 32 pairs: mean cosine of recalled values at 16 and at 64 pairs, five passes",
            setting="linear recurrent models compress into a matrix of fixed rank",
            expect="at least 0.9 at 16 and at most 0.6 at 64",
        ),
        Claim(
            "depth",
            "A memory of two layers holds more than a matrix: cosine at 64 pairs, two layers less one, five passes",
            setting="perplexity 27.01 with a deep memory, 28.49 with a linear one; LMM, 340M parameters",
            paper="+1.48 perplexity without depth",
            expect="above 0",
            holds=lambda gain: gain > 0,
        ),
        Claim(
            "overwrite",
            "Told a new value, a key gives the new one: cosine with the last value less that with the first",
            setting="the paper names overwriting as what separates delta rules and memories from linear attention",
            expect="memory at least 0.3 above linear attention",
        ),
        Claim(
            "needle",
            "A value told once is recalled at eight times the trained length by the memory alone: accuracy",
            setting="S-NIAH at 16K tokens, LMM 96.2, 80.2 and 80.6 %",
            paper="85.7 % on average",
            unit=" %",
            expect="at least 80 %",
        ),
        Claim(
            "gate",
            "So it is by memory as gate: accuracy",
            setting="S-NIAH at 16K tokens; the paper's hybrids lead its table",
            unit=" %",
            expect="at least 80 %",
        ),
        Claim(
            "window",
            "Window attention without a memory does not recall it: accuracy at eight times the trained length",
            setting="the same task; the distance is beyond the window",
            unit=" %",
            expect="at most 8 points above chance (12.5 %)",
        ),
        Claim(
            "branch",
            "In memory as gate it is the memory that recalls: accuracy lost at the trained length when its part is silenced",
            setting="not in the paper",
            unit=" points",
            expect="at least half of what is above chance",
        ),
        Claim(
            "full",
            "At eight times the trained length the memory alone answers where full attention of equal size fails: its lead",
            setting="the paper compares with Transformers at equal size on needles",
            unit=" points",
            expect="above 0",
            holds=lambda points: points > 0,
        ),
        Claim(
            "language",
            "MAC, MAG and MAL reach 25.43, 25.07 and 24.69 perplexity at 340M parameters; Transformer++ 31.52",
            setting="Wikitext, 15B tokens of training",
            paper="24.69",
            beyond="it needs models of 340M parameters trained on 15B tokens",
        ),
        Claim(
            "far",
            "Needles at 16K tokens: MAC 97.0 % on average, Mamba2 1.8 %; BABILong above GPT-4",
            setting="S-NIAH PK, N and W; models trained on 15B tokens and more",
            paper="97.0 %",
            beyond="it needs language models trained on billions of tokens",
        ),
    ],
    needs=("matplotlib",),
)


def experiment(run: Run) -> None:
    run.seed(0)
    forms(run)
    curves = capacity(run)
    run.figure("capacity", draw_capacity(curves, fades(run)))
    overwriting(run)
    found = needles(run)
    run.figure("needle", draw_needles(found))


def forms(run: Run) -> None:
    """The chunked form against the tokens in turn: numbers and time."""
    parts, initial = told(run.pick(quick=20, full=150), 8, batch=2, heads=2, double=True)
    chunked, _ = fast_weight_scan(memory=FastWeights.begin(initial, 2), chunk=16, **parts)  # pyright: ignore[reportArgumentType]
    worst = float((chunked - by_the_token(initial=initial, chunk=16, **parts)).abs().max())
    run.record("exact", here=worst, setting="two layers, momentum and decay, chunks of 16")
    tokens, chunk = run.pick(quick=(32, 16), full=(512, 64))
    took = run.partial("speed", lambda: speed(tokens, 64, chunk, run.pick(quick=1, full=3)))
    run.record(
        "speed",
        here=round(took["by the token"] / took["chunked"], 1),
        setting=f"{tokens} tokens, chunks of {chunk}, two layers 64-256-64, one thread, median of three runs",
        note=f"{took['chunked']:.0f} ms and {took['by the token']:.0f} ms on a machine with other work, timed in turn;"
        " both take gradients at the start of the chunk",
    )


def counts(run: Run) -> list[int]:
    return run.pick(quick=[4, 8], full=[4, 8, 16, 32, 64])


def capacity(run: Run) -> dict[str, list[float]]:
    """Recall by the number of stored pairs, with and without depth, momentum and decay."""
    kinds: dict[str, dict[str, Any]] = {
        "matrix, one pass": {"depth": 1, "passes": 1},
        "matrix": {"depth": 1},
        "two layers": {"depth": 2},
        "two layers, momentum 0.5": {"depth": 2, "momentum": 0.5},
        "two layers, decay 0.01": {"depth": 2, "decay": 0.01},
    }
    shared = {"passes": run.pick(quick=1, full=5), "rows": run.pick(quick=2, full=4)}
    curves = {
        name: run.partial(
            f"capacity/{name}", lambda o=options: recall_curve(counts(run), **(shared | o))
        )
        for name, options in run.progress(list(kinds.items()), "capacity")
    }
    if run.quick:
        return curves
    at = {count: place for place, count in enumerate(counts(run))}
    matrix = curves["matrix"]
    run.record(
        "matrix",
        here={"16 pairs": round(matrix[at[16]], 3), "64 pairs": round(matrix[at[64]], 3)},
        holds=matrix[at[16]] >= 0.9 and matrix[at[64]] <= 0.6,
        setting="random keys and values of 32 dimensions and norm 1, 4 draws, no training",
        note=f"32 pairs {matrix[at[32]]:.2f}; after one pass {curves['matrix, one pass'][at[16]]:.2f} at 16 and"
        f" {curves['matrix, one pass'][at[64]]:.2f} at 64",
    )
    run.record(
        "depth",
        here=round(curves["two layers"][at[64]] - matrix[at[64]], 3),
        setting="32-128-32 with first weights of unit variance and a second layer of zeros; one step writes a lone pair whole",
        note="at 64 pairs: "
        + ", ".join(f"{name} {curve[at[64]]:.2f}" for name, curve in curves.items()),
    )
    return curves


def fades(run: Run) -> dict[str, list[float]]:
    """What is left of a value by its age."""
    ages = run.pick(quick=8, full=40)
    kinds = {"alpha 0.1": (0.1, 0.0), "alpha 0.1, eta 0.6": (0.1, 0.6), "alpha 0.02": (0.02, 0.0)}
    worst, curves = 0.0, {}
    for name, (decay, momentum) in kinds.items():
        left, expected = forgetting(ages, decay, momentum)
        worst = max(worst, *(abs(a - b) for a, b in zip(left, expected, strict=True)))
        curves[name] = left
    run.record(
        "forgetting",
        here=worst,
        setting=f"a matrix, {ages} ages, three pairs of alpha and eta; without momentum it is (1 - alpha)^age",
    )
    return curves


def overwriting(run: Run) -> None:
    """Every key told twice, with two values."""
    rows = run.pick(quick=2, full=16)
    found = {name: overwritten(kind, rows=rows) for name, kind in OVERWRITERS.items()}
    new = {name: last - first for name, (first, last) in found.items()}
    run.record(
        "overwrite",
        here={name: round(value, 3) for name, value in new.items()},
        holds=new["memory"] - new["linear attention"] >= 0.3,
        setting=f"8 random keys of 32 dimensions told twice in random order, {rows} draws, no training",
        note="cosine with the last value: "
        + ", ".join(f"{name} {last:.2f}" for name, (_, last) in found.items()),
    )


OVERWRITERS: dict[str, dict[str, Any]] = {
    "linear attention": {"depth": 1, "chunk": 10**6},
    "delta rule": {"depth": 1, "chunk": 1},
    "memory": {"depth": 2, "chunk": 1},
    "memory, chunks of 4": {"depth": 2, "chunk": 4},
    "memory, momentum 0.5": {"depth": 2, "chunk": 1, "momentum": 0.5},
}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "memory alone": ("memory", {"expansion": 2, "persistent": 2}),
    "memory as gate": ("memory_as_gate", {"window": WINDOW, "expansion": 2, "persistent": 2}),
    "window attention": ("sliding", {"window": WINDOW}),
    "full attention": ("softmax", {}),
}
STEPS = {"memory as gate": 450}
"""Steps of those that need more than 250."""


def needles(run: Run) -> dict[str, list[list[float]]]:
    """Accuracy in percent of each model, by seed and length; "silenced" is the first model without its memory."""
    length = run.pick(quick=32, full=64)
    lengths = [length * factor for factor in run.pick(quick=(1, 2), full=(1, 2, 4, 8))]
    seeds = run.pick(quick=[0], full=[0, 1])
    asked = run.pick(quick=8, full=96)

    def measure(name: str, seed: int) -> dict[str, list[float]]:
        mixer, options = MODELS[name]
        task = told_once(length, 8, values=VALUES)
        steps = run.pick(quick=2, full=STEPS.get(name, 250))
        model = fit(mixer, options, task, steps=steps, seed=seed)
        tests = [told_once(size, 1, values=VALUES) for size in lengths]
        found = {name: [100 * test.accuracy(model, asked) for test in tests]}
        if name == "memory as gate":
            silence(model)
            found["silenced"] = [100 * test.accuracy(model, asked) for test in tests]
        return found

    found: dict[str, list[list[float]]] = {}
    cases = [(name, seed) for name in MODELS for seed in seeds]
    if not run.quick:
        cases.remove(("memory as gate", 1))  # the slowest, once
    for name, seed in run.progress(cases, "needles"):
        run.seed(seed)
        kept = run.partial(f"{name}/{seed}", lambda n=name, s=seed: measure(n, s))
        for kind, row in kept.items():
            found.setdefault(kind, []).append(row)
    record_needles(run, found, lengths, asked)
    return found


def record_needles(
    run: Run, found: dict[str, list[list[float]]], lengths: list[int], asked: int
) -> None:
    mean = {name: torch.tensor(rows).mean(0) for name, rows in found.items()}
    alone, gate, window, full = (mean[name] for name in MODELS)
    silenced = mean["silenced"]

    def setting(name: str) -> str:
        return (
            f"one layer of width 32, window {WINDOW}, {VALUES} values, trained {STEPS.get(name, 250)} steps of 8 samples at"
            f" {lengths[0]} tokens, asked at {lengths[-1]}; {len(found[name])} seed(s) of {asked} samples, chance {CHANCE:.1f} %"
        )

    def by_length(row: torch.Tensor) -> str:
        return "by length " + ", ".join(
            f"{size}: {value:.0f} %" for size, value in zip(lengths, row, strict=True)
        )

    for claim, name, row in (("needle", "memory alone", alone), ("gate", "memory as gate", gate)):
        ends = [seed[-1] for seed in found[name]]
        run.record(
            claim,
            here=round(float(row[-1]), 1),
            interval=(min(ends), max(ends)),
            holds=bool(row[-1] >= 80),
            setting=setting(name),
            note=f"{by_length(row)}; the interval is lowest and highest seed",
        )
    run.record(
        "window",
        here=round(float(window[-1]), 1),
        holds=bool(window[-1] <= CHANCE + 8),
        setting=setting("window attention"),
        note=by_length(window),
    )
    lost, above = float(gate[0] - silenced[0]), float(gate[0]) - CHANCE
    run.record(
        "branch",
        here=round(lost, 1),
        holds=above > 8 and lost >= above / 2,
        setting=f"{setting('memory as gate')}; this at {lengths[0]}",
        note=f"with the memory {float(gate[0]):.1f} %, silenced {float(silenced[0]):.1f} %",
    )
    run.record(
        "full",
        here=round(float(alone[-1] - full[-1]), 1),
        setting=setting("full attention"),
        note=f"full attention {by_length(full)}",
    )


def draw_capacity(curves: dict[str, list[float]], fading: dict[str, list[float]]) -> Figure:
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.4), layout="constrained")
    for name, curve in curves.items():
        left.plot([2 ** (2 + place) for place in range(len(curve))], curve, marker=".", label=name)
    left.axvline(32, color="0.6", lw=0.8, ls="--")
    left.set(
        xscale="log",
        xlabel="stored pairs (dashed: dimensions of a key)",
        ylabel="cosine with the stored value",
    )
    left.set_xticks([2 ** (2 + place) for place in range(len(next(iter(curves.values()))))])
    left.get_xaxis().set_major_formatter("{x:.0f}")
    left.minorticks_off()
    left.legend(fontsize=7)
    for name, curve in fading.items():
        right.plot(curve, label=name)
    right.set(xlabel="age, tokens", ylabel="what is left of a value", ylim=(0, None))
    right.legend(fontsize=7)
    return figure


def draw_needles(found: dict[str, list[list[float]]]) -> Figure:
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=(6, 3.2), layout="constrained")
    for name, rows in found.items():
        mean = torch.tensor(rows).mean(0).tolist()
        ax.plot([2**place for place in range(len(mean))], mean, marker=".", label=name)
    ax.axhline(CHANCE, color="0.6", lw=0.8, ls="--", label="chance")
    ax.set(
        xscale="log", xlabel="length, times the trained one", ylabel="accuracy, %", ylim=(0, 104)
    )
    ax.set_xticks([2**place for place in range(len(found["silenced"][0]))])
    ax.get_xaxis().set_major_formatter("{x:.0f}")
    ax.minorticks_off()
    ax.legend(fontsize=8)
    return figure
