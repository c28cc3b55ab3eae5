"""Attention, state-space models and recurrent nets in one form (arXiv 2405.15731): exact conversions, and what they predict.

Checked here:

* every mixer from its own code, its transfer matrix and the scan of its system; the three identities that the form gives;
* the softmax's series on random and on SmolLM2's queries and keys: how much state a softmax stands for;
* associative recall with all mixers in one block: state size, normaliser, forget gate.

Two departures from the source's recall: every mixer gets the same block, with a convolution of 4 tokens in front and without a
feed-forward layer or positions (there, attention has positions and no convolution, and one configuration has a feed-forward layer
that the others lack); and the task and the models are smaller. S6 is in the exact part only: its
training takes six times as long. Beyond our scale: LRA, WikiText-103, 512 tokens with 64 pairs.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

from regard.metrics import bootstrap
from regard.ops import feature_count
from regard.papers import Claim, Paper, Run
from regard.papers import _dsf_runs as runs
from regard.papers._dsf_recall import Fit, Recall, tuned_recall

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ORDERS = (1, 2, 3, 4, 5, 6, 7, 8)
LONG_ORDERS = (1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 24, 32, 48, 64, 96, 128)
STATES = (2, 4, 8, 16)
"""n of linear attention and of the exponential normaliser: half as many as pairs to four times as many, as in the source."""
MIDDLE = (4, 8)
"""n of the other normalisers; SSD and softmax attention stand at the second, two numbers for each pair as in the source."""
ETAS = ("normalised, exp", "normalised, softplus", "normalised, sigmoid")
GATES = ("qLSTM", "reversed qLSTM")

PAPER = Paper(
    "dsf",
    claims=[
        Claim(
            "exact",
            "Native code, transfer matrix and scan of a mixer agree: largest difference in float64",
            setting="section 3: softmax, linear and normalised attention, S6, SSD, qLSTM",
            paper="equal",
            expect="all below 1e-10",
            holds=lambda found: max(found.values()) < 1e-10,
        ),
        Claim(
            "telescoping",
            "Separable attention forgets nothing: Phi_ij is q_i . k_j W_O W_V / eta_i; of a selective model it is not",
            setting="the products of A telescope",
            paper="equal; not equal",
            expect="below 1e-10; above 0.001",
            holds=lambda found: found["separable"] < 1e-10 and found["selective"] > 1e-3,
        ),
        Claim(
            "equivalence",
            "SSD is separable attention exactly when its decay is eta_{i-1}/eta_i and its step 1/eta_i: largest difference",
            setting="the source's conditions, solved here for eta with Lambert's W",
            paper="equal",
            expect="below 1e-10 for normalisers that solve them, above 0.01 for others",
            holds=lambda found: found["equivalent"] < 1e-10 and found["learnt"] > 0.01,
        ),
        Claim(
            "gate",
            "The decay of S6 is a reversed sigmoid to the power |a|: largest relative difference",
            setting="e^-softplus(x) = sigmoid(-x)",
            paper="equal",
            expect="below 1e-10",
            holds=lambda far: far < 1e-10,
        ),
        Claim(
            "series",
            "A softmax cut off at order P comes nearer with every order: relative error at orders 1 and 8",
            setting="softmax attention needs infinite state",
            expect="falls from each order to the next, below 0.001 at 8",
        ),
        Claim(
            "heads",
            "Heads of a trained model need orders that no state can hold: share of SmolLM2's heads within 1 % at order 8",
            setting="not in the paper",
            unit=" %",
            expect="below 50 %, and rank correlation of the order that a head needs with its largest score above 0.5",
        ),
        Claim(
            "baseline",
            "Softmax attention learns the recall: accuracy",
            setting="MQAR, width 64 to 512",
            paper="near 100 %",
            unit=" %",
            expect="at least 90 %",
            holds=lambda share: share >= 90,
        ),
        Claim(
            "state",
            "Linear attention comes nearer to softmax as its state grows: points gained from the smallest to the largest",
            setting="MQAR (512, 64), width 512, n from 32 to 256",
            paper="approaches softmax",
            unit=" points",
            expect="lower end above 0, and at most half of the first gap to softmax left",
        ),
        Claim(
            "normalised",
            "Normalised attention recalls more than linear attention of the same state: points, mean over states",
            setting="MQAR (512, 64), n = 128",
            paper="better",
            unit=" points",
            expect="lower end of the interval above 0",
        ),
        Claim(
            "between",
            "It moves linear attention towards a selective model: share of the gap to SSD that it closes",
            setting="MQAR (512, 64), n = 128",
            paper="comes close to SSD",
            unit=" %",
            expect="above 0, where SSD leads linear attention by 5 points or more",
        ),
        Claim(
            "exponential",
            "The exponential is the best normaliser: points above the better of softplus and sigmoid, mean over states",
            setting="MQAR and LRA image",
            paper="exponential best",
            unit=" points",
            expect="lower end of the interval above 0",
        ),
        Claim(
            "reversed",
            "The reversed sigmoid makes the qLSTM recall more: points, mean over tasks",
            setting="MQAR up to (256, 16)",
            paper="better, most on longer tasks",
            unit=" points",
            expect="lower end of the interval above 0",
        ),
        Claim(
            "language",
            "Normalised attention closes a part of the gap between linear and softmax attention on LRA and WikiText-103",
            setting="70M parameters",
            beyond="it needs models of 70M parameters and long training",
        ),
    ],
    needs=("matplotlib", "scipy"),
)


def experiment(run: Run) -> None:
    run.seed(0)
    identities(run)
    series(run)
    if not run.quick:
        heads(run)
    found, gates = recalls(run), gate_recalls(run)
    record_recall(run, found)
    record_gates(run, gates)
    run.figure("recall", draw_recall(found, gates))


def identities(run: Run) -> None:
    run.record(
        "exact",
        here=runs.deviations(tokens=run.pick(quick=8, full=32)),
        setting="width 8, states of 4; of softmax attention eight orders with scores below 0.1, of the qLSTM the recurrence",
    )
    run.record(
        "telescoping",
        here=runs.telescoping(),
        note="the second number is what the decay changes: for SSD as initialised",
    )
    found = runs.equivalence()
    growth = found.pop("growth")
    run.record(
        "equivalence",
        here=found,
        setting="64 tokens, a = -0.5, eta_1 = 1",
        note=f"the solutions grow by {growth:.3f} |a| a token whatever the tokens are: an SSD that equals separable attention"
        " averages, and no normaliser that is learnt from tokens meets the condition (1 + a random number here)",
    )
    run.record(
        "gate", here=runs.reversed_sigmoid(), setting="S6 with 4 states, its own |a| from 1 to 4"
    )


def series(run: Run) -> None:
    errors = runs.random_series(ORDERS, run.pick(quick=4, full=200))
    falls = all(b < a for a, b in pairwise(errors))
    run.record(
        "series",
        here={"order 1": errors[0], "order 8": errors[-1]},
        holds=falls and errors[-1] < 1e-3,
        setting="queries and keys of 8 numbers and unit variance, 64 tokens, median over draws",
        note=f"falls with every order: {'yes' if falls else 'no'}; by order "
        + ", ".join(f"{order}: {error:.2g}" for order, error in zip(ORDERS, errors, strict=True))
        + f"; order 8 stands for {feature_count(8, 8):,} features a head",
    )
    run.figure("series", draw_series(errors))


def heads(run: Run) -> None:
    tokens = 192
    found = run.partial("heads", lambda: runs.pretrained_series(run.model(), tokens, LONG_ORDERS))
    needed = orders_needed(found["errors"])
    at = LONG_ORDERS.index(8)
    share = 100 * sum(row[at] < 0.01 for row in found["errors"]) / len(needed)
    correlation = rank_correlation(needed, found["largest"])
    large = [order for order, size in zip(needed, found["largest"], strict=True) if size > 10]
    never = sum(order > LONG_ORDERS[-1] for order in needed)
    run.record(
        "heads",
        here=round(share, 1),
        holds=share < 50 and correlation > 0.5,
        setting=f"SmolLM2-135M-Instruct (4-bit weights), {tokens} tokens of prose, {len(needed)} heads",
        note=f"rank correlation {correlation:.2f}; median order for 1 %: {middle(needed)}, of the {len(large)} heads with a score"
        f" above 10: {middle(large)}; {never} heads are not within 1 % at order {LONG_ORDERS[-1]}. The series runs"
        " from score 0, so a head whose scores are all far from 0 pays for that too",
    )
    run.figure("heads", draw_heads(found, needed))


def orders_needed(errors: list[list[float]]) -> list[int]:
    """For each head the least order from which on its error stays below 1 %; twice the largest when there is none."""
    found = []
    for row in errors:
        bad = [i for i, error in enumerate(row) if not error < 0.01]
        after = bad[-1] + 1 if bad else 0
        found.append(LONG_ORDERS[after] if after < len(row) else 2 * LONG_ORDERS[-1])
    return found


def rank_correlation(left: list[int], right: list[float]) -> float:
    from scipy.stats import spearmanr

    found: Any = spearmanr(left, right)
    return float(found[0])


def middle(values: list[int]) -> str:
    return f"{sorted(values)[len(values) // 2]}" if values else "none"


Found = dict[str, dict[Any, dict[str, Any]]]
"""What `recall` found, by mixer and by state size or task."""


TASK, SMALL = Recall(64, 16, 4), Recall(16, 12, 2)
GATE_TASKS = (Recall(16, 12, 3), Recall(16, 24, 3))
"""Smaller, as the state of a quasi-LSTM is a vector: the same pairs, asked sooner and later."""
TRAINING = Fit(width=32, layers=2, steps=250, batch=32)
GATE_TRAINING = Fit(width=32, layers=2, steps=300, batch=32)
QUICK = Fit(width=8, layers=2, steps=2, batch=4, tested=20)


def trained(
    run: Run, mixer: str, n: int, task: Recall, fit: Fit, rates: list[float]
) -> dict[str, Any]:
    seeds = run.pick(quick=[1], full=[1, 2, 3, 4])
    for seed in seeds:
        run.seed(seed)
    return run.partial(
        f"{mixer}/{n}/{task}", lambda: tuned_recall(mixer, n, task, fit, seeds, rates)
    )


def recalls(run: Run) -> Found:
    states, middle = run.pick(quick=((4,), (4,)), full=(STATES, MIDDLE))
    cases = [(name, n) for name in ("linear", ETAS[0]) for n in states]
    cases += [(name, n) for name in ETAS[1:] for n in middle]
    cases += [(name, middle[-1]) for name in ("SSD", "softmax")]
    task, fit = run.pick(quick=(SMALL, QUICK), full=(TASK, TRAINING))
    rates = run.pick(quick=[3e-2], full=[2e-2, 4e-2])
    found: Found = {}
    for name, n in run.progress(cases, "recall"):
        found.setdefault(name, {})[n] = trained(run, name, n, task, fit, rates)
    return found


def gate_recalls(run: Run) -> Found:
    tasks, fit = run.pick(quick=((SMALL,), QUICK), full=(GATE_TASKS, GATE_TRAINING))
    found: Found = {}
    for name, task in run.progress([(m, t) for m in GATES for t in tasks], "forget gates"):
        found.setdefault(name, {})[str(task)] = trained(run, name, 0, task, fit, [2e-2])
    return found


def accuracies(found: Found, name: str) -> dict[Any, list[float]]:
    """By state size or task, the accuracy of every seed."""
    return {at: one["right"] for at, one in found[name].items()}


def where(fit: Fit, seeds: int) -> str:
    return f"{fit.layers} layers of width {fit.width}, one head, {fit.steps} steps of {fit.batch} samples, {seeds} seed(s)"


def record_recall(run: Run, found: Found) -> None:
    shares = {name: accuracies(found, name) for name in found}
    (softmax,) = shares["softmax"].values()
    task, fit = run.pick(quick=(SMALL, QUICK), full=(TASK, TRAINING))
    setting = f"MQAR {task}, vocabulary {task.vocabulary}, {where(fit, len(softmax))}; the better of two rates by another seed"
    run.record(
        "baseline",
        here=round(mean(softmax), 1),
        interval=(round(min(softmax), 1), round(max(softmax), 1)),
        setting=setting,
        note="the interval is the lowest and the highest seed",
    )
    linear, least, most = shares["linear"], min(shares["linear"]), max(shares["linear"])
    gain = differences(linear[most], linear[least])
    first, last = (mean(softmax) - mean(linear[n]) for n in (least, most))
    run.record(
        "state",
        here=round(mean(gain), 1),
        interval=interval(gain),
        holds=verdict(gain, also=last <= first / 2),
        setting=setting,
        note=f"gap to softmax {first:.1f} points with n = {least}, {last:.1f} with n = {most}; {by_state(linear)}; {OVER_SEEDS}",
    )
    exp = shares[ETAS[0]]
    gain = [d for n in linear for d in differences(exp[n], linear[n])]
    run.record(
        "normalised",
        here=round(mean(gain), 1),
        interval=interval(gain),
        holds=verdict(gain),
        setting=setting,
        note=f"normalised {by_state(exp)}; linear {by_state(linear)}; {OVER_BOTH}",
    )
    ssd = shares["SSD"]
    led = {n: mean(ssd[n]) - mean(linear[n]) for n in ssd}
    apart = [n for n in led if led[n] >= 5]
    closed = [100 * (mean(exp[n]) - mean(linear[n])) / led[n] for n in apart]
    lack = "; nowhere 5 points or more above linear attention, so there is no gap to close"
    run.record(
        "between",
        here=round(mean(closed), 1) if closed else None,
        holds=mean(closed) > 0 if closed else None,
        setting=setting,
        note=f"SSD {by_state(ssd)}{'' if closed else lack}",
    )
    others = {
        name: [d for n, one in shares[name].items() for d in differences(exp[n], one)]
        for name in ETAS[1:]
    }
    nearest = min(others, key=lambda name: mean(others[name]))
    run.record(
        "exponential",
        here=round(mean(others[nearest]), 1),
        interval=interval(others[nearest]),
        holds=verdict(others[nearest]),
        setting=setting,
        note="; ".join([*(f"{name}: {by_state(shares[name])}" for name in ETAS), OVER_BOTH]),
    )


def record_gates(run: Run, found: Found) -> None:
    plain, reverse = (accuracies(found, name) for name in GATES)
    gains = {task: differences(reverse[task], plain[task]) for task in plain}
    gain = [d for one in gains.values() for d in one]
    by_task = ", ".join(
        f"{task}: reversed {mean(reverse[task]):.1f} %, standard {mean(plain[task]):.1f} %"
        for task in plain
    )
    run.record(
        "reversed",
        here=round(mean(gain), 1),
        interval=interval(gain),
        holds=verdict(gain),
        setting=f"MQAR {' and '.join(plain)}, vocabulary {GATE_TASKS[0].vocabulary}, "
        + where(run.pick(quick=QUICK, full=GATE_TRAINING), len(gain) // len(plain)),
        note=f"{by_task}; a guess among the values of the sample is right in {100 / GATE_TASKS[0].pairs:.0f} %; at the start the"
        " two are the same functions, the gate's weights negated: only the exponent alpha is new;"
        f" {OVER_BOTH.replace('states', 'tasks')}",
    )


OVER_SEEDS = "interval: 95 % bootstrap over seeds"
OVER_BOTH = "interval: 95 % bootstrap over seeds and states"


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def differences(one: list[float], other: list[float]) -> list[float]:
    """Seed by seed."""
    return [a - b for a, b in zip(one, other, strict=True)]


def interval(values: list[float]) -> tuple[float, float] | None:
    """95 % by bootstrap; None for a single run."""
    found = bootstrap(values)
    return None if found.n < 2 else (round(found.low, 2), round(found.high, 2))


def verdict(gain: list[float], *, also: bool = True) -> bool | None:
    """Whether a gain is above 0; None while its interval has 0 inside, or for a single run."""
    found = interval(gain)
    if found is None or (found[0] <= 0 <= found[1] and also):
        return None
    return found[0] > 0 and also


def by_state(shares: dict[int, list[float]]) -> str:
    return "by n " + ", ".join(f"{n}: {mean(values):.1f} %" for n, values in shares.items())


def draw_series(errors: list[float]) -> Figure:
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=(4, 3), layout="constrained")
    ax.plot(ORDERS, errors, "o-", ms=4)
    ax.set(yscale="log", xlabel="order P", ylabel="relative error", title="random queries and keys")
    ax.set_xticks(ORDERS)
    return figure


def draw_heads(found: dict[str, Any], needed: list[int]) -> Figure:
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(8.5, 3.3), layout="constrained")
    for row in found["errors"]:
        left.plot(LONG_ORDERS, row, color="tab:blue", lw=0.5, alpha=0.25)
    left.axhline(0.01, color="0.4", lw=0.8, ls="--")
    left.set(xscale="log", yscale="log", xlabel="order P", ylabel="relative error")
    left.set_ylim(1e-4, 1e2)
    largest = LONG_ORDERS[-1]
    for hidden, colour, label in (
        (False, "tab:blue", "1 % at order P"),
        (True, "tab:red", f"not at {largest}"),
    ):
        pairs = zip(found["largest"], needed, strict=True)
        points = [(x, y) for x, y in pairs if (y > largest) is hidden]
        if points:
            right.scatter(*zip(*points, strict=True), s=10, color=colour, label=label)
    right.set(xscale="log", yscale="log")
    right.set(xlabel="largest |score| of the head", ylabel="order for 1 % error")
    right.legend(fontsize=8)
    figure.suptitle("heads of SmolLM2")
    return figure


COLOURS = {
    "linear": "tab:orange",
    ETAS[0]: "tab:blue",
    ETAS[1]: "tab:cyan",
    ETAS[2]: "tab:purple",
    "SSD": "tab:green",
    "softmax": "black",
    GATES[0]: "0.6",
    GATES[1]: "tab:red",
}


def draw_recall(found: Found, gates: Found) -> Figure:
    import matplotlib.pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
    for name in found:
        shares, colour = accuracies(found, name), COLOURS[name]
        if name == "softmax":
            (values,) = shares.values()
            left.axhline(mean(values), color=colour, ls="--", lw=1.2, label=name)
            continue
        means = [mean(values) for values in shares.values()]
        left.plot(list(shares), means, marker="_", color=colour, label=name)
        for n, values in shares.items():
            left.plot([n] * len(values), values, ".", color=colour, ms=5)
    sizes = list(found["linear"])
    left.set(xscale="log", xlabel="n, numbers of a query and key", ylabel="accuracy of recall, %")
    left.set_xticks(sizes, [str(n) for n in sizes])
    left.minorticks_off()
    left.set_ylim(-2, 102)
    left.legend(fontsize=7)
    size = max(found["SSD"])
    for name in found:
        curves = found[name][size]["loss"]
        curve = [mean(list(part)) for part in zip(*curves, strict=True)]
        share = [100 * (i + 0.5) / len(curve) for i in range(len(curve))]
        middle.plot(share, curve, color=COLOURS[name], label=name)
    middle.set(xlabel="share of the training, %", ylabel="loss, nats a value")
    middle.set_title(f"n = {size}", fontsize=9)
    for shift, name in ((-0.1, GATES[0]), (0.1, GATES[1])):
        for place, values in enumerate(accuracies(gates, name).values()):
            label = name if place == 0 else None
            right.bar(place + 2 * shift, mean(values), 0.36, color=COLOURS[name], label=label)
            right.plot([place + 2 * shift] * len(values), values, "k.", ms=4)
    named = list(gates[GATES[0]])
    right.set_xticks(range(len(named)), named)
    right.set(xlabel="MQAR (tokens, pairs)", ylabel="accuracy of recall, %", ylim=(0, 102))
    right.legend(fontsize=8)
    return figure
