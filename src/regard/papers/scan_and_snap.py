"""Scan and Snap (arXiv 2305.16380): how one layer of attention comes to look at few tokens, and when it stops.

Checked here:

* the long-sequence model, by SciPy's solver and by gradient descent: signs of every token's change, the growth band, the
  exponents of both regimes, the time between them for several vocabularies and decoder rates, and the decoder's decay;
* training on sequences from the authors' generator: their loss curve, and how the two learning rates set the final entropy;
* real text: whether distinct words gain attention.

Beyond our scale: WikiText with multi-layer models.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from regard.labs.results import interval
from regard.labs.scan_and_snap import ScanAndSnap, follow, relative_growth
from regard.papers import Claim, Paper, Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PRINTED = {0: 3.53, 4: 0.73, 12: 4e-3, 60: 2e-5}  # the authors' log: loss by step

PAPER = Paper(
    "scan-and-snap",
    claims=[
        Claim(
            "fates",
            "Distinct tokens rise and the common token falls: logged times at which one does not",
            setting="theorem 2",
            paper="0",
            expect="0",
            holds=lambda wrong: wrong == 0,
        ),
        Claim(
            "band",
            "Growth of the dominant token lies between exp(2 f^2 B) and exp(2 B): range of ln chi / 2B",
            setting="theorem 3",
            paper="between f(0)^2 and 1",
            expect="inside, within 1 %",
        ),
        Claim(
            "same",
            "Growth does not depend on the token compared with: spread of ln chi over them, largest over time",
            setting="theorem 3",
            paper="0",
            unit=" %",
            expect="below 5 % of its mean",
            holds=lambda spread: spread < 5,
        ),
        Claim(
            "scan",
            "While scanning, B grows as t^2: measured exponent",
            setting="theorem 4, t below K ln M / eta_Y",
            paper="2",
            expect="2 within 0.2",
            holds=lambda exponent: abs(exponent - 2) <= 0.2,
        ),
        Claim(
            "snap",
            "While snapping, B grows as a power of a logarithm: measured exponent in t at the end",
            setting="theorem 4, t above 2 K ln M / eta_Y",
            paper="2 / ln(M eta_Y t / K)",
            expect="below 0.25, and within 0.06 of the law",
        ),
        Claim(
            "transition",
            "The regimes change between K ln M / eta_Y and twice that: time when growth becomes slower than linear, "
            "over K ln M / eta_Y",
            setting="theorem 4",
            paper="1 to 2 (1 + o(1))",
            expect="between 1 and 2.2 for every K and eta_Y",
        ),
        Claim(
            "residual",
            "The decoder's residual 1 - alpha falls as 1/t: measured exponent at the end",
            setting="theorem 1",
            paper="-1",
            expect="-1 within 0.05",
            holds=lambda exponent: abs(exponent + 1) <= 0.05,
        ),
        Claim(
            "identity",
            "With one common token B = -z_c: measured ratio -z_c / B at the end",
            setting="theorem 4",
            paper="1",
            expect="1 within 1 %",
            holds=lambda ratio: abs(ratio - 1) <= 0.01,
        ),
        Claim(
            "exact",
            "Instead dz_c/dt = -eta_Z xi (1 - f_c^2): distance of that ratio from the range of 1 - f_c^2",
            setting="not in the paper: it follows from the equation of motion without approximation",
            paper="0",
            expect="below 1e-4",
            holds=lambda far: far < 1e-4,
        ),
        Claim(
            "losses",
            "The authors' small run is met: mean loss after 4 steps",
            setting="2 last tokens, 1 next each, 10 common, 10 distinct, 128 tokens, batch 128, momentum 0.9, eta = 1",
            paper="3.53, then 0.73, 4e-3 and 2e-5 after 4, 12 and 60 steps",
            unit=" nats",
            expect="within a factor 3 after 4, 12 and 60 steps",
        ),
        Claim(
            "sampled",
            "After training on sequences distinct tokens stand above common ones, the more the more frequent they "
            "are: z, lowest distinct minus highest common",
            setting="the same run",
            paper="above 0",
            expect="above 0 for at least 9 of 10 distinct tokens' mean, and rank correlation with P(l|n) above 0.9",
        ),
        Claim(
            "entropy",
            "A faster decoder leaves attention more spread out: smallest rise of entropy between neighbouring eta_Y / eta_Z",
            setting="eta_Y / eta_Z 1, 2, 5, 10",
            paper="above 0",
            unit=" nats",
            expect="above 0, its 95 % interval too",
        ),
        Claim(
            "sparser",
            "Faster attention leaves it sparser: largest change of entropy between neighbouring eta_Z, the decoder's rate fixed",
            setting="eta_Y = 4",
            paper="below 0",
            unit=" nats",
            expect="below 0, its 95 % interval too",
        ),
        Claim(
            "mix",
            "What remains is sparse but not one token: effective number of tokens exp(entropy), before and after",
            setting="all settings of the sweep",
            paper="fewer, more than 1",
            expect="fewer than before in every setting, more than 2 in every setting",
        ),
        Claim(
            "official sweep",
            "Mean entropies of c_n over the authors' sweep",
            setting="1, 3, 5, 10 last tokens, eta_Z 0.5 to 3, eta_Y / eta_Z 1 to 10, random start",
            paper="1.55 to 2.09 nats",
            expect="all between 1.5 and 2.15 nats",
        ),
        Claim(
            "text",
            "In real text distinct words gain attention: Spearman correlation of z with the entropy of the next word",
            setting="the paper shows entropies on WikiText only",
            paper="below 0",
            expect="below -0.2 with the words' frequency partialled out, for every seed",
        ),
        Claim(
            "wikitext",
            "In multi-layer models on WikiText attention entropy falls first in the first layer",
            setting="WikiText-103",
            beyond="training multi-layer models on WikiText-103 takes GPU days",
        ),
    ],
    needs=("matplotlib", "scipy"),
)


def experiment(run: Run) -> None:
    run.seed(0)
    lab = ScanAndSnap(
        classes=run.pick(quick=5, full=20),
        horizon=run.pick(quick=200.0, full=6000.0),
        sweep_classes=run.pick(quick=(5,), full=(5, 10, 20)),
        sweep_rates=run.pick(quick=(2.0, 4.0), full=(1.0, 2.0, 4.0)),
        steps=run.pick(quick=10, full=100),
        seeds=run.pick(quick=2, full=5),
        batch=run.pick(quick=32, full=128),
    )
    result = lab.run()
    checks = result.checks
    where = (
        f"K = {lab.classes}, M = {lab.tokens}, one common token of probability {lab.common_mass:g}, "
        f"eta_Y = {lab.rate_decoder:g}, eta_Z = {lab.rate_attention:g}, to t = {lab.horizon:g}"
    )
    run.record(
        "fates",
        here=checks["fates"].measured,
        setting=where,
        note="every token of every class, by the solver and by descent",
    )
    low, high = checks["lower"], checks["upper"]
    run.record(
        "band",
        here={"smallest": low.measured, "largest": high.measured, "f(0)^2": low.predicted},
        holds=bool(low.holds and high.holds),
        setting=where,
        note="B is the integral of the distinct tokens' own growth dz/dt / f^2; with the theorem's B = -z_c the values are about "
        f"{low.measured / checks['common'].measured:.3f} to {high.measured / checks['common'].measured:.3f}",
    )
    for name in ("scan", "residual"):
        run.record(name, here=checks[name].measured, setting=where)
    snap = checks["snap"]
    run.record(
        "snap",
        here=snap.measured,
        holds=bool(snap.holds and snap.measured < 0.25),
        setting=where,
        note=f"the law has {snap.predicted:.3f}",
    )
    first, last = checks["transition, low"], checks["transition, high"]
    run.record(
        "transition",
        here={"smallest": first.measured, "largest": last.measured},
        holds=bool(first.holds and last.holds),
        setting=f"K in {lab.sweep_classes}, eta_Y in {lab.sweep_rates}, eta_Z = {lab.rate_attention / 10:g}",
    )
    share = 1 - float(
        lab.population().probability[0, 0] ** 2 / (lab.population().probability[0] ** 2).sum()
    )
    run.record(
        "identity",
        here=checks["common"].measured,
        setting=where,
        note=f"the factor 1 - f_c^2, {share:.3f} at the start, is missing; it is near 1 only where the common token "
        f"is a small part of f",
    )
    run.record("exact", here=checks["common, exact"].measured, setting=where)
    times = np.array([0.0, *np.geomspace(1, min(lab.horizon, 2000.0), 20)])
    course = follow(
        lab.population(), np.array(lab.rate_decoder), np.array(lab.rate_attention), times
    )
    chi = relative_growth(course, lab.population())[1:]
    spread = np.ptp(chi, axis=1) / chi.mean(1)
    run.record(
        "same",
        here=100 * float(spread.max()),
        setting=where,
        note=f"to t = {times[-1]:g}; at the end {100 * float(spread[-1]):.1f} %; the most frequent token against each other one",
    )
    run.figure(
        "flow",
        result.plot(
            ["growth", "scanning", "exponent", "residual", "relative growth", "phase transition"]
        ),
    )
    sampled(run)
    run.figure("sampled", result.plot(["final entropy", "fates of tokens"]))
    text(run)


def sampled(run: Run) -> None:
    """Training on sequences from the authors' generator."""
    from regard.papers import _scan_and_snap_runs as runs

    seeds = run.pick(quick=2, full=10)
    small = run.partial("small", lambda: runs.small_run(seeds, run.pick(quick=61, full=100)))
    factors = {step: small["losses"][step] / loss for step, loss in PRINTED.items()}
    run.record(
        "losses",
        here=small["losses"][4],
        holds=all(1 / 3 <= factor <= 3 for factor in factors.values()),
        setting=f"zero start, {seeds} seeds",
        note="loss after 0, 4, 12 and 60 steps: "
        + ", ".join(f"{small['losses'][step]:.3g}" for step in PRINTED),
    )
    own, common = np.array(small["distinct"]), np.array(small["common"])
    order = float(np.corrcoef(np.arange(len(own)), np.argsort(np.argsort(own)))[0, 1])
    run.record(
        "sampled",
        here=float(own.min() - common.max()),
        holds=bool((own > common.max()).sum() >= 9 and order > 0.9),
        setting=f"zero start, {seeds} seeds",
        note=f"z of common tokens {common.min():.2f} to {common.max():.2f}, of distinct ones, by rising P(l|n): "
        + ", ".join(f"{value:.2f}" for value in own)
        + f"; rank correlation {order:.2f}; entropy of c {np.mean(small['start']):.2f} -> {np.mean(small['end']):.2f} nats",
    )
    lasts = run.pick(quick=(1,), full=(1, 3, 5))
    attention, ratios = run.pick(quick=(1.0, 2.0), full=(0.5, 1.0, 2.0, 3.0)), (1.0, 2.0, 5.0, 10.0)
    repeats, steps = run.pick(quick=2, full=4), run.pick(quick=5, full=100)
    found = run.partial("sweep", lambda: runs.sweep(lasts, attention, ratios, repeats, steps))
    grid = np.array([found[str(last)] for last in lasts])  # last, eta_Z, ratio, seed
    where = f"{lasts} last tokens, 2 next each, eta_Z in {attention}, {steps} steps, {repeats} seeds, zero start"
    rises, bars = interval(np.diff(grid, axis=2), axis=3)
    at = np.unravel_index((rises - bars).argmin(), rises.shape)
    run.record(
        "entropy",
        here=float(rises[at]),
        interval=(float(rises[at] - bars[at]), float(rises[at] + bars[at])),
        holds=bool((rises - bars).min() > 0),
        setting=where,
        note=f"the least certain of {rises.size} rises; {int((rises > 0).sum())} are above 0, "
        f"{int((rises - bars > 0).sum())} with their "
        f"interval; means by ratio: "
        + ", ".join(f"{value:.2f}" for value in grid.mean((0, 1, 3)))
        + " nats; interval: 95 % over seeds",
    )
    sparser(run, repeats, steps)
    before = float(np.mean([_start(last) for last in lasts]))
    run.record(
        "mix",
        here={
            "before": float(np.exp(before)),
            "most": float(np.exp(grid.max())),
            "fewest": float(np.exp(grid.min())),
        },
        holds=bool(grid.max() < before and grid.min() > np.log(2)),
        setting=where,
        note="effective tokens of c_n, of 20 that a class uses",
    )
    means = grid.mean(-1)
    run.record(
        "official sweep",
        here={"lowest": float(means.min()), "highest": float(means.max())},
        holds=bool(means.min() >= 1.5 and means.max() <= 2.15),
        setting=where,
        note="the authors start from random weights, whose scale we do not know, and do not say after how many steps "
        "they measure",
    )
    run.figure("sweep", draw_sweep(lasts, attention, ratios, grid))


