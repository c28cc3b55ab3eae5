"""Flowformer (arXiv 2202.06258): linear attention whose flow is conserved, so that sources compete and sinks share.

Checked here:

* conservation, and the linear and causal forms against the matrix and the step by step recurrence, in float64;
* what clipping, which the released code does in some of its files, flattens;
* two classification tasks (digits as 16 tokens, the order of events in noise): flow, softmax, plain linear attention, flow
  without competition and without allocation, in one host;
* character models on English prose, and how flat the weights that they learn are;
* time, and memory kept for the backward pass, by length.

Beyond our scale: ImageNet, Long Range Arena, D4RL, Wikitext-103. The paper's time-series sets (UEA) are not shipped with the
project's dependencies and are not measured.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from regard.metrics import paired
from regard.ops import causal_flow_attention
from regard.papers import Claim, Paper, Run
from regard.papers._flowformer_runs import (
    CAUSAL,
    ENCODERS,
    Encoder,
    Sequences,
    Writing,
    classify,
    clipped_share,
    conservation,
    deviations,
    digits,
    kept_for_backward,
    order_of_events,
    seconds,
    slope,
    softmax_by_matrix,
    write,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAPER = Paper(
    "flowformer",
    claims=[
        Claim(
            "conservation",
            "Conserved incoming flows add up to the number of sources, outgoing ones to that of sinks: largest relative error",
            setting="by construction",
            expect="below 1e-4 (eps is 1e-6)",
            holds=lambda worst: worst < 1e-4,
        ),
        Claim(
            "exact",
            "The linear order of products equals the matrix, the causal form equals steps, and the future changes no past output",
            setting="not in the paper: a check of the implementation",
            expect="all below 1e-9 in float64",
            holds=lambda found: max(found.values()) < 1e-9,
        ),
        Claim(
            "clipping",
            "Clipping the outgoing flow to [-1, 1], as parts of the released code do, levels about half of the sources: share"
            " above 1",
            setting="not in the paper; its mean is n / m by conservation",
            unit=" %",
            expect="35 to 65 % for n = m, above 95 % for n = 4 m, below 5 % for 4 n = m",
            holds=lambda share: (
                35 < share["n = m"] < 65 and share["n = 4 m"] > 95 and share["4 n = m"] < 5
            ),
        ),
        Claim(
            "classification",
            "Flow attention classifies sequences as well as softmax attention: points of accuracy above it",
            setting="10 UEA time-series sets",
            paper="73.0 % against 71.9 %",
            unit=" points",
            expect="at least -1.5 points on average over tasks and seeds",
            holds=lambda points: points >= -1.5,
        ),
        Claim(
            "linear",
            "Flow attention classifies better than plain linear attention (elu + 1): points of accuracy above it",
            setting="10 UEA time-series sets; the paper's linear baseline has another host",
            unit=" points",
            expect="above 0, interval included",
        ),
        Claim(
            "competition",
            "Without competition accuracy falls: points lost",
            setting="ablations on Long Range Arena and others",
            unit=" points",
            expect="above 0, interval included",
        ),
        Claim(
            "allocation",
            "Without allocation accuracy falls: points lost",
            setting="ablations on Long Range Arena and others",
            unit=" points",
            expect="above 0, interval included",
        ),
        Claim(
            "text",
            "Causal flow attention predicts text at least as well as softmax attention: bits a character above it",
            setting="Wikitext-103",
            paper="perplexity 30.8 against 33.0",
            unit=" bits",
            expect="at most 0",
            holds=lambda bits: bits <= 0,
        ),
        Claim(
            "text-linear",
            "Causal flow attention predicts text better than plain linear attention: bits a character below it",
            setting="Wikitext-103",
            unit=" bits",
            expect="above 0, interval included",
        ),
        Claim(
            "flatness",
            "Trained flow attention is no flatter than plain linear attention: entropy of weights over its maximum",
            setting="the paper's reason for competition: linear attention degenerates to flat weights",
            expect="flow at most plain linear, in every seed",
        ),
        Claim(
            "time",
            "Time grows linearly with length, that of softmax attention with its square: exponents",
            setting="more than 4000 tokens on a GPU",
            paper="linear",
            expect="flow below 1.2, softmax above 1.7",
            holds=lambda found: found["flow"] < 1.2 and found["softmax"] > 1.7,
        ),
        Claim(
            "memory",
            "Memory kept for the backward pass grows linearly with length: exponents",
            setting="more than 4000 tokens on a GPU",
            paper="linear",
            expect="flow below 1.1, softmax with its matrix above 1.7",
            holds=lambda found: found["flow"] < 1.1 and found["softmax by matrix"] > 1.7,
        ),
        Claim(
            "benchmarks",
            "Long Range Arena 56.48 (Performer 51.41), ImageNet-1K 80.6 %, D4RL 73.5",
            setting="GPU training from scratch",
            paper="56.48; 80.6 %; 73.5",
            beyond="needs GPU training on data sets of their own",
        ),
    ],
    needs=("matplotlib", "sklearn", "accelerate"),
)


def experiment(run: Run) -> None:
    run.seed(0)
    run.record(
        "conservation", here=conservation(), note="float64; 16 to 200 queries and keys of 4 sizes"
    )
    run.record("exact", here=deviations(), note="150 tokens, 4 heads of 16")
    share = {name: round(value, 1) for name, value in clipped_share().items()}
    run.record("clipping", here=share, note="normal queries and keys, 8 heads of 64")
    classification(run)
    text(run)
    cost(run)


def classification(run: Run) -> None:
    """Every attention on both tasks, over seeds."""
    seeds = run.pick(quick=[0], full=[0, 1, 2])
    steps = run.pick(quick=2, full=400)
    data: dict[str, Sequences] = {
        "digits": digits(),
        "order of events": order_of_events(run.pick(quick=300, full=2000)),
    }
    cases = [(task, name, seed) for task in data for name in ENCODERS for seed in seeds]
    found: dict[tuple[str, str], list[float]] = {}
    for task, name, seed in run.progress(cases, "classifying"):

        def fit(task: str = task, name: str = name, seed: int = seed) -> float:
            run.seed(seed)
            return classify(Encoder(data[task], ENCODERS[name]), data[task], steps, seed)

        value = run.partial(f"classify/{task}/{name}/{seed}", fit)
        found.setdefault((task, name), []).append(value)
    setting = f"digits as 16 tokens and the order of events in 24; 2 layers of width 32, {steps} steps, {len(seeds)} seeds a task"

    def against(name: str) -> Any:
        flow = [value for task in data for value in found[task, "flow"]]
        return paired(flow, [value for task in data for value in found[task, name]])

    means = {
        task: ", ".join(f"{name} {mean(found[task, name]):.1f}" for name in ENCODERS)
        for task in data
    }
    every = "; ".join(f"{task}: {line} %" for task, line in means.items())
    estimate = against("softmax")
    run.record(
        "classification",
        here=round(estimate.mean, 2),
        interval=estimate.ends,
        setting=setting,
        note=every,
    )
    for claim, name in (
        ("linear", "linear"),
        ("competition", "no competition"),
        ("allocation", "no allocation"),
    ):
        estimate = against(name)
        by_task = {task: mean(found[task, "flow"]) - mean(found[task, name]) for task in data}
        run.record(
            claim,
            here=round(estimate.mean, 2),
            interval=estimate.ends,
            holds=estimate.low > 0 if run.scale == "full" else estimate.mean > 0,
            setting=setting,
            note=", ".join(f"{task} {points:+.1f}" for task, points in by_task.items())
            + "; paired over tasks and seeds, percentile bootstrap",
        )
    run.figure("classification", draw_classification(found, list(data)))


def text(run: Run) -> None:
    """Character models of every causal mixer."""
    seeds = run.pick(quick=[0], full=[0, 1, 2])
    setting = run.pick(
        quick=Writing(length=32, steps=3, batch=4, width=32, samples=8), full=Writing()
    )
    cases = [(name, seed) for seed in seeds for name in CAUSAL]
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in CAUSAL}
    for name, seed in run.progress(cases, "writing"):
        run.seed(seed)
        kept = run.partial(f"write/{name}/{seed}", lambda n=name, s=seed: write(n, setting, s))
        found[name].append(kept)
    bits = {name: [one["bits"] for one in runs] for name, runs in found.items()}
    where = (
        f"bytes of English prose, {setting.length} at a time; 2 layers of width {setting.width}, embedded positions for all,"
        f" {setting.steps} steps of {setting.batch}, {len(seeds)} seeds"
    )
    every = ", ".join(f"{name} {mean(values):.3f}" for name, values in bits.items()) + " bits"
    softmax, linear = paired(bits["flow"], bits["softmax"]), paired(bits["linear"], bits["flow"])
    run.record(
        "text", here=round(softmax.mean, 4), interval=softmax.ends, setting=where, note=every
    )
    run.record(
        "text-linear",
        here=round(linear.mean, 4),
        interval=linear.ends,
        holds=linear.low > 0 if run.scale == "full" else linear.mean > 0,
        setting=where,
        note="by seed: "
        + ", ".join(f"{a - b:+.3f}" for a, b in zip(bits["linear"], bits["flow"], strict=True)),
    )
    flat = {name: [one["flatness"] for one in runs] for name, runs in found.items()}
    run.record(
        "flatness",
        here={name: round(mean(values), 3) for name, values in flat.items()},
        holds=all(a <= b for a, b in zip(flat["flow"], flat["linear"], strict=True)),
        setting=where,
        note="of the outputs for unit-vector values, rows scaled to 1, mean of rows, heads and layers of the character models;"
        " 1 is uniform",
    )


def cost(run: Run) -> None:
    """Exponents of time and memory."""
    run.seed(0)
    lengths = run.pick(quick=[256, 512], full=[1024, 2048, 4096, 8192, 16384])
    short = [n for n in lengths if n <= 4096]  # a matrix of 16384^2 numbers would need a gigabyte
    times: dict[str, list[float]] = {"flow": [], "softmax": []}
    memory: dict[str, list[float]] = {"flow": [], "softmax by matrix": []}

    def flow(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return causal_flow_attention(q, k, v)[0]

    def softmax(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    for n in run.progress(lengths, "timing"):
        inputs = torch.randn(3, 1, 1, n, 64).unbind()
        times["flow"].append(seconds(lambda x=inputs: flow(*x)))
        times["softmax"].append(seconds(lambda x=inputs: softmax(*x), repeats=2))
        learnt = [part.requires_grad_() for part in inputs]
        memory["flow"].append(kept_for_backward(lambda x=learnt: flow(*x)))
        if n in short:
            kept = kept_for_backward(lambda x=learnt: softmax_by_matrix(*x))
            memory["softmax by matrix"].append(kept)
    where = f"one head of 64, {lengths[0]} to {lengths[-1]} tokens"
    faster = [n for n, a, b in zip(lengths, times["flow"], times["softmax"], strict=True) if a < b]
    run.record(
        "time",
        here={name: round(slope(lengths, values), 2) for name, values in times.items()},
        setting=f"processor time of the causal forward pass, {where}",
        note=f"at {lengths[-1]} tokens flow takes {times['flow'][-1]:.3g} s, fused softmax {times['softmax'][-1]:.3g} s; "
        + (
            f"flow is faster from {faster[0]} tokens on"
            if faster
            else "flow is not faster at any of these lengths"
        ),
    )
    run.record(
        "memory",
        here={
            name: round(slope(lengths[: len(values)], values), 2) for name, values in memory.items()
        },
        setting=f"bytes of all tensors kept by autograd, {where}, the matrix up to {short[-1]}",
        note=f"at {short[-1]} tokens {memory['flow'][len(short) - 1]:.0f} and {memory['softmax by matrix'][-1]:.0f} MB; fused"
        " softmax kernels keep no matrix either",
    )
    run.figure("cost", draw_cost(lengths, times, memory))


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def draw_classification(found: dict[tuple[str, str], list[float]], names: list[str]) -> Figure:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(names), figsize=(8, 2.8), layout="constrained")
    for ax, task in zip(axes, names, strict=True):
        for row, name in enumerate(ENCODERS):
            values = found[task, name]
            ax.plot(values, [row] * len(values), "o", color="tab:blue", alpha=0.6, ms=5)
            ax.plot(mean(values), row, "|", color="black", ms=14, mew=2)
        ax.set(title=task, xlabel="accuracy, %", yticks=range(len(ENCODERS)))
        ax.set_yticklabels(list(ENCODERS) if ax is axes[0] else [])
        ax.grid(axis="x", alpha=0.3)
        ax.invert_yaxis()
    return figure


def draw_cost(
    lengths: list[int], times: dict[str, list[float]], memory: dict[str, list[float]]
) -> Figure:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
    for ax, curves, label in (
        (axes[0], times, "processor time, s"),
        (axes[1], memory, "kept for backward, MB"),
    ):
        for name, values in curves.items():
            known = lengths[: len(values)]
            exponent = slope(known, values)
            ax.loglog(known, values, "o-", label=f"{name} (exponent {exponent:.2f})")
        ax.set(xlabel="tokens", ylabel=label)
        ax.set_xticks(lengths, [str(n) for n in lengths], fontsize=8)
        ax.minorticks_off()
        ax.legend(fontsize=8)
    return figure
