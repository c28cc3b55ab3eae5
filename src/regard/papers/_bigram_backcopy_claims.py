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
        "Theory: with the value of <s> held, the sink logit grows as 1/2 log t: slope of alpha against log t",
        setting="gradient flow of the simplified model",
        paper="0.5",
        expect="within [0.49, 0.55] for every seed",
    ),
    Claim(
        "exponential",
        "Theory: with the sink logit held, the value of <s> drains exponentially: fitted rate over predicted rate, worst",
        setting="gradient flow of the simplified model",
        paper="exponential, no rate",
        expect="within 5 % of the linearised rate for every alpha, and the limit shrinking as e^-alpha",
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
    for name, one in found.items():
        file = name.lower().replace(",", "").replace(" ", "-")
        run.figure(f"film-{file}", film(course(one)), format="png")


def course(found: dict[str, Any]) -> Course:
    """The course of an arm from its plain form."""
    measures = {name: np.array(values) for name, values in found["measures"].items()}
    return Course(np.array(found["steps"]), measures, np.array(found["maps"]))


def record_theory(run: Run) -> None:
    seeds, horizon = run.pick(quick=(1, 400.0), full=(3, 20_000.0))
    flow = run.partial("flow", lambda: runs.sink_slopes(seeds, horizon))
    slopes = flow["slopes"]
    run.record(
        "log",
        here=float(np.mean(slopes)),
        interval=(min(slopes), max(slopes)),
        holds=min(slopes) >= 0.49 and max(slopes) <= 0.55,
        setting=f"16 symbols, W = 5, {seeds} random p and xi, t from {horizon / 20:,.0f} to {horizon:,.0f}, Euler step 0.05",
        note="interval: range over seeds",
    )
    rows = runs.drain_decay((0.0, 2.0)) if run.quick else runs.drain_decay()
    ratios = [row["rate"] / row["predicted"] for row in rows]
    worst = max(ratios, key=lambda ratio: abs(ratio - 1))
    scaled = [row["size"] * np.exp(row["alpha"]) for row in rows]
    run.record(
        "exponential",
        here=worst,
        holds=abs(worst - 1) < 0.05 and max(scaled) < 1.001 * min(scaled),
        setting="8 symbols, W = 5, alpha = " + ", ".join(f"{row['alpha']:g}" for row in rows),
        note="; ".join(
            f"alpha {row['alpha']:g}: rate {row['rate']:.2e}, predicted {row['predicted']:.2e}, limit {row['size']:.3f} from c 1"
            for row in rows
        ),
    )
    run.figure("flow", draw_flow(flow))


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
    late[-4:] = True
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
    note = f"value ratio {drain.mean():.2f}; excess at triggers {over.mean():.3f} nats; interval: range over seeds"
    note += "" if holds is not None else "; not decided: copying was not learnt"
    here = f"width {scale.width}, {scale.steps} steps, Adam, {len(scale.seeds)} seeds"
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
    record(
        run,
        "toy peak",
        ratio,
        holds,
        here,
        note + ("" if learnt else "; not decided: an arm has not learnt to copy"),
    )
    late = peaks[0][len(peaks[0]) // 2 :]
    steps = np.diff(late, axis=0).min(0)
    ends = f"from {late[0].mean():.2f} to {late[-1].mean():.2f} over the second half; interval: range over seeds"
    record(run, "toy grows", steps, bool(steps.min() > 0), here, ends)


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


def draw_flow(flow: dict[str, Any]) -> Figure:
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=(4.4, 3.2), layout="constrained")
    for index, (alpha, theory) in enumerate(zip(flow["alpha"], flow["theory"], strict=True)):
        ax.plot(
            flow["times"],
            theory,
            color=f"C{index}",
            lw=1,
            label="1/2 log(2 Var t)" if not index else None,
        )
        ax.plot(
            flow["times"],
            alpha,
            "o",
            ms=3.5,
            color=f"C{index}",
            label="flow" if not index else None,
        )
    ax.set(xscale="log", xlabel="time", ylabel="sink logit alpha")
    ax.legend(frameon=False)
    return figure