def _start(last: int) -> float:
    """Entropy of c_n before training."""
    from regard.labs.scan_and_snap import entropy, make_classes
    from regard.papers._scan_and_snap_runs import COMMON, DISTINCT

    return float(entropy(make_classes(last, 2, COMMON, DISTINCT).probability).mean())


def sparser(run: Run, repeats: int, steps: int) -> None:
    """The same decoder, faster and faster attention."""
    from regard.papers import _scan_and_snap_runs as runs

    rates = (0.5, 1.0, 2.0, 4.0)
    fixed = run.partial(
        "sparser",
        lambda: [
            runs.sweep([3], [rate], [4.0 / rate], repeats, steps)["3"][0][0] for rate in rates
        ],
    )
    changes, bars = interval(np.diff(np.array(fixed), axis=0), axis=1)
    at = int((changes + bars).argmax())
    run.record(
        "sparser",
        here=float(changes[at]),
        interval=(float(changes[at] - bars[at]), float(changes[at] + bars[at])),
        holds=bool((changes + bars).max() < 0),
        setting=f"3 last tokens, 2 next each, eta_Z in {rates}, {steps} steps, {repeats} seeds",
        note="entropies: "
        + ", ".join(f"{np.mean(values):.2f}" for values in fixed)
        + " nats; interval: 95 % over seeds",
    )


