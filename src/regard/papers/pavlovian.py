"""Understanding Transformers through the Lens of Pavlovian Conditioning (arXiv 2508.08289): memories, capacity, conditioning.

Checked here:

* capacity of a Hebbian memory, on average and in the worst case; chains of memories; redundant heads;
* conditioning phenomena of the learning rules behind linear attention, retention and DeltaNet, against closed forms and
  through the operators of `regard.ops`;
* one-layer readers trained on streams of cues and outcomes, put through blocking, overshadowing and extinction in context;
* heads of SmolLM2: the effective dimension of their keys, and recall of pairs in context.

The paper could be read in abstracts and summaries only; formulas were derived for `regard.labs.pavlovian`. Beyond our scale:
claims about animals.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from regard.labs.pavlovian import Pavlovian, chain_success, majority_failure
from regard.labs.results import Check, Result, interval
from regard.papers import Claim, Paper, Run
from regard.papers import _pavlovian_runs as runs

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EFFECTS = ("blocking", "overshadowing", "extinction")
PAIRS = (2, 4, 8, 16, 32)

PAPER = Paper(
    "pavlovian",
    claims=[
        Claim(
            "average",
            "A head holds O(d_k) associations on average: mean squared error of n of them over (n - 1) / d_k, at the n that "
            "agrees least",
            setting="linear attention, random unit keys (second version)",
            paper="O(d_k)",
            expect="1 within 5 % or the error bar",
        ),
        Claim(
            "worst",
            "... and O(sqrt(d_k)) without interference: exponent of d_k in the first n whose worst cross-talk reaches the signal",
            setting="linear attention (first version)",
            paper="0.5",
            expect="0.5 within 0.05",
        ),
        Claim(
            "clean-up",
            "Readings cleaned up to the nearest stored value stay right up to n = d_k and then fail: accuracy at n = d_k",
            setting="linear attention, random unit keys",
            unit=" %",
            expect="above 99 %, and below it by more than 5 points at 8 d_k",
        ),
        Claim(
            "chain",
            "Errors compound along layers as (1 + (n - 1) / d)^D - 1: measured over formula, at the depth and n that agree least",
            setting="error propagation",
            expect="1 within 5 % or the error bar",
        ),
        Claim(
            "hops",
            "With a clean-up in each layer, a chain of D succeeds with (1 - p)^D: largest difference from it",
            setting="error propagation",
            unit=" points",
            expect="at most 2 points",
        ),
        Claim(
            "redundancy",
            "Depth is paid for by redundant heads: error of the average of R heads with codes of their own over (n - 1) / (R d), "
            "at the R that agrees least",
            setting="head redundancy",
            expect="1 within 5 % or the error bar",
        ),
        Claim(
            "projections",
            "Heads that see projections of one code are not redundant: their smallest error over one head's",
            setting="head redundancy",
            expect="at least 1, within 5 %",
        ),
        Claim(
            "majority",
            "A majority of R heads fails as the binomial says: largest difference from it over R = 3, 5, 9",
            setting="head redundancy",
            unit=" points",
            expect="at most 2 points",
        ),
        Claim(
            "closed forms",
            "Acquisition, extinction, blocking, overshadowing, generalisation, delay and second-order conditioning follow their "
            "closed forms for four learning rules: largest difference",
            setting="linear attention is Hebb's rule, gating a decaying trace, DeltaNet Rescorla-Wagner (third version)",
            paper="0",
            expect="below 1e-10",
            holds=lambda off: off < 1e-10,
        ),
        Claim(
            "operators",
            "The operators of regard block and do not block like their rules: V_B of the blocking protocol, largest difference",
            setting="linear attention and DeltaNet (third version)",
            paper="0",
            expect="below 1e-10",
            holds=lambda off: off < 1e-10,
        ),
        Claim(
            "learns",
            "Trained readers learn the streams: error of linear attention, DeltaNet and softmax attention on new ones "
            "(predicting nothing has 1)",
            setting="trained linear transformers",
            expect="all below 0.7 in every run",
        ),
        Claim(
            "blocking",
            "A trained DeltaNet shows blocking: share of the response to the blocked cue that it takes away",
            setting="trained linear transformers",
            paper="blocking",
            expect="above 0.3, beyond the error bar",
        ),
        Claim(
            "no blocking",
            "... and trained linear attention does not",
            setting="trained linear transformers",
            paper="0",
            expect="0 within 0.1",
        ),
        Claim(
            "overshadowing",
            "A trained DeltaNet shows overshadowing: share of the response to a cue that a partner takes away",
            setting="trained linear transformers",
            paper="overshadowing",
            expect="above 0.2, beyond the error bar, and more than linear attention's",
        ),
        Claim(
            "extinction",
            "A trained DeltaNet shows extinction: share of the response that trials without the outcome take away",
            setting="trained linear transformers",
            paper="extinction",
            expect="above 0.5, beyond the error bar, and more than linear attention's",
        ),
        Claim(
            "capacity",
            "Softmax heads hold more than the linear worst case: most pairs that a model recalls in context more often "
            "than not, over the mean square root of its keys' effective dimension",
            setting="capacity of pretrained heads",
            expect="above 1",
        ),
        Claim(
            "correlation",
            "Heads whose keys have a larger effective dimension hold more: rank correlation, over heads that look at the value "
            "among few pairs, of sqrt(d_eff) with how much of that attention is left among many",
            setting="capacity of pretrained heads",
            expect="above 0, beyond the bootstrap interval",
        ),
        Claim(
            "animals",
            "The same phenomena in animals and synapses",
            setting="biology",
            beyond="a claim about brains that no model can show",
        ),
    ],
    needs=("matplotlib", "scipy"),
)


def experiment(run: Run) -> None:
    run.seed(0)
    lab = Pavlovian(
        dimension=run.pick(quick=16, full=64),
        items=run.pick(quick=(4, 16), full=(4, 16, 64, 256)),
        overload_dimensions=run.pick(quick=(16, 64), full=(16, 64, 256, 1024)),
        overload_draws=run.pick(quick=20, full=200),
        chain_items=run.pick(quick=(8,), full=(32, 128)),
        chain_dimension=run.pick(quick=32, full=256),
        draws=run.pick(quick=4, full=100),
    )
    result = lab.run()
    record_lab(run, lab, result)
    run.figure("capacity", result.plot(["cross-talk", "overload", "chain", "heads"]))
    run.figure("conditioning", result.plot(["blocking", "acquisition and extinction"]))
    record_clean_up(run, lab)
    record_readers(run)
    if not run.quick:  # a quick run has no time to load the model
        record_heads(run)


def record_lab(run: Run, lab: Pavlovian, result: Result) -> None:
    """The claims that the laboratory itself checks."""
    checks = result.checks
    codes = f"d = {lab.chain_dimension}, {lab.draws} draws"
    redundant = f"{codes}, n = {lab.chain_items[0]}, R in {lab.heads}"
    average = f"d_k = {lab.dimension}, n in {lab.items}, {lab.draws} draws"
    for name, check, where in (
        ("average", "cross-talk", average),
        ("redundancy", "redundancy", redundant),
        ("projections", "projections", redundant),
    ):
        record_check(run, name, [checks[check]], where)
    chains = [checks[f"chain, n = {n}"] for n in lab.chain_items]
    record_check(run, "chain", chains, f"{codes}, n in {lab.chain_items}, D up to {lab.depth}")
    overload = result.series["overload"]
    counts = dict(zip(lab.overload_dimensions, overload.measured.tolist(), strict=True))
    others = {d: n - 1 for d, n in counts.items()}
    first, (low, high) = lab.overload_dimensions[0], lab.overload_dimensions[-2:]
    record_check(
        run,
        "worst",
        [checks["worst case"]],
        f"d_k in {lab.overload_dimensions}, {lab.overload_draws} draws each",
        "n: "
        + ", ".join(f"{n:.1f} at d_k = {d}" for d, n in counts.items())
        + f"; exponent from d_k = {low} to {high}: {_slope(low, high, counts):.2f}; exponent of n - 1, the associations that "
        + f"disturb, from d_k = {first}: {_slope(first, high, others):.2f}",
    )
    trials = f"b = {lab.rate}, n1 = {lab.first}, n2 = {lab.second}"
    run.record(
        "closed forms",
        here=checks["closed forms"].measured,
        setting=f"{trials}; Hebb, decaying trace, Rescorla-Wagner, Oja",
        note="conditioned inhibition has a limit only, -V_A for Rescorla-Wagner; largest difference after 400 pairs of trials "
        f"{checks['inhibition'].measured:.1e}. A blocked cue keeps "
        f"{checks['the delta rule'].predicted:.3f} with Rescorla-Wagner, {lab.rate * lab.second:g} with Hebb",
    )
    through = [checks[name] for name in ("the delta rule", "linear attention")]
    run.record(
        "operators",
        here=max(one.off for one in through),
        setting=f"{trials}; float64",
        note="; ".join(f"{one.name}: V_B = {one.measured:.6f}" for one in through),
    )


def _slope(low: int, high: int, counts: dict[int, float]) -> float:
    """Exponent between two dimensions."""
    return math.log(counts[high] / counts[low]) / math.log(high / low)


def record_check(run: Run, name: str, checks: Sequence[Check], where: str, note: str = "") -> None:
    """The check of these that is furthest off; all of them must hold."""
    verdicts = [one.holds for one in checks]
    worst = max(checks, key=lambda one: one.off)
    run.record(
        name,
        here=worst.measured,
        interval=(worst.measured - worst.error, worst.measured + worst.error),
        holds=False if False in verdicts else None if None in verdicts else True,
        setting=where,
        note=f"{note or worst.says}; interval: 95 % over draws"
        + ("; it leaves the verdict open" if None in verdicts else ""),
    )


def record_clean_up(run: Run, lab: Pavlovian) -> None:
    d, draws = lab.dimension, lab.draws
    curve = run.partial("clean-up", lambda: runs.clean_up(d, (d // 4, d, 8 * d), draws))
    at, far = 100 * curve[1]["accuracy"], 100 * curve[2]["accuracy"]
    run.record(
        "clean-up",
        here=at,
        holds=at > 99 and at - far > 5,
        setting=f"d_k = {d}, {draws} draws",
        note="; ".join(f"n = {one['n']}: {100 * one['accuracy']:.1f} %" for one in curve),
    )
    # twice as many items as dimensions, so that single hops fail often enough to count
    items, width, depth = d, d // 2, 4
    found = run.partial("hops", lambda: runs.hops(items, width, depth, 10 * draws))
    failure = 1 - found["right"][0]
    off = [100 * (right - chain_success(failure, i + 1)) for i, right in enumerate(found["right"])]
    run.record(
        "hops",
        here=max(map(abs, off)),
        holds=max(map(abs, off)) <= 2,
        setting=f"n = {items}, d = {width}, D up to {depth}, {10 * draws} draws",
        note="success after each hop: "
        + ", ".join(f"{100 * right:.1f} %" for right in found["right"])
        + f"; p = {failure:.3f} from the first",
    )
    votes = {
        int(heads): 100 * (one["most"] - majority_failure(one["alone"], int(heads)))
        for heads, one in found["votes"].items()
    }
    run.record(
        "majority",
        here=max(map(abs, votes.values())),
        holds=max(map(abs, votes.values())) <= 2,
        setting=f"n = {items}, d = {width}, {10 * draws} draws",
        note="failure of a majority, binomial: "
        + "; ".join(
            f"R = {heads}: {100 * one['most']:.1f} %, "
            f"{100 * majority_failure(one['alone'], int(heads)):.1f} %"
            for heads, one in found["votes"].items()
        ),
    )


def record_readers(run: Run) -> None:
    size = run.pick(quick=runs.Size(steps=10, batch=8, runs=2, triples=20), full=runs.Size())
    run.seed(1)
    found = {
        name: run.partial(f"reader/{name}", lambda n=name: runs.reader(n, size, seed=1))
        for name in run.progress(list(runs.READERS), "readers")
    }
    where = (
        f"one layer, cues of {size.dim} dimensions, {size.cues} cues in {size.trials} trials, {size.steps} steps of "
        f"{size.batch} streams, {size.runs} runs"
    )
    run.record(
        "learns",
        here={name: float(np.mean(one["error"])) for name, one in found.items()},
        holds=all(max(one["error"]) < 0.7 for one in found.values()),
        setting=where,
        note=f"the best linear predictor of a stream has {np.mean(found['DeltaNet']['floor']):.3f}",
    )
    effects = {name: runs.indices(one["responses"]) for name, one in found.items()}
    protocol = f"8 trials a phase, {size.triples} triples of fresh cues; {where}"
    for effect, bound in zip(EFFECTS, (0.3, 0.2, 0.5), strict=True):
        mean, half = _interval(effects["DeltaNet"][effect])
        plain, _ = _interval(effects["linear attention"][effect])
        low, high = mean - half, mean + half
        need = bound if effect == "blocking" else max(bound, plain)
        run.record(
            effect,
            here=mean,
            interval=(low, high),
            holds=True if low > need else False if high < need else None,
            setting=protocol,
            note="; ".join(f"{name}: {np.mean(one[effect]):.2f}" for name, one in effects.items())
            + "; interval: 95 % over runs",
        )
    mean, half = _interval(effects["linear attention"]["blocking"])
    run.record(
        "no blocking",
        here=mean,
        interval=(mean - half, mean + half),
        holds=True if abs(mean) + half <= 0.1 else False if abs(mean) - half > 0.1 else None,
        setting=protocol,
        note="interval: 95 % over runs",
    )
    run.figure("readers", draw_readers(found, effects))


def _interval(values: list[float]) -> tuple[float, float]:
    mean, half = interval(np.array(values))
    return float(mean), float(half)


def record_heads(run: Run) -> None:
    model, prompts = run.model(), 48
    found = [
        run.partial(f"pairs/{n}", lambda n=n: runs.pairs_in_context(model, n, prompts))
        for n in run.progress(PAIRS, "pairs in context")
    ]
    safe = np.array(found[-1]["safe"])
    least, most = float(safe.mean()), 0
    sure = possible = 0
    for one in found:
        share, half = one["right"], 1.96 * math.sqrt(one["right"] * (1 - one["right"]) / prompts)
        most = one["pairs"] if share > 0.5 else most
        sure = one["pairs"] if share - half > 0.5 else sure
        possible = one["pairs"] if share + half > 0.5 else possible
    where = f"SmolLM2-135M-Instruct, n in {PAIRS}, {prompts} prompts each"
    run.record(
        "capacity",
        here=most / least,
        interval=(sure / least, possible / least),
        holds=True if sure > least else False if possible <= least else None,
        setting=where,
        note=f"sqrt(d_eff) over {len(safe)} heads: {safe.min():.1f} to {safe.max():.1f}, mean {least:.1f} (keys at the values, "
        "after their positions, centred); recalled as the likeliest of all words: "
        + ", ".join(f"n = {one['pairs']}: {100 * one['right']:.0f} %" for one in found)
        + "; as the likeliest of the stored values: "
        + ", ".join(f"{100 * one['among']:.0f} %" for one in found)
        + "; interval: between the n that are recalled so surely and possibly, binomial 95 %"
        + ("; it has 1 inside" if sure <= least < possible else ""),
    )
    few, many = np.array(found[1]["mass"]), np.array(found[-1]["mass"])
    used = few > 0.2
    fit = runs.rank_correlation(safe[used].tolist(), (many[used] / few[used]).tolist())
    known = math.isfinite(fit["rho"])
    run.record(
        "correlation",
        here=fit["rho"] if known else None,
        interval=(fit["low"], fit["high"]) if known else None,
        holds=None if not known or fit["low"] <= 0 <= fit["high"] else fit["low"] > 0,
        setting=where,
        note=f"{int(used.sum())} heads with more than 0.2 of their attention on the value among {PAIRS[1]} pairs; many: "
        f"{PAIRS[-1]}; interval: bootstrap over heads, 95 %"
        + ("" if known and not fit["low"] <= 0 <= fit["high"] else "; it does not exclude 0"),
    )
    run.figure("heads", draw_heads(found, safe))


def draw_readers(
    found: dict[str, dict[str, Any]], effects: dict[str, dict[str, list[float]]]
) -> Figure:
    """Training, and the share of a response that each effect takes away."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for i, (name, one) in enumerate(found.items()):
        steps = np.linspace(0, 1, len(one["losses"]))
        axes[0].plot(steps, one["losses"], color=f"C{i}", label=name, lw=1.2)
        means = [_interval(effects[name][effect]) for effect in EFFECTS]
        axes[1].bar(
            np.arange(len(EFFECTS)) + 0.27 * (i - 1),
            [mean for mean, _ in means],
            0.25,
            yerr=[half for _, half in means],
            color=f"C{i}",
            capsize=2,
            label=name,
        )
    floor = float(np.mean(found["DeltaNet"]["floor"]))
    axes[0].axhline(floor, color="0.5", ls="--", lw=0.8, label="best linear predictor")
    axes[0].set(xlabel="share of training", ylabel="mean squared error")
    axes[0].legend(frameon=False, fontsize=8)
    axes[1].axhline(0, color="0.5", lw=0.8)
    axes[1].set_xticks(range(len(EFFECTS)), EFFECTS)
    axes[1].set(ylabel="share of the response taken away")
    return figure


def draw_heads(found: list[dict[str, Any]], safe: np.ndarray) -> Figure:
    """Recall over n beside the linear prediction, and what each head keeps."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    counts = [one["pairs"] for one in found]
    for key, colour, label in (
        ("among", "C2", "likeliest of the stored values"),
        ("right", "C1", "likeliest of all words"),
    ):
        shares = [100 * one[key] for one in found]
        axes[0].plot(counts, shares, "o-", color=colour, ms=4, label=label)
    axes[0].legend(frameon=False, fontsize=8)
    axes[0].axvspan(float(safe.min()), float(safe.max()), color="C0", alpha=0.2)
    axes[0].text(float(safe.min()), 4, "sqrt(d_eff) of the heads", fontsize=8, color="C0")
    axes[0].set(xscale="log", xlabel="n, pairs in context", ylabel="recalled, %", ylim=(0, 105))
    few, many = np.array(found[1]["mass"]), np.array(found[-1]["mass"])
    used = few > 0.2
    axes[1].scatter(safe[used], many[used] / few[used], s=12, color="C1")
    axes[1].set(
        xlabel="sqrt(d_eff) of the head's keys",
        ylabel=f"attention on the value, {counts[-1]} over {counts[1]} pairs",
    )
    return figure
