"""Attention entropy collapse and sigmaReparam (arXiv 2303.06296).

Checked here:

* the lower bound on a row's entropy: random rows, its minimiser, its decay, and the growth of update norms with width;
* SmolLM2's heads against the bound, from each row's own scores and from weights and inputs;
* small vision transformers on the digits of scikit-learn, with and without norms and sigmaReparam, at several rates;
* the same with the rate of the query and key projections raised tenfold, which drives entropy down.

Beyond our scale: ImageNet, speech recognition and 100-layer translation.
"""

from __future__ import annotations

import math
from statistics import fmean
from typing import TYPE_CHECKING, Any

from regard.metrics.bootstrap import bootstrap
from regard.papers import Claim, Paper, Run
from regard.papers import _sigma_reparam_runs as runs
from regard.papers._sigma_reparam_runs import ARMS, UNIFORM, Scale

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PLAIN, SIGMA, BARE, BARE_SIGMA = ARMS

PAPER = Paper(
    "sigma-reparam",
    claims=[
        Claim(
            "bound",
            "No row of scores of a given norm has less entropy than the bound: rows below it",
            setting="theorem 3.1",
            paper="0",
            expect="0 rows, and the minimiser meets the bound to 1e-9",
        ),
        Claim(
            "decay",
            "The bound falls exponentially with the norm s: slope of log(bound / s) over -sqrt(T / (T - 1))",
            setting="theorem 3.1, large s",
            paper="-1 (the bound falls like T s exp(-s))",
            expect="within 2 % of -1",
            holds=lambda slope: abs(slope + 1) < 0.02,
        ),
        Claim(
            "width",
            "The spectral norm of an ideal Adam update grows like the square root of the width: fitted exponent",
            setting="proposition 3.2, a lower bound",
            paper="0.5",
            expect="0.45 to 0.55, and no matrix below the proposition's bound",
        ),
        Claim(
            "pretrained",
            "Rows of a pretrained model below the bound, from their own scores and from weights and input",
            setting="not in the paper: a check of the theorem on a trained model",
            expect="0",
            holds=lambda rows: rows == 0,
        ),
        Claim(
            "paper-norm",
            "The paper's s = ||W_K W_Q^T|| ||X X^T|| bounds rows of a model with rotary positions too: rows below",
            setting="not in the paper, whose models have no rotary positions",
            expect="0 (rotations are outside the theorem: it may fail)",
            holds=lambda rows: rows == 0,
        ),
        Claim(
            "sinks",
            "Heads with larger scores have less entropy: rank correlation of a head's mean norm of scores and mean entropy",
            setting="the paper ties the two by the bound",
            paper="negative",
            expect="below -0.5",
            holds=lambda correlation: correlation < -0.5,
        ),
        Claim(
            "collapse",
            "sigmaReparam keeps entropy up at every rate where pre-LN's falls under half of uniform: smallest gain there",
            setting="ViT, speech and translation models under unstable settings",
            paper="entropy stays bounded",
            unit=" nats",
            expect="clearly above 0 at every such rate (lower end of the interval over seeds)",
        ),
        Claim(
            "accuracy",
            "pre-LN + sigmaReparam is as accurate as pre-LN, each at its best rate: difference in points",
            setting="ImageNet ViT-B/16, 81.8 % [DeiT], no warm-up or weight decay",
            paper="competitive",
            unit=" points",
            expect="lower end of the interval at least -2",
        ),
        Claim(
            "norm-free",
            "Without layer norms, sigmaReparam trains to within 3 points of pre-LN: difference in points",
            setting="ImageNet ViT-B/16, no LayerNorm",
            paper="competitive",
            unit=" points",
            expect="at least -3",
            holds=lambda points: points >= -3,
        ),
        Claim(
            "rates",
            "A tenfold rate costs sigmaReparam less accuracy than it costs pre-LN: difference of the two losses in points",
            setting="the paper drops warm-up and adaptive optimisers, and doubles the rate",
            paper="wider range of rates",
            unit=" points",
            expect="lower end of the interval above 0",
        ),
        Claim(
            "forced",
            "With the rate of query and key projections raised tenfold, entropy of sigmaReparam less that of pre-LN",
            setting="attention temperature and rate doubled in the middle of training",
            paper="baseline entropy goes to 0, sigmaReparam's stays up",
            unit=" nats",
            expect="lower end of the interval above 0.5, and pre-LN under half of uniform",
        ),
        Claim(
            "cost",
            "A training step with sigmaReparam over one without: time",
            setting="translation, 8 to 18 layers: 1700-1800 to 2200 ms; speech 450 ms both",
            paper="1.0 to 1.3",
            unit="x",
            expect="at most 1.3",
            holds=lambda ratio: ratio <= 1.3,
        ),
        Claim(
            "scale",
            "ImageNet without LayerNorm, 100-layer translation and speech without warm-up train to competitive results",
            setting="ViT-B/16 and larger, WMT, LibriSpeech",
            paper="competitive",
            beyond="needs data and models far beyond a few processor minutes",
        ),
    ],
    needs=("matplotlib", "sklearn", "scipy"),
)


