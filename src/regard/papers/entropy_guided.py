"""Entropy-guided attention (arXiv 2501.03489): decoders without layer norms and activations, and their attention entropy.

Small decoders on Python source lose their nonlinearities one by one, down to softmax alone; then the scaled fused feed-forward
layer, learnt temperatures and the entropy regularizer are put in. Perplexity is per character.

Deviations: rotary positions in place of learned ones, 6 layers of width 64, a few hundred steps. Beyond our scale: the
latency and traffic of private inference, of which only the operations are counted.
"""

from __future__ import annotations

import math
from statistics import fmean
from typing import TYPE_CHECKING, Any

from regard.metrics.bootstrap import bootstrap
from regard.papers import Claim, Paper, Run
from regard.papers import _entropy_guided_runs as runs
from regard.papers._entropy_guided_runs import ARMS, PLAIN, REGULARIZED, Scale

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WHERE = "GPT-2 small, CodeParrot, 2.1B tokens, T = 128"

PAPER = Paper(
    "entropy-guided",
    claims=[
        Claim(
            "exact",
            "The regularizer read block by block equals the algorithm on dense maps: largest relative difference",
            setting="not in the paper: a check of the implementation, loss and gradients in float64",
            expect="below 1e-8",
            holds=lambda worst: worst < 1e-8,
        ),
        Claim(
            "norms",
            "Without layer norms a GELU decoder is worse: perplexity over that with norms",
            setting=WHERE,
            paper="3.20 / 2.69 = 1.19",
            unit="x",
            expect="lower end of the interval above 1",
        ),
        Claim(
            "relu",
            "Without layer norms ReLU is better than GELU: perplexity with ReLU over that with GELU",
            setting=WHERE,
            paper="2.94 / 3.20 = 0.92",
            unit="x",
            expect="upper end of the interval below 1",
        ),
        Claim(
            "collapse",
            "A decoder of softmax alone fails, its attention entropy gone in deep layers: lowest mean entropy of a layer, as a"
            " share of that of the decoder with norms and GELU",
            setting=WHERE,
            paper="NaN, entropy collapses",
            expect="diverged, or below a half",
        ),
        Claim(
            "rescue",
            "The scaled fused layer brings the softmax-only decoder back: perplexity over that of softmax alone",
            setting=WHERE,
            paper="3.48 / NaN",
            unit="x",
            expect="softmax alone diverges and it does not, or upper end of the interval below 1",
        ),
        Claim(
            "overload",
            "Temperatures and regularizer lower the share of early heads in the top quarter of entropy: difference in points",
            setting=WHERE,
            paper="fewer heads near the maximum",
            unit=" points",
            expect="below 0 at the best strength",
            holds=lambda points: points < 0,
        ),
        Claim(
            "regularized",
            "Temperatures and regularizer lower perplexity of the softmax-only decoder: change at the best strength",
            setting=WHERE,
            paper="-7.8 %",
            unit=" %",
            expect="upper end of the interval below 0",
        ),
        Claim(
            "levels",
            "Learnt levels differ between heads: standard deviation over heads, all starting at 0.5",
            setting=WHERE,
            paper="non-uniform across heads and layers",
            expect="above 0.01 at the best strength",
            holds=lambda spread: spread > 0.01,
        ),
        Claim(
            "operations",
            "Feed-forward products of the fused layer against two layers of 4 width: factor saved",
            setting="d = 768, T = 128: 14.5B to 1.8B",
            paper="8",
            unit="x",
            expect="8",
            holds=lambda factor: factor == 8,
        ),
        Claim(
            "private",
            "Private inference takes 3.94 x less traffic and 1.72 x less time",
            setting="GPT-2 small, T = 128, secure two-party computation",
            paper="25.32 to 6.43 GB, 8.21 to 4.76 min",
            beyond="needs a secure-computation stack; the operations that it pays for are counted above",
        ),
    ],
    needs=("matplotlib",),
)


