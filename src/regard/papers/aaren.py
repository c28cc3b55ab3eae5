"""Attention as an RNN (arXiv 2405.13956): softmax attention of a learned query, computed by a scan, updated in constant memory.

Checked here:

* scan, recurrence and softmax of every prefix in float64, their gradients, and the algebra of the merge;
* streaming: outputs, memory and time of a token against a growing key-value cache;
* classification (digits as 16 tokens, the order of events in noise), forecasting (a seasonal series, 96 to 24) and events (a
  Hawkes process with three marks): Aaren, a causal Transformer and, for classification, a GRU;
* associative recall, where a query that does not depend on the token must fail.

Beyond our scale: D4RL and the 38 data sets. The paper's time-series sets (UEA) are not shipped with the project's dependencies
and are not measured.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from regard.metrics import paired
from regard.nn import LanguageModel, LanguageModelConfig
from regard.papers import Claim, Paper, Run
from regard.papers._aaren_runs import (
    classifier,
    continue_series,
    cumulative,
    deviations,
    expect_events,
    hawkes,
    lookups,
    naive_errors,
    seasonal_series,
    step_cost,
    streamed,
)
from regard.papers._flowformer_runs import classify, digits, order_of_events, slope

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAPER = Paper(
    "aaren",
    claims=[
        Claim(
            "exact",
            "Scan, recurrence and softmax of every prefix agree, gradients too, and merging is associative: largest differences",
            setting="by construction; scores 30 times normal, float64",
            expect="all below 1e-10",
            holds=lambda found: max(found.values()) < 1e-10,
        ),
        Claim(
            "parameters",
            "A model of Aarens has one vector a layer more than a Transformer: numbers more than layers x width",
            setting="the paper's example: 3,152,896 against 3,152,384 parameters",
            paper="+0.016 %",
            expect="0",
            holds=lambda more: more == 0,
        ),
        Claim(
            "streaming",
            "Tokens given one by one give the outputs of all at once, three layers: largest difference",
            setting="by construction; float64",
            expect="below 1e-9, with a state whose size never changes",
        ),
        Claim(
            "memory",
            "Memory is constant in the number of tokens, that of a key-value cache linear: exponents",
            setting="figure of memory by tokens",
            paper="constant against linear",
            expect="below 0.05 against 0.9 to 1.1",
            holds=lambda found: found["aaren"] < 0.05 and 0.9 < found["softmax"] < 1.1,
        ),
        Claim(
            "time",
            "Cumulative time is linear in the number of tokens, that of a key-value cache quadratic: exponents at the far end",
            setting="figure of cumulative time by tokens",
            paper="linear against quadratic",
            expect="below 1.1 against more than 1.7",
            holds=lambda found: found["aaren"] < 1.1 and found["softmax"] > 1.7,
        ),
        Claim(
            "classification",
            "Aaren classifies sequences as well as a causal Transformer: points of accuracy above it",
            setting="10 UEA time-series sets",
            paper="comparable",
            unit=" points",
            expect="within 3 points, mean over tasks and seeds",
            holds=lambda points: abs(points) <= 3,
        ),
        Claim(
            "forecasting",
            "Aaren forecasts as well as a causal Transformer: its squared error over the Transformer's",
            setting="8 time-series sets",
            paper="comparable",
            expect="at most 1.1, and both better than repeating the last value or day",
        ),
        Claim(
            "events",
            "Aaren expects events as well as a causal Transformer: nats an event above it",
            setting="8 event sets, log-normal mixtures",
            paper="comparable",
            unit=" nats",
            expect="at most 0.05",
            holds=lambda nats: nats <= 0.05,
        ),
        Claim(
            "recall",
            "A learned query cannot depend on the token: in associative recall Aaren stays far below a Transformer, points",
            setting="not in the paper: the limit of the method",
            unit=" points",
            expect="at least 30, with a Transformer above 80 %",
        ),
        Claim(
            "reinforcement",
            "Comparable with a Decision Transformer on 12 D4RL sets, and on 38 sets in all",
            setting="D4RL, event, forecasting and classification sets",
            paper="comparable",
            beyond="needs data sets that are not at hand; three kinds of task are measured on others above",
        ),
    ],
    needs=("matplotlib", "sklearn", "accelerate"),
)


def experiment(run: Run) -> None:
    run.seed(0)
    run.record(
        "exact", here=deviations(), note="257 tokens, blocks of 1, 16 and 64; 1000 triples of sets"
    )
    parameters(run)
    streaming(run)
    classification(run)
    forecasting(run)
    events(run)
    recall(run)


def parameters(run: Run) -> None:
    """Counts of two models of one shape."""
    layers, width = 6, 256
    shape = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": 4}
    counts = {}
    for name in ("aaren", "softmax"):
        model = LanguageModel(LanguageModelConfig(mixers=[name], **shape))
        counts[name] = sum(p.numel() for p in model.layers.parameters())
    more = counts["aaren"] - counts["softmax"]
    run.record(
        "parameters",
        here=more - layers * width,
        note=f"{counts['aaren']} against {counts['softmax']} in {layers} layers of width {width},"
        f" {100 * more / counts['softmax']:.3f} % more",
    )


def streaming(run: Run) -> None:
    """Outputs, memory and time of a token."""
    tokens = run.pick(quick=40, full=600)
    worst, sizes = streamed(tokens)
    run.record(
        "streaming",
        here=worst,
        holds=worst < 1e-9 and len(set(sizes)) == 1,
        setting=f"3 layers of width 64, {tokens} characters",
        note=f"the state has {sizes[0]} numbers after the first token and {sizes[-1]} after the last",
    )
    contexts = run.pick(quick=[64, 128, 256], full=[256, 1024, 4096, 8192, 16384, 32768])
    cost = {
        name: step_cost(name, contexts, steps=run.pick(quick=5, full=40))
        for name in run.progress(("aaren", "softmax"), "streaming")
    }
    far = contexts[-3:]
    run.record(
        "memory",
        here={name: round(slope(contexts, found["kilobytes"]), 3) for name, found in cost.items()},
        setting=f"3 layers of width 64, {contexts[0]} to {contexts[-1]} tokens",
        note=f"at {contexts[-1]} tokens {cost['aaren']['kilobytes'][-1]:.3g} against"
        f" {cost['softmax']['kilobytes'][-1]:.3g} kB",
    )
    total = {name: cumulative(contexts, found["milliseconds"]) for name, found in cost.items()}
    run.record(
        "time",
        here={name: round(slope(far, values[-3:]), 2) for name, values in total.items()},
        setting=f"3 layers of width 64, {far[0]} to {far[-1]} tokens; the time of a token is measured after six contexts and"
        " added up along straight lines between them",
        note=f"a token after {contexts[-1]} takes {cost['aaren']['milliseconds'][-1]:.3g} ms against"
        f" {cost['softmax']['milliseconds'][-1]:.3g} ms; after {contexts[0]}, {cost['aaren']['milliseconds'][0]:.3g} against"
        f" {cost['softmax']['milliseconds'][0]:.3g} ms (lower quartiles of processor time); the cache grows by copying",
    )
    run.figure("streaming", draw_streaming(contexts, cost, total))


def classification(run: Run) -> None:
    """Aaren, a causal Transformer and a GRU on two tasks."""
    seeds = run.pick(quick=[0], full=[0, 1, 2])
    steps = run.pick(quick=2, full=400)
    data = {
        "digits": digits(),
        "order of events": order_of_events(run.pick(quick=300, full=2000)),
    }
    names = ("aaren", "softmax", "GRU")
    found: dict[tuple[str, str], list[float]] = {}
    cases = [(task, name, seed) for task in data for name in names for seed in seeds]
    for task, name, seed in run.progress(cases, "classifying"):

        def one(task: str = task, name: str = name, seed: int = seed) -> float:
            run.seed(seed)
            return classify(classifier(name, data[task]), data[task], steps, seed, rate=2e-3)

        value = run.partial(f"classify/{task}/{name}/{seed}", one)
        found.setdefault((task, name), []).append(value)
    ours = [value for task in data for value in found[task, "aaren"]]
    estimate = paired(ours, [value for task in data for value in found[task, "softmax"]])
    run.record(
        "classification",
        here=round(estimate.mean, 2),
        interval=estimate.ends,
        setting=f"digits as 16 tokens and the order of events in 24, read out at the last token; 2 layers of width 32, {steps}"
        f" steps, {len(seeds)} seeds a task",
        note="; ".join(
            f"{task}: " + ", ".join(f"{name} {mean(found[task, name]):.1f} %" for name in names)
            for task in data
        ),
    )


def forecasting(run: Run) -> None:
    """Errors on a seasonal series."""
    seeds = run.pick(quick=[0], full=[0, 1, 2])
    steps = run.pick(quick=3, full=300)
    data = seasonal_series(run.pick(quick=1500, full=6000))
    found: dict[str, list[float]] = {}
    cases = [(name, seed) for name in ("aaren", "softmax") for seed in seeds]
    for name, seed in run.progress(cases, "forecasting"):

        def one(name: str = name, seed: int = seed) -> float:
            run.seed(seed)
            return continue_series(name, data, steps, seed)

        found.setdefault(name, []).append(run.partial(f"forecast/{name}/{seed}", one))
    naive = naive_errors(data)
    ratios = [a / b for a, b in zip(found["aaren"], found["softmax"], strict=True)]
    best = min(naive.values())
    run.record(
        "forecasting",
        here=round(mean(ratios), 3),
        interval=(round(min(ratios), 3), round(max(ratios), 3)) if len(ratios) > 1 else None,
        holds=mean(ratios) <= 1.1 and max(mean(found["aaren"]), mean(found["softmax"])) < best,
        setting=f"a made series (random walk, day, week, noise), 96 to 24 hours; 2 layers of width 32, {steps} steps,"
        f" {len(seeds)} seeds",
        note=f"squared error: aaren {mean(found['aaren']):.3f}, Transformer {mean(found['softmax']):.3f}, "
        + ", ".join(f"{name} {value:.3f}" for name, value in naive.items())
        + "; the interval is the range over seeds",
    )


def events(run: Run) -> None:
    """Likelihood of waiting times of a Hawkes process."""
    seeds = run.pick(quick=[0], full=[0, 1, 2])
    steps = run.pick(quick=3, full=300)
    rows, train = run.pick(quick=(60, 40), full=(2400, 2000))
    data = hawkes(rows)
    found: dict[str, list[float]] = {}
    cases = [(name, seed) for name in ("aaren", "softmax") for seed in seeds]
    for name, seed in run.progress(cases, "events"):

        def one(name: str = name, seed: int = seed) -> float:
            run.seed(seed)
            return expect_events(name, data, train, steps, seed)

        found.setdefault(name, []).append(run.partial(f"events/{name}/{seed}", one))
    estimate = paired(found["aaren"], found["softmax"])
    truth = -float(data.density[train:, 1:].mean())
    run.record(
        "events",
        here=round(estimate.mean, 4),
        interval=estimate.ends,
        setting=f"a Hawkes process with 3 marks, 48 events a row; mixtures of 16, 2 layers of width 32, {steps} steps,"
        f" {len(seeds)} seeds",
        note=f"aaren {mean(found['aaren']):.3f}, Transformer {mean(found['softmax']):.3f}, the process itself {truth:.3f}"
        " nats an event",
    )


def recall(run: Run) -> None:
    """Associative recall."""
    seeds = run.pick(quick=[0], full=[0, 1])
    steps = run.pick(quick=2, full=1000)
    data = lookups(run.pick(quick=300, full=20_000))
    found: dict[str, list[float]] = {}
    cases = [(name, seed) for name in ("aaren", "softmax") for seed in seeds]
    for name, seed in run.progress(cases, "recall"):

        def one(name: str = name, seed: int = seed) -> float:
            run.seed(seed)
            return classify(classifier(name, data), data, steps, seed)

        found.setdefault(name, []).append(run.partial(f"recall/{name}/{seed}", one))
    ours, theirs = mean(found["aaren"]), mean(found["softmax"])
    run.record(
        "recall",
        here=round(theirs - ours, 1),
        holds=None if theirs < 80 else theirs - ours >= 30,
        setting=f"8 tokens of a key (of 16) and a value (of 16), then a key alone; 2 layers of width 32, {steps} steps,"
        f" {len(seeds)} seeds",
        note=f"Transformer {theirs:.1f} %, aaren {ours:.1f} %; guessing a value that was shown 12.5 %"
        + ("; the Transformer has not learnt it, so nothing follows" if theirs < 80 else ""),
    )


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def draw_streaming(
    contexts: list[int], cost: dict[str, dict[str, list[float]]], total: dict[str, list[float]]
) -> Figure:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(10, 2.9), layout="constrained")
    for name, found in cost.items():
        label = {"aaren": "Aaren", "softmax": "key-value cache"}[name]
        axes[0].loglog(contexts, found["milliseconds"], "o-", label=label)
        axes[1].loglog(contexts, [value / 1000 for value in total[name]], "o-", label=label)
        axes[2].loglog(contexts, found["kilobytes"], "o-", label=label)
    labels = ("time of a token, ms", "time of all tokens, s", "memory, kB")
    for ax, text in zip(axes, labels, strict=True):
        ax.set(xlabel="tokens before it", ylabel=text)
        ax.set_xticks(contexts, [str(n) for n in contexts], fontsize=7, rotation=45)
        ax.minorticks_off()
    axes[1].set(xlabel="tokens")
    axes[0].legend(fontsize=8)
    return figure