def text(run: Run) -> None:
    """Y and Z on windows of English prose."""
    from regard.papers import _scan_and_snap_runs as runs

    words, steps = run.pick(quick=60, full=300), run.pick(quick=20, full=1000)
    characters = run.pick(quick=40_000, full=300_000)
    seeds = run.pick(quick=[0], full=[0, 1])
    found: list[dict[str, Any]] = []
    for seed in run.progress(seeds, "text"):
        run.seed(seed)
        found.append(
            run.partial(
                f"text/{seed}",
                lambda s=seed: runs.text_fates(
                    words=words,
                    characters=characters,
                    length=64,
                    batch=128,
                    steps=steps,
                    rates=(20.0, 2.0),
                    seed=s,
                ),
            )
        )
    partial = [one["partial"] for one in found]
    run.record(
        "text",
        here=float(np.mean(partial)),
        interval=(min(partial), max(partial)),
        holds=max(partial) < -0.2,
        setting=f"{found[0]['words'][0]:,} running words, the {words} most frequent, windows of 64, {steps} steps, "
        f"{len(seeds)} seed(s)",
        note=f"without partialling out frequency {np.mean([one['spearman'] for one in found]):.2f}; z with log frequency "
        f"{np.mean([one['with frequency'] for one in found]):.2f}; loss {found[0]['losses'][0]:.2f} -> "
        f"{found[0]['losses'][1]:.2f} nats; "
        "interval: range over seeds",
    )
    run.figure("text", draw_text(found[0]))