def experiment(run: Run) -> None:
    run.seed(0)
    run.record(
        "exact",
        here=runs.largest_difference(),
        note="2 layers, 4 heads, rotary, per-position temperatures",
    )
    scale = run.pick(
        quick=Scale(steps=3, layers=2, width=16, tokens=16, batch=4, windows=4),
        full=Scale(steps=300),
    )
    seeds = run.pick(quick=[0], full=[0, 1])
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in ARMS}
    cases = [(name, seed) for seed in seeds for name in ARMS]
    for name, seed in run.progress(cases, "training"):
        run.seed(seed)
        found[name].append(
            run.partial(f"{name}/{seed}", lambda n=name, s=seed: runs.train_code(n, s, scale))
        )
    record(run, scale, found)
    run.figure("entropy", draw_entropy(found))
    run.figure("losses", draw_losses(found))


def perplexities(results: list[dict[str, Any]]) -> list[float] | None:
    """One a seed; None where a run diverged."""
    if any(one["diverged"] for one in results):
        return None
    return [one["perplexity"] for one in results]


def ratio(found: dict[str, list[dict[str, Any]]], above: str, below: str) -> Any:
    """Geometric mean of the paired ratio of perplexities with its interval, or None where one diverged."""
    left, right = perplexities(found[above]), perplexities(found[below])
    if left is None or right is None:
        return None
    return bootstrap([math.log(a / b) for a, b in zip(left, right, strict=True)])


def overload(results: list[dict[str, Any]], early: bool = True) -> float:
    """Percent of the heads of the first half of the layers within the top quarter of the model's largest head entropy."""
    shares = []
    for one in results:
        most = max(max(layer) for layer in one["entropy"])
        half = len(one["entropy"]) // 2
        layers = one["entropy"][:half] if early else one["entropy"][half:]
        heads = [value for layer in layers for value in layer]
        shares.append(100 * fmean(value >= 0.75 * most for value in heads))
    return fmean(shares)


def layer_means(results: list[dict[str, Any]]) -> list[float]:
    """Mean entropy of each layer over heads and seeds."""
    tables = [one["entropy"] for one in results]
    return [fmean(fmean(table[i]) for table in tables) for i in range(len(tables[0]))]


def record(run: Run, scale: Scale, found: dict[str, list[dict[str, Any]]]) -> None:
    seeds = len(found[PLAIN])
    where = (
        f"{scale.layers} layers, {scale.heads} heads, width {scale.width}, T = {scale.tokens}, standard-library Python by letter,"
        f" {scale.steps} steps of {scale.batch}, {seeds} seed(s)"
    )
    shown = ", ".join(
        f"{name} " + ("diverged" if values is None else f"{fmean(values):.2f}")
        for name, values in ((name, perplexities(results)) for name, results in found.items())
    )
    for claim, above, below in (
        ("norms", "SM + GELU", "SM + LN + GELU"),
        ("relu", "SM + ReLU", "SM + GELU"),
    ):
        change = ratio(found, above, below)
        ends = _ends(change)
        verdict = None
        if ends is not None:
            verdict = ends[0] > 1 if claim == "norms" else ends[1] < 1
        run.record(
            claim,
            here=None if change is None else round(math.exp(change.mean), 3),
            interval=ends,
            holds=verdict,
            setting=where,
            note=f"perplexity a character: {shown}; paired by seed, interval over seeds",
        )
    record_collapse(run, where, found)
    best = min(REGULARIZED, key=lambda name: fmean(perplexities(found[name]) or [math.inf]))
    change = ratio(found, best, PLAIN)
    ends = _ends(change)
    run.record(
        "regularized",
        here=None if change is None else round(100 * (math.exp(change.mean) - 1), 2),
        interval=None
        if ends is None
        else (round(100 * (ends[0] - 1), 2), round(100 * (ends[1] - 1), 2)),
        holds=None if ends is None else ends[1] < 1,
        setting=where,
        note=f"best of three strengths, {best.split()[1]} (chosen on the same held-out text); perplexity: "
        + ", ".join(
            f"{name.split()[1]} {fmean(perplexities(found[name]) or [math.nan]):.3f}"
            for name in REGULARIZED
        )
        + f", without {fmean(perplexities(found[PLAIN]) or [math.nan]):.3f}",
    )
    before, after = overload(found[PLAIN]), overload(found[best])
    run.record(
        "overload",
        here=round(after - before, 1),
        setting=where,
        note="first half of the layers, in percent of their heads: "
        + ", ".join(
            f"{name} {overload(found[name]):.0f}"
            for name in ("SM + LN + GELU", PLAIN, *REGULARIZED)
        )
        + "; mean entropy by layer, "
        + "; ".join(
            f"{name} " + " ".join(f"{v:.2f}" for v in layer_means(found[name]))
            for name in (PLAIN, best)
        ),
    )
    levels = [v for one in found[best] for layer in one["levels"] for v in layer]
    mean = fmean(levels)
    temperatures = [t for one in found[best] for t in one["temperatures"]]
    run.record(
        "levels",
        here=round(math.sqrt(fmean((v - mean) ** 2 for v in levels)), 4),
        setting=where,
        note=f"{best}: levels {min(levels):.3f} to {max(levels):.3f}; mean temperature of a layer {min(temperatures):.2f} to"
        f" {max(temperatures):.2f}",
    )
    counts = {name: runs.operations(name, scale) for name in ("SM + LN + GELU", PLAIN)}
    full, fused = counts.values()
    run.record(
        "operations",
        here=full["feed-forward products"] / fused["feed-forward products"],
        setting=f"width {scale.width}, T = {scale.tokens}",
        note="; ".join(
            f"{name}: " + ", ".join(f"{count} {what}" for what, count in held.items())
            for name, held in counts.items()
        ),
    )


