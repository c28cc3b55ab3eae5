"""What active-dormant claims of its laboratory, and how the runs decide it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from regard.labs.bigram_backcopy.film import film
from regard.labs.bigram_backcopy.training import Course
from regard.papers import Claim, Run
from regard.papers import _bigram_backcopy_runs as runs

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LEARNT = 0.5
"""An arm has learnt to copy when its excess at triggers is below this (nats; a few at the start)."""

TOY = "Bigram-Backcopy, 1 layer"

CLAIMS = [
    Claim(
        "log",
        "Theory: with the value of <s> held, the sink logit grows as 1/2 log t: local slope of alpha against log t",
        setting="gradient flow of the simplified model",
        paper="0.5",
        expect="within [0.49, 0.55] for every seed, everywhere beyond t = 10,000",
    ),
    Claim(
        "exponential",
        "Theory: with the sink logit held, the value of <s> drains exponentially: fitted rate over predicted rate, worst",
        setting="gradient flow of the simplified model",
        paper="exponential, no rate",
        expect="within 5 % of the linearised rate for every alpha, and the value it ends at shrinking as e^-alpha",
    ),
    Claim(
        "toy sink",
        "Ordinary queries park on <s>: their attention to it",
        setting=TOY,
        paper="near 1",
        expect="above 0.9, triggers below 0.1",
    ),
    Claim(
        "toy copy",
        "Triggers attend to the token before",
        setting=TOY,
        paper="near 1",
        expect="above 0.9",
    ),
    Claim(
        "toy drain",
        "The value of <s> is drained: its norm over the others'",
        setting=TOY,
        paper="near 0",
        expect="below 0.1",
    ),
    Claim(
        "toy log",
        "The sink logit grows like the logarithm of the step: R^2 over the second half",
        setting=TOY,
        paper="a straight line",
        expect="above 0.9",
    ),
    Claim(
        "toy concentrates",
        "It is the same at all ordinary queries: standard deviation over symbols, of its mean",
        setting=TOY,
        paper="concentrates",
        unit=" %",
        expect="below 20 %",
    ),
    Claim(
        "toy heads",
        "The head is active at triggers and dormant elsewhere: what zeroing it costs triggers, nats",
        setting=TOY,
        expect="above 1 at triggers and below 0.05 at ordinary queries; parking it on <s> likewise",
    ),
    Claim(
        "toy relu",
        "ReLU attention has neither sink nor drain: share of ordinary attention on <s>",
        setting=f"{TOY}, ReLU attention",
        paper="none",
        expect="below 0.3, and a value ratio above 0.5",
    ),
    Claim(
        "toy peak",
        "The peak needs Adam: residual norm of <s> over the others' after block 1, Adam's over SGD's",
        setting="Bigram-Backcopy, 3 layers",
        paper="a peak with Adam, none with SGD",
        unit=" x",
        expect="at least 3 x for every seed",
    ),
    Claim(
        "toy erased",
        "The last block erases the peak: residual ratio of <s> at the end over its largest between blocks, under Adam",
        setting="Bigram-Backcopy, 3 layers",
        paper="back to the others' level",
        expect="below 0.5 for every seed",
    ),
    Claim(
        "toy sgd",
        "With SGD sink and drain stay: attention of ordinary queries to <s>, the layer with the most",
        setting="Bigram-Backcopy, 3 layers, SGD",
        paper="they stay",
        expect="above 0.9, and a value ratio below 0.1 in some layer, for every seed",
    ),
    Claim(
        "toy grows",
        "Under Adam the peak keeps growing: smallest step of the ratio after block 1 over the second half of the course",
        setting="Bigram-Backcopy, 3 layers, 100,000 steps",
        paper="grows about linearly",
        expect="above 0 at every step of the course",
    ),
]


def record_laboratory(run: Run, scale: runs.Scale) -> None:
    """Trains the arms and records every claim of the laboratory."""
    record_theory(run)
    found: dict[str, Any] = {}
    for name in run.progress(list(runs.ARMS), "Bigram-Backcopy"):
        for seed in scale.seeds:
            run.seed(seed)
        found[name] = run.partial(f"arm/{name}", lambda n=name: runs.arm(n, scale))
    record_shallow(run, found["1 layer"], scale)
    record_relu(run, found["1 layer, ReLU"], scale)
    record_deep(run, found["3 layers, Adam"], found["3 layers, SGD"], scale)
    for name, one in list(found.items())[: run.pick(quick=1, full=None)]:
        file = name.lower().replace(",", "").replace(" ", "-")
        run.figure(f"film-{file}", film(course(one)), format="png")


def course(found: dict[str, Any]) -> Course:
    """The course of an arm from its plain form."""
    measures = {name: np.array(values) for name, values in found["measures"].items()}
    return Course(np.array(found["steps"]), measures, np.array(found["maps"]))


def record_theory(run: Run) -> None:
    seeds, euler = run.pick(quick=(1, 20.0), full=(3, 1000.0))
    found = run.partial("flow", lambda: runs.sink_slopes(seeds, euler=euler))
    slopes = np.array(found["slopes"])
    gap = np.array(found["alpha"])[:, -1] - np.array(found["theory"])[:, -1]
    run.record(
        "log",
        here=float(slopes.mean()),
        interval=(float(slopes.min()), float(slopes.max())),
        holds=bool(slopes.min() >= 0.49 and slopes.max() <= 0.55),
        setting=f"16 symbols, W = 5, {seeds} random p and xi, t from 10,000 to 200,000, SciPy's solver",
        note=f"at the end alpha is within {np.abs(gap).max():.3f} of 1/2 log(2 Var t); Euler's steps of 0.05 differ by at "
        f"most {found['euler']:.1e} up to t = {euler:,.0f}; interval: range over seeds and times",
    )
    rows = runs.drain_decay((2.0, 4.0)) if run.quick else runs.drain_decay()
    ratios = [row["rate"] / row["predicted"] for row in rows]
    worst = max(ratios, key=lambda ratio: abs(ratio - 1))
    left = max(row["left"] for row in rows)
    scaled = [row["size"] * np.exp(row["alpha"]) for row in rows]
    run.record(
        "exponential",
        here=worst,
        holds=abs(worst - 1) < 0.05 and left < 1e-4 and max(scaled) < 1.001 * min(scaled),
        setting="8 symbols, W = 5, alpha = " + ", ".join(f"{row['alpha']:g}" for row in rows),
        note="; ".join(
            f"alpha {row['alpha']:g}: rate {row['rate']:.2e}, predicted {row['predicted']:.2e}, ends {row['size']:.3f} from c 1"
            for row in rows
        )
        + f"; at most {left:.0e} of the way is left",
    )
    run.figure("flow", draw_flow(found))


def record_shallow(run: Run, found: dict[str, Any], scale: runs.Scale) -> None:
    here = f"width {scale.width}, {scale.length} tokens, {scale.steps} steps of {scale.batch}, {len(scale.seeds)} seeds"
    seen = course(found)
    last = {
        name: values[-1].reshape(len(scale.seeds), -1) for name, values in seen.measures.items()
    }
    sink, back, other, drain = (
        last[name][:, 0]
        for name in ("ordinary to <s>", "trigger to previous", "trigger to <s>", "drain")
    )
    span = "interval: range over seeds"
    loss = f"excess loss in nats: ordinary {last['ordinary excess'].mean():.3f}, triggers {last['trigger excess'].mean():.3f}"
    record(
        run,
        "toy sink",
        sink,
        sink.min() > 0.9 and other.max() < 0.1,
        here,
        f"triggers give <s> {other.max():.3f}; {loss}; {span}",
    )
    record(run, "toy copy", back, back.min() > 0.9, here, span)
    record(run, "toy drain", drain, drain.max() < 0.1, here, span)
    late = seen.steps >= scale.steps / 2
    gap = seen.measures["delta logit"][..., 0]
    fits = np.array(
        [
            np.corrcoef(np.log(seen.steps[late]), gap[late, seed])[0, 1] ** 2
            for seed in range(gap.shape[1])
        ]
    )
    rising = bool((gap[late][-1] > gap[late][0]).all())
    record(
        run,
        "toy log",
        fits,
        fits.min() > 0.9 and rising,
        here,
        f"{late.sum()} logged steps; ends at {gap[-1].mean():.1f}; {span}",
    )
    share = 100 * last["spread"][:, 0] / np.abs(gap[-1])
    record(run, "toy concentrates", share, share.max() < 20, here, span)
    change = {
        name: {k: np.array(v) for k, v in one.items()}
        for name, one in found["interventions"].items()
    }
    zero, park = change["zero"], change["park"]
    told = "; ".join(
        f"{n}: {c['ordinary'].mean():+.3f} ordinary, {c['trigger'].mean():+.3f} triggers"
        for n, c in change.items()
    )
    holds = all(one["trigger"].min() > 1 and one["ordinary"].max() < 0.05 for one in (zero, park))
    record(run, "toy heads", zero["trigger"], holds, here, f"loss change, nats: {told}; {span}")


def record_relu(run: Run, found: dict[str, Any], scale: runs.Scale) -> None:
    last = {name: values[-1] for name, values in course(found).measures.items()}
    first, drain, over = last["ordinary to <s>"][:, 0], last["drain"][:, 0], last["trigger excess"]
    holds = bool(first.max() < 0.3 and drain.min() > 0.5) if over.max() < LEARNT else None
    note = f"value ratio {drain.min():.2f} to {drain.max():.2f}; excess at triggers {over.mean():.3f} nats"
    note += "; interval: range over seeds"
    note += unlearnt(holds is not None)
    here = f"width {scale.width}, {scale.relu_steps} steps, Adam, {len(scale.seeds)} seeds"
    record(run, "toy relu", first, holds, here, note)


def record_deep(run: Run, adam: dict[str, Any], sgd: dict[str, Any], scale: runs.Scale) -> None:
    here = f"width {scale.width}, {scale.length} tokens, {scale.deep_steps} steps of {scale.batch}, {len(scale.seeds)} seeds"
    both = [course(adam).measures, course(sgd).measures]
    peaks = [one["peak"][..., 1] for one in both]
    over = [one["trigger excess"][-1] for one in both]
    ratio = peaks[0][-1] / peaks[1][-1]
    learnt = all(one.max() < LEARNT for one in over)
    holds = bool(ratio.min() >= 3) if learnt else None
    rows = [
        f"{name}: peak by site {np.round(one['peak'][-1].mean(0), 2).tolist()}, ordinary attention to <s> by layer "
        f"{np.round(one['ordinary to <s>'][-1].mean(0), 2).tolist()}, excess at triggers {one['trigger excess'][-1].mean():.3f}"
        for name, one in zip(("Adam", "SGD"), both, strict=True)
    ]
    note = "; ".join(rows) + "; interval: range over seeds"
    record(run, "toy peak", ratio, holds, here, note + unlearnt(learnt))
    erased = both[0]["peak"][-1, :, -1] / both[0]["peak"][-1, :, 1:-1].max(1)
    kept = bool(over[0].max() < LEARNT)
    sites = f"peak of Adam by site {np.round(both[0]['peak'][-1].mean(0), 2).tolist()}; interval: range over seeds"
    record(
        run,
        "toy erased",
        erased,
        bool(erased.max() < 0.5) if kept else None,
        here,
        sites + unlearnt(kept),
    )
    sink, drain = both[1]["ordinary to <s>"][-1].max(1), both[1]["drain"][-1].min(1)
    kept = bool(over[1].max() < LEARNT)
    stays = bool(sink.min() > 0.9 and drain.max() < 0.1) if kept else None
    drained = (
        f"value ratio, the layer with the least: {drain.mean():.3f}; interval: range over seeds"
    )
    record(run, "toy sgd", sink, stays, here, drained + unlearnt(kept))
    late = peaks[0][len(peaks[0]) // 2 :]
    steps = np.diff(late, axis=0).min(0)
    ends = f"from {late[0].mean():.2f} to {late[-1].mean():.2f} over the second half; interval: range over seeds"
    grows = bool(steps.min() > 0) if over[0].max() < LEARNT else None
    record(run, "toy grows", steps, grows, here, ends + unlearnt(grows is not None))


def unlearnt(learnt: bool) -> str:
    """What a note adds where an arm has not learnt to copy, so that its attention says nothing."""
    return "" if learnt else "; not decided: copying was not learnt"


def record(run: Run, name: str, values: np.ndarray, holds: object, here: str, note: str) -> None:
    """A mean over seeds with their range."""
    verdict = None if holds is None else bool(holds)
    interval = (float(values.min()), float(values.max()))
    run.record(
        name,
        here=round(float(values.mean()), 4),
        interval=interval,
        holds=verdict,
        setting=here,
        note=note,
    )


def draw_flow(found: dict[str, Any]) -> Figure:
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=(4.4, 3.2), layout="constrained")
    for index, (alpha, theory) in enumerate(zip(found["alpha"], found["theory"], strict=True)):
        ax.plot(
            found["times"],
            theory,
            color=f"C{index}",
            lw=1,
            label="1/2 log(2 Var t)" if not index else None,
        )
        ax.plot(
            found["times"],
            alpha,
            "o",
            ms=3.5,
            color=f"C{index}",
            label="flow" if not index else None,
        )
    ax.set(xscale="log", xlabel="time", ylabel="sink logit alpha")
    ax.legend(frameon=False)
    return figure
