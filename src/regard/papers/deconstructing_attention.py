"""Deconstructing Attention (arXiv 2510.11602): six replacements of attention, in every layer or in every other one.

Checked here, on character models of Python's reference:

* the replacements against their quadratic forms, and their numbers of parameters;
* their loss in all layers and in every other layer, against standard attention;
* the skip test: hybrids without their replaced layers;
* that a model without mixing is deaf to context, the range of self-gated scores, and what maps look like.

Beyond our scale: models of 70M to 1.7B parameters on 15B tokens, and the benchmarks of understanding.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from regard.metrics.bootstrap import paired
from regard.papers import Claim, Paper, Run

if TYPE_CHECKING:
    from regard.papers._deconstructing_attention_runs import Setting

HALF_BILLION = "500M parameters, WikiText perplexity"
FIXED = ("random_qk", "fixed_text_qk", "static_qk")

PAPER = Paper(
    "deconstructing-attention",
    claims=[
        Claim(
            "exact",
            "Linear forms equal quadratic ones, and fixed maps of a text those of standard attention on it: largest difference",
            setting="not in the paper: a check of the implementation",
            expect="below 1e-9 in float64",
            holds=lambda worst: worst < 1e-9,
        ),
        Claim(
            "mixing",
            "Mixing of tokens cannot be given up: perplexity without it over that of standard attention",
            setting=HALF_BILLION,
            paper="993.5 / 38.1 = 26 times",
            unit=" times",
            expect="at least 2 times",
            holds=lambda ratio: ratio >= 2,
        ),
        Claim(
            "deaf",
            "Without mixing the perplexity does not depend on the context: gain from 16 characters to the whole window",
            setting="993.5 from 128 to 2048 tokens",
            paper="0",
            unit=" nats",
            expect="below 1e-4; standard attention gains more than 0.02",
        ),
        Claim(
            "form",
            "The exact form matters little: loss of the Taylor series in all layers above standard attention",
            setting=HALF_BILLION,
            paper="ln(47.9 / 38.1) = 0.23 nats",
            unit=" nats",
            expect="below that of the three variants with foreign queries and keys",
        ),
        Claim(
            "foreign",
            "Queries and keys from outside the layer cost more, but far less than no mixing: loss above standard attention",
            setting=HALF_BILLION,
            paper="random 0.80, fixed text 0.73, static 0.74 nats; no mixing 3.26",
            unit=" nats",
            expect="each above 0 and below half of no mixing's",
        ),
        Claim(
            "self-gated",
            "Scores in which a token meets itself alone fail in all layers: loss above standard attention",
            setting=HALF_BILLION,
            paper="diverged; works at 1.7B (67.3 against 27.6)",
            unit=" nats",
            expect="the worst or next to no mixing",
        ),
        Claim(
            "interleaved",
            "Every variant is better in every other layer than in all of them: smallest gain",
            setting=HALF_BILLION,
            paper="ln(47.9 / 39.4) = 0.20 nats (Taylor) to ln(993.5 / 45.8) = 3.1",
            unit=" nats",
            expect="above 0 for all six",
        ),
        Claim(
            "hybrid",
            "In every other layer, variants are near standard attention: perplexity above it",
            setting=HALF_BILLION,
            paper="1 to 3 % with mixing, 20 % without",
            unit=" %",
            expect="at most 10 % for the five with mixing, and no mixing the worst",
        ),
        Claim(
            "skip",
            "The replaced layers are needed: smallest perplexity without them over that with them",
            setting=f"{HALF_BILLION}; 2e4 to 2e6 without them",
            paper="above 400 times",
            unit=" times",
            expect="above 5 times",
            holds=lambda ratio: ratio > 5,
        ),
        Claim(
            "outliers",
            "Self-gated scores grow out of bounds in all layers and not in a hybrid: largest score",
            setting="500M parameters, late layers",
            paper="above 1000 in all layers, below 10 in a hybrid",
            expect="above 10 in all layers and below 10 in the hybrid",
        ),
        Claim(
            "parameters",
            "All variants have the parameters of standard attention: largest difference of a model's",
            setting="by construction",
            unit=" %",
            expect="below 1 %",
            holds=lambda percent: percent < 1,
        ),
        Claim(
            "understanding",
            "Average accuracy on seven benchmarks of understanding, LAMBADA, and the 1.7B models",
            setting="500M parameters: standard 51.9, hybrids 48.7 to 52.9",
            paper="hybrids within 3.2 points",
            beyond="models of this size do not solve these benchmarks",
        ),
    ],
    needs=("matplotlib",),
)


def experiment(run: Run) -> None:
    from regard.papers import _deconstructing_attention_runs as runs

    run.seed(0)
    run.record("exact", here=runs.deviation(), note="50 tokens; the second stream on 32 tokens")
    setting = run.pick(
        quick=runs.Setting(length=32, layers=2, width=32, heads=2, steps=2, batch=4, windows=16),
        full=runs.Setting(),
    )
    places = [("standard", "uniform")] + [(k, p) for p in ("uniform", "even") for k in runs.KINDS]
    seeds = [0]
    found: dict[str, list[dict[str, Any]]] = {f"{kind}/{place}": [] for kind, place in places}
    cases = [(seed, kind, place) for seed in seeds for kind, place in places]
    for seed, kind, place in run.progress(cases, "training"):
        run.seed(seed)
        kept = run.partial(
            f"{kind}/{place}/{seed}", lambda k=kind, p=place, s=seed: runs.trained(k, p, setting, s)
        )
        found[f"{kind}/{place}"].append(kept)
    _record(run, setting, found)
    run.figure("loss", _draw_loss(found))
    run.figure("learning", _draw_learning(found))
    run.figure("indicators", _draw_indicators(found))


def _above(found: dict[str, list[dict[str, Any]]], name: str) -> Any:
    """Loss above standard attention on the same windows, nats; windows of all seeds are the units."""
    pairs = zip(found[name], found["standard/uniform"], strict=True)
    differences = np.mean([np.subtract(one["nats"], base["nats"]) for one, base in pairs], 0)
    return paired(list(differences), [0.0] * len(differences))


def _loss(found: dict[str, list[dict[str, Any]]], name: str) -> list[float]:
    return [float(np.mean(one["nats"])) for one in found[name]]


def _record(run: Run, setting: Setting, found: dict[str, list[dict[str, Any]]]) -> None:
    from regard.papers import _deconstructing_attention_runs as runs

    seeds = len(found["standard/uniform"])
    where = (
        f"{setting.layers} layers, width {setting.width}, {setting.heads} heads, windows of {setting.length} characters,"
        f" {setting.steps} steps of {setting.batch}, {seeds} seed(s), {setting.windows} held-out windows"
    )
    above = {name: _above(found, name) for name in found}
    uniform = {kind: above[f"{kind}/uniform"] for kind in runs.KINDS}
    even = {kind: above[f"{kind}/even"] for kind in runs.KINDS}
    base = float(np.mean(_loss(found, "standard/uniform")))

    def show(estimates: dict[str, Any]) -> str:
        return "; ".join(
            f"{kind} {one.mean:+.3f} [{one.low:+.3f}, {one.high:+.3f}]"
            for kind, one in estimates.items()
        )

    none = uniform["no_mixing"]
    run.record(
        "mixing",
        here=math.exp(none.mean),
        interval=(math.exp(none.low), math.exp(none.high)),
        setting=where,
        note=f"standard attention: {base:.3f} nats, perplexity {math.exp(base):.2f} a character, where the best of a model that"
        " sees one character is far nearer than with 50,000 word pieces; interval: bootstrap over windows",
    )
    gains = {
        name: float(np.mean([one["short"]["short"] - one["short"]["whole"] for one in found[name]]))
        for name in ("no_mixing/uniform", "standard/uniform")
    }
    run.record(
        "deaf",
        here={"no mixing": gains["no_mixing/uniform"], "standard": gains["standard/uniform"]},
        holds=abs(gains["no_mixing/uniform"]) < 1e-4 and gains["standard/uniform"] > 0.02,
        setting=where,
        note="loss of the last 8 characters of a window, less with the whole window before them",
    )
    taylor = uniform["taylor"]
    run.record(
        "form",
        here=taylor.mean,
        interval=(taylor.low, taylor.high),
        holds=all(taylor.mean < uniform[kind].mean for kind in FIXED),
        setting=where,
        note=f"in all layers: {show(uniform)}; intervals: bootstrap over windows, means over seeds",
    )
    run.record(
        "foreign",
        here={kind: uniform[kind].mean for kind in (*FIXED, "no_mixing")},
        holds=all(uniform[k].low > 0 and uniform[k].mean < none.mean / 2 for k in FIXED),
        setting=where,
        note=show({kind: uniform[kind] for kind in (*FIXED, "no_mixing")}),
    )
    order = sorted(runs.KINDS, key=lambda kind: -uniform[kind].mean)
    run.record(
        "self-gated",
        here=uniform["self_gated"].mean,
        interval=(uniform["self_gated"].low, uniform["self_gated"].high),
        holds="self_gated" in order[:2],
        setting=where,
        note=f"from worst to best in all layers: {', '.join(order)}",
    )
    gain = {
        kind: np.subtract(_loss(found, f"{kind}/uniform"), _loss(found, f"{kind}/even"))
        for kind in runs.KINDS
    }
    mean_gain = {kind: float(np.mean(values)) for kind, values in gain.items()}
    run.record(
        "interleaved",
        here=min(mean_gain.values()),
        holds=min(mean_gain.values()) > 0,
        setting=where,
        note="by seed: "
        + "; ".join(f"{k} {' '.join(f'{v:+.3f}' for v in values)}" for k, values in gain.items()),
    )
    percent = {kind: 100 * (math.exp(one.mean) - 1) for kind, one in even.items()}
    mixing = [kind for kind in runs.KINDS if kind != "no_mixing"]
    run.record(
        "hybrid",
        here=percent,
        holds=max(percent[k] for k in mixing) <= 10
        and percent["no_mixing"] == max(percent.values()),
        setting=where,
        note=f"in nats: {show(even)}",
    )
    skipped = {
        kind: math.exp(
            np.mean([one["skipped"] for one in found[f"{kind}/even"]])
            - np.mean(_loss(found, f"{kind}/even"))
        )
        for kind in runs.KINDS
    }
    run.record(
        "skip",
        here=min(skipped.values()),
        setting=where,
        note="times the hybrid's perplexity: "
        + ", ".join(f"{kind} {ratio:.1f}" for kind, ratio in skipped.items())
        + "; a guess among the 256 bytes has perplexity 256",
    )
    largest = {
        place: max(max(one["scores"]) for one in found[f"self_gated/{place}"])
        for place in ("uniform", "even")
    }
    run.record(
        "outliers",
        here={"all layers": largest["uniform"], "hybrid": largest["even"]},
        holds=largest["uniform"] > 10 > largest["even"],
        setting=where,
        note="largest absolute score on 8 held-out windows, over layers and seeds",
    )
    parameters = {name: several[0]["parameters"] for name, several in found.items()}
    standard = parameters["standard/uniform"]
    run.record(
        "parameters",
        here=max(100 * abs(count / standard - 1) for count in parameters.values()),
        setting=where,
        note=f"standard: {standard:,} parameters",
    )


NAMES = {
    "no_mixing": "no mixing",
    "taylor": "Taylor series",
    "self_gated": "self-gated",
    "random_qk": "random q, k",
    "fixed_text_qk": "fixed-text q, k",
    "static_qk": "static q, k",
}


def _draw_loss(found: dict[str, list[dict[str, Any]]]) -> Any:
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=(7.5, 3.8), layout="constrained")
    for x, (place, label) in enumerate((("uniform", "all layers"), ("even", "every other layer"))):
        places = np.arange(len(NAMES)) + 0.25 * x - 0.12
        for i, kind in enumerate(NAMES):
            values = _loss(found, f"{kind}/{place}")
            ax.plot(
                [places[i]] * len(values),
                values,
                "os"[x],
                color=f"C{x}",
                label=label if i == 0 else None,
            )
    ax.axhline(
        float(np.mean(_loss(found, "standard/uniform"))),
        color="grey",
        ls=":",
        label="standard attention",
    )
    ax.set_xticks(range(len(NAMES)), list(NAMES.values()), rotation=12)
    ax.set_ylabel("held-out loss, nats a character (a mark a seed)")
    ax.legend(frameon=False)
    return figure


def _draw_learning(found: dict[str, list[dict[str, Any]]]) -> Any:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9.5, 3.8), layout="constrained", sharey=True)
    for ax, place, title in zip(
        axes, ("uniform", "even"), ("all layers", "every other layer"), strict=True
    ):
        for kind, name in {"standard": "standard", **NAMES}.items():
            several = found.get(f"{kind}/{place}") or found["standard/uniform"]
            losses = np.mean([one["losses"] for one in several], 0)
            span = max(1, len(losses) // 20)
            style = {"color": "black", "lw": 1.6} if kind == "standard" else {"lw": 1}
            ax.plot(np.convolve(losses, np.ones(span) / span, "valid"), label=name, **style)
        ax.set(xlabel="step", title=title)
    axes[0].set_ylabel("training loss, nats a character (mean over seeds)")
    axes[1].legend(frameon=False, fontsize=8)
    return figure


def _draw_indicators(found: dict[str, list[dict[str, Any]]]) -> Any:
    import matplotlib.pyplot as plt

    shown = {
        "entropy": "entropy of a row, nats",
        "diversity": "diversity of heads",
        "sink": "weight of the first key",
    }
    shown["local focus 1"] = "weight of the previous key"
    figure, axes = plt.subplots(1, len(shown), figsize=(12, 3.2), layout="constrained")
    layers: list[dict[str, Any]] = []
    for ax, (name, label) in zip(axes, shown.items(), strict=True):
        for kind in ("standard", *FIXED):
            layers = found[f"{kind}/uniform"][0]["indicators"]
            ax.plot(
                range(1, len(layers) + 1),
                [one[name] for one in layers],
                "o-",
                label=NAMES.get(kind, kind),
            )
        ax.set(xlabel="layer", ylabel=label)
        ax.set_xticks(range(1, len(layers) + 1))
    axes[0].legend(frameon=False, fontsize=8)
    return figure