def record_collapse(run: Run, where: str, found: dict[str, list[dict[str, Any]]]) -> None:
    plain, reference = found["SM"], layer_means(found["SM + LN + GELU"])
    diverged = any(one["diverged"] for one in plain)
    means = None if diverged else layer_means(plain)
    share = None if means is None else min(means) / min(reference)
    rest = "" if means is None else f"; mean entropy by layer {' '.join(f'{v:.2f}' for v in means)}"
    run.record(
        "collapse",
        here="diverged" if share is None else round(share, 2),
        holds=True if share is None else share < 0.5,
        setting=where,
        note=f"with norms and GELU by layer {' '.join(f'{v:.2f}' for v in reference)} nats{rest}",
    )
    change = ratio(found, PLAIN, "SM")
    ends = _ends(change)
    rescued = diverged and not any(one["diverged"] for one in found[PLAIN])
    single = not diverged and ends is None
    run.record(
        "rescue",
        here="softmax alone diverged" if change is None else round(math.exp(change.mean), 3),
        interval=ends,
        holds=None if single else rescued or (ends is not None and ends[1] < 1),
        setting=where,
        note="the fused layer has an eighth of the parameters of the two layers that it replaces; paired by seed",
    )


def _ends(estimate: Any) -> tuple[float, float] | None:
    if estimate is None or math.isnan(estimate.low):
        return None
    return round(math.exp(estimate.low), 3), round(math.exp(estimate.high), 3)


def draw_entropy(found: dict[str, list[dict[str, Any]]]) -> Figure:
    import matplotlib.pyplot as plt

    shown = [n for n in ("SM + LN + GELU", "SM", PLAIN, *REGULARIZED) if perplexities(found[n])]
    figure, axes = plt.subplots(
        1, len(shown), figsize=(1.9 * len(shown), 2.6), sharey=True, layout="constrained"
    )
    for ax, name in zip(axes, shown, strict=True):
        for one in found[name]:
            for layer, heads in enumerate(one["entropy"]):
                ax.plot([layer] * len(heads), heads, ".", color="tab:blue", markersize=5, alpha=0.7)
        ax.set(title=name, xlabel="layer")
        ax.title.set_fontsize(9)
    axes[0].set(ylabel="entropy of a head, nats", ylim=(0, None))
    return figure


def draw_losses(found: dict[str, list[dict[str, Any]]]) -> Figure:
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=(7, 3.4), layout="constrained")
    colours = plt.get_cmap("tab10")
    for index, (name, results) in enumerate(found.items()):
        curves = [one["losses"] for one in results]
        size = min(map(len, curves))
        mean = [fmean(curve[i] for curve in curves) for i in range(size)]
        window = max(1, size // 30)
        smooth = [fmean(mean[max(0, i - window + 1) : i + 1]) for i in range(size)]
        ax.plot(smooth, color=colours(index), lw=1.2, label=name)
    ax.set(xlabel="step", ylabel="training loss, nats a character (smoothed)")
    ax.legend(fontsize=8, frameon=False, ncol=2)
    return figure