def experiment(run: Run) -> None:
    run.seed(0)
    theorem(run)
    pretrained(run)
    scale = run.pick(
        quick=Scale(steps=4, layers=2, width=16, heads=2, batch=16), full=Scale(steps=160)
    )
    rates = run.pick(quick=[1e-3, 1e-2], full=[1e-3, 1e-2])
    seeds = run.pick(quick=[0], full=[0, 1, 2])
    found: dict[str, dict[float, list[dict[str, Any]]]] = {}
    cases = [(name, rate, seed) for seed in seeds for rate in rates for name in ARMS]
    for name, rate, seed in run.progress(cases, "training"):
        run.seed(seed)
        kept = run.partial(
            f"{name}/{rate}/{seed}",
            lambda n=name, r=rate, s=seed: runs.train_digits(n, r, s, scale),
        )
        found.setdefault(name, {}).setdefault(rate, []).append(kept)
    hot: dict[str, list[dict[str, Any]]] = {PLAIN: [], SIGMA: []}
    for name, seed in run.progress([(n, s) for s in seeds for n in hot], "hot queries and keys"):
        run.seed(seed)
        hot[name].append(
            run.partial(
                f"hot/{name}/{seed}",
                lambda n=name, s=seed: runs.train_digits(n, 1e-3, s, scale, hot=10.0),
            )
        )
    record_training(run, scale, found)
    record_forced(run, scale, hot)
    run.figure("rates", draw_rates(found))
    run.figure("entropy", draw_entropy(found, hot))


def theorem(run: Run) -> None:
    found = runs.bound_numbers(run.pick(quick=50, full=20_000))
    run.record(
        "bound",
        here=found["below"],
        holds=found["below"] == 0 and found["gap"] < 1e-9,
        note=f"of {found['rows']:.0f} random rows, T in 8, 64, 512 and s in 0.5, 2, 6, 12; the minimiser is off by at most"
        f" {found['gap']:.1e} nats",
    )
    run.record("decay", here=round(found["slope"], 4), note="between s = 40 and 60, T = 64")
    widths = run.pick(quick=[16, 32], full=[32, 64, 128, 256, 512])
    grown = runs.update_norms(widths, run.pick(quick=1, full=3))
    run.record(
        "width",
        here=round(grown["exponent"], 3),
        holds=grown["below"] == 0 and 0.45 <= grown["exponent"] <= 0.55,
        setting="random means and noise of random size",
        note=f"{grown['below']} of {grown['matrices']} matrices below the proposition's bound; mean norm by width: "
        + ", ".join(f"{width} {norm:.1f}" for width, norm in grown["norms"].items()),
    )


def pretrained(run: Run) -> None:
    tokens, texts = run.pick(quick=(24, 1), full=(256, 2))
    found = run.partial("smollm2", lambda: runs.pretrained_numbers(run.model(), tokens, texts))
    below, heads = found["below"], found["heads"]
    where = f"SmolLM2-135M-Instruct (4-bit weights), {texts} x {tokens} tokens of prose, {len(heads['norm'])} heads"
    run.record(
        "pretrained",
        here=below["own"] + below["rotary"],
        setting=where,
        note=f"of {found['rows']} rows. A row's entropy lies {found['gap']:.2f} nats (median) above the bound from its own"
        " centred scores; the bound from weights and input (with the product of norms that rotary positions need) is at most"
        f" {found['largest bound from weights']:.1e} nats and says nothing here (median entropy of a head"
        f" {found['median entropy']:.2f})",
    )
    run.record(
        "paper-norm",
        here=below["paper"],
        setting=where,
        note="a trained model's s is so large that the bound is nearly 0; that no row is below it is no proof",
    )
    run.record(
        "sinks",
        here=round(runs.rank_correlation(heads["norm"], heads["entropy"]), 2),
        setting=where,
        note="with the bound's s from weights and input instead"
        f" {runs.rank_correlation(heads['weights'], heads['entropy']):+.2f}; share on the first token and entropy"
        f" {runs.rank_correlation(heads['sink'], heads['entropy']):+.2f}, share on the first token and norm of scores"
        f" {runs.rank_correlation(heads['sink'], heads['norm']):+.2f}",
    )
    run.figure("heads", draw_heads(heads))