def draw_sweep(lasts: Any, attention: Any, ratios: Any, grid: np.ndarray) -> Figure:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        1, len(lasts), figsize=(3 * len(lasts), 3), sharey=True, layout="constrained", squeeze=False
    )
    for ax, last, values in zip(axes[0], lasts, grid, strict=True):
        for i, rate in enumerate(attention):
            mean, half = interval(values[i], axis=1)
            ax.errorbar(
                ratios,
                mean,
                yerr=half,
                marker="o",
                ms=3.5,
                capsize=2,
                lw=1,
                label=f"eta_Z = {rate:g}",
            )
        ax.set(xscale="log", xlabel="eta_Y / eta_Z")
        ax.set_title(f"{last} last token{'s' if last > 1 else ''}", fontsize=10)
    axes[0, 0].set_ylabel("final entropy of c, nats")
    axes[0, -1].legend(frameon=False, fontsize=8)
    return figure


def draw_text(found: dict[str, Any]) -> Figure:
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=(5, 3.4), layout="constrained")
    ax.plot(found["spread"], found["z"], ".", ms=4, color="C1")
    ax.axhline(0, color="0.7", lw=0.8)
    ax.set(
        xlabel="entropy of the next word given this one in the window, nats",
        ylabel="learnt z, mean over last words",
    )
    return figure