def column(results: list[dict[str, Any]], what: str) -> list[float]:
    """One number a seed: accuracy in percent, lowest entropy of the run, largest rise of the loss."""
    if what == "accuracy":
        return [100 * one["accuracy"] for one in results]
    if what == "entropy":
        return [min(one["entropy"]) for one in results]
    return [one[what] for one in results]


def best(found: dict[float, list[dict[str, Any]]]) -> float:
    """The rate with the best mean accuracy."""
    return max(found, key=lambda rate: fmean(column(found[rate], "accuracy")))


def record_training(
    run: Run, scale: Scale, found: dict[str, dict[float, list[dict[str, Any]]]]
) -> None:
    rates = list(found[PLAIN])
    seeds = len(found[PLAIN][rates[0]])
    where = (
        f"{scale.layers}-layer ViT of width {scale.width}, digits, {scale.steps} steps of {scale.batch}, AdamW without warm-up or"
        f" decay, rates {', '.join(f'{rate:g}' for rate in rates)}, {seeds} seed(s)"
    )
    fallen = [r for r in rates if fmean(column(found[PLAIN][r], "entropy")) < UNIFORM / 2]
    gains = {
        rate: bootstrap(
            [
                own - plain
                for own, plain in zip(
                    column(found[SIGMA][rate], "entropy"),
                    column(found[PLAIN][rate], "entropy"),
                    strict=True,
                )
            ]
        )
        for rate in fallen
    }
    entropies = "; ".join(
        f"{name}: " + ", ".join(f"{fmean(column(found[name][r], 'entropy')):.2f}" for r in rates)
        for name in found
    )
    lowest = min(gains.values(), key=lambda gain: gain.mean, default=None)
    run.record(
        "collapse",
        here=None if lowest is None else round(lowest.mean, 2),
        interval=_interval(lowest),
        holds=None if lowest is None or seeds < 2 else all(g.low > 0 for g in gains.values()),
        setting=where,
        note=f"pre-LN falls under half of uniform ({UNIFORM:.2f} nats) at"
        f" {len(fallen)} of {len(rates)} rates; lowest layer entropy of a run, by rate: {entropies}; interval over seeds",
    )
    plain, top = best(found[PLAIN]), {name: best(found[name]) for name in found}
    accuracies = "; ".join(
        f"{name}: " + ", ".join(f"{fmean(column(found[name][r], 'accuracy')):.1f}" for r in rates)
        for name in found
    )
    spikes = "; ".join(
        f"{name} {max(max(column(found[name][r], 'spike')) for r in rates):.1f}" for name in found
    )
    reference = column(found[PLAIN][plain], "accuracy")
    for claim, name in (("accuracy", SIGMA), ("norm-free", BARE_SIGMA)):
        own = column(found[name][top[name]], "accuracy")
        gain = bootstrap([a - b for a, b in zip(own, reference, strict=True)])
        extra: dict[str, Any] = {}
        if claim == "accuracy":
            extra["holds"] = None if seeds < 2 else gain.low >= -2
        run.record(
            claim,
            here=round(gain.mean, 1),
            interval=_interval(gain),
            setting=where,
            note=f"at rate {top[name]:g} against pre-LN at {plain:g}, paired by seed; accuracy in percent by rate:"
            f" {accuracies}; largest rise of the loss above its minimum so far: {spikes}",
            **extra,
        )
    low, high = min(rates), max(rates)
    kept = {
        name: [
            b - a
            for a, b in zip(
                column(found[name][low], "accuracy"),
                column(found[name][high], "accuracy"),
                strict=True,
            )
        ]
        for name in found
    }
    spared = bootstrap([a - b for a, b in zip(kept[SIGMA], kept[PLAIN], strict=True)])
    ends = _interval(spared)
    run.record(
        "rates",
        here=round(spared.mean, 1),
        interval=ends,
        holds=None if ends is None else ends[0] > 0,
        setting=where,
        note=f"change of accuracy from rate {low:g} to {high:g}, in points: "
        + ", ".join(f"{name} {fmean(change):+.1f}" for name, change in kept.items())
        + ("" if seeds > 1 else "; one seed decides nothing"),
    )
    times = {
        name: fmean(one["seconds"] for results in found[name].values() for one in results)
        for name in found
    }
    run.record(
        "cost",
        here=round(times[SIGMA] / times[PLAIN], 2),
        setting=where,
        note=f"processor time of a step: {1000 * times[PLAIN]:.0f} and {1000 * times[SIGMA]:.0f} ms; the cost does not grow"
        " with the batch",
    )


def record_forced(run: Run, scale: Scale, hot: dict[str, list[dict[str, Any]]]) -> None:
    tail = max(1, scale.steps // 10 // runs.EVERY)
    last = {name: [fmean(one["entropy"][-tail:]) for one in hot[name]] for name in hot}
    gain = bootstrap([a - b for a, b in zip(last[SIGMA], last[PLAIN], strict=True)])
    low, fallen = _interval(gain), fmean(last[PLAIN]) < UNIFORM / 2
    run.record(
        "forced",
        here=round(gain.mean, 2),
        interval=low,
        holds=None if low is None else fallen and low[0] > 0.5,
        setting=f"rate 0.001, 0.01 for query and key projections; {len(last[PLAIN])} seed(s)",
        note=f"lowest layer entropy over the last {tail * runs.EVERY} steps, pre-LN {fmean(last[PLAIN]):.2f}, with sigmaReparam"
        f" {fmean(last[SIGMA]):.2f} of {UNIFORM:.2f} nats; accuracy"
        f" {fmean(column(hot[PLAIN], 'accuracy')):.1f} and {fmean(column(hot[SIGMA], 'accuracy')):.1f} %."
        " Multiplying W_q by a constant, another way to force collapse, changes nothing under sigmaReparam by construction",
    )


def _interval(estimate: Any) -> tuple[float, float] | None:
    if estimate is None or math.isnan(estimate.low):
        return None
    return round(estimate.low, 2), round(estimate.high, 2)


COLOURS = dict(zip(ARMS, ("tab:blue", "tab:orange", "0.5", "tab:green"), strict=True))


def draw_rates(found: dict[str, dict[float, list[dict[str, Any]]]]) -> Figure:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for ax, what in zip(axes, ("accuracy", "entropy"), strict=True):
        for name, by_rate in found.items():
            means = [fmean(column(results, what)) for results in by_rate.values()]
            ax.plot(list(by_rate), means, color=COLOURS[name], label=name)
            for rate, results in by_rate.items():
                values = column(results, what)
                ax.plot([rate] * len(values), values, ".", color=COLOURS[name], markersize=5)
        ax.set(xscale="log", xlabel="learning rate")
    axes[0].set(ylabel="held-out accuracy, %", ylim=(0, 101))
    axes[1].axhline(UNIFORM, color="0.7", lw=0.8, ls="--")
    axes[1].set(ylabel="lowest layer entropy of a run, nats", ylim=(0, UNIFORM * 1.05))
    axes[1].legend(fontsize=8, frameon=False)
    return figure


def draw_entropy(
    found: dict[str, dict[float, list[dict[str, Any]]]], hot: dict[str, list[dict[str, Any]]]
) -> Figure:
    import matplotlib.pyplot as plt

    top = max(found[PLAIN])
    figure, axes = plt.subplots(1, 2, figsize=(9, 3), sharey=True, layout="constrained")
    panels = (
        (axes[0], f"rate {top:g}", {name: found[name][top] for name in found}),
        (axes[1], "rate 0.001, 0.01 for queries and keys", hot),
    )
    for ax, title, shown in panels:
        for name, results in shown.items():
            for index, one in enumerate(results):
                label = name if index == 0 else None
                steps = [runs.EVERY * i for i in range(len(one["entropy"]))]
                ax.plot(steps, one["entropy"], color=COLOURS[name], lw=0.9, alpha=0.8, label=label)
        ax.axhline(UNIFORM, color="0.7", lw=0.8, ls="--")
        ax.set(xlabel="step", title=title)
    axes[0].set(ylabel="lowest layer entropy, nats", ylim=(0, UNIFORM * 1.05))
    axes[0].legend(fontsize=8, frameon=False)
    return figure


def draw_heads(heads: dict[str, list[float]]) -> Figure:
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=(6, 3.4), layout="constrained")
    shown = ax.scatter(heads["norm"], heads["entropy"], c=heads["sink"], s=14, vmin=0, vmax=1)
    ax.set(
        xscale="log",
        xlabel="norm of a row's centred scores, mean over rows",
        ylabel="entropy of a row, nats",
        title="heads of SmolLM2",
    )
    figure.colorbar(shown, ax=ax, label="share of weight on the first token")
    return figure
