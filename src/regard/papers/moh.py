"""Mixture of heads (arXiv 2410.11842): each token switches on a few heads; trained from scratch, and in a pretrained model.

Checked here:

* that even gates over all heads are multi-head attention;
* a character model with 75 % and 50 % of its heads on, against the dense one, random heads, and fewer heads;
* how evenly the routed heads are used, with and without the load-balance loss;
* SmolLM2 with routed heads chosen by query norm, at random, once for all tokens, and the wrong way round; then tuned with LoRA;
* whether the choice of heads depends on the kind of text.

Heads that are off are computed all the same, so nothing is said about speed. Beyond our scale: ImageNet and 8B models.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch

from regard import texts
from regard.labs.tasks import characters
from regard.metrics import paired
from regard.nn import MixtureOfHeads, SoftmaxAttention
from regard.papers import Claim, Paper, Run
from regard.papers import _moh_runs as runs
from regard.weights import QueryNormHeads, RoutedHeads, spread_heads

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHARED = spread_heads(9, 3, 5)
"""Of SmolLM2's 9 heads: 5 always on, 2 of the other 4 on at each token (78 %)."""

TOKENS, STEPS = 64, 250

PAPER = Paper(
    "moh",
    claims=[
        Claim(
            "exact",
            "Even gates over all heads are multi-head attention: largest difference",
            setting="not in the paper: a check of the implementation",
            expect="below 1e-12, in float64",
            holds=lambda gap: gap < 1e-12,
        ),
        Claim(
            "three-quarters",
            "75 % of the heads are as good as all: loss above the dense model's",
            setting="ViT and language models trained from scratch",
            paper="84.9 % against 84.8 % of ImageNet",
            unit=" %",
            expect="at most 1 % in the mean over seeds",
            holds=lambda more: more <= 1,
        ),
        Claim(
            "half",
            "50 % of the heads are nearly as good as all: loss above the dense model's",
            setting="ViT trained from scratch",
            paper="84.7 % against 84.8 % of ImageNet",
            unit=" %",
            expect="at most 1 % in the mean over seeds",
            holds=lambda more: more <= 1,
        ),
        Claim(
            "routed",
            "Learnt routing is better than random heads, 75 % on in both: loss below that of random heads",
            setting="not in the paper: what would refute that routing matters",
            unit=" %",
            expect="above 0 in every seed",
        ),
        Claim(
            "static",
            "75 % of twelve heads, chosen by token, are better than nine heads: loss below that of nine heads",
            setting="not in the paper: pruning before training",
            unit=" %",
            expect="above 0 in every seed",
        ),
        Claim(
            "balanced",
            "The load-balance loss keeps all routed heads in use: entropy of use over its largest value",
            setting="the paper shows usage by class and topic",
            expect="at least 0.9 with the loss, and higher than without in every seed",
        ),
        Claim(
            "query-norm",
            "In a pretrained model, heads chosen by query norm hurt less at once than heads chosen at random: nats less",
            setting="the paper always tunes afterwards",
            unit=" nats a token",
            expect="above 0, with the interval",
        ),
        Claim(
            "once",
            "They hurt less than removing the same number of heads for all tokens: nats less",
            setting="not in the paper: static pruning",
            unit=" nats a token",
            expect="above 0, with the interval",
        ),
        Claim(
            "tuned",
            "Tuning recovers the loss: share of the damage that is gone",
            setting="LLaMA3-8B, 75 % of the heads, 10B tokens of full training",
            paper="over 95 %",
            unit=" %",
            expect="above 50 %, against a dense model tuned alike",
        ),
        Claim(
            "domains",
            "Which heads are on depends on the kind of text: mutual information in bits, above the highest of its permutations",
            setting="the paper shows usage by class and topic",
            expect="above all permutations of the kinds over windows",
        ),
        Claim(
            "large",
            "DiT-XL/2 with 90 % of its heads is better, ViT-B reaches 84.9 %, MoH-LLaMA3-8B 64.0 against 61.6 over 14 benchmarks",
            setting="ImageNet, LLaMA3-8B",
            paper="64.0 against 61.6",
            beyond="ImageNet and models of 8B parameters are out of reach of this machine",
        ),
    ],
    needs=("matplotlib", "peft"),
)


def experiment(run: Run) -> None:
    run.record("exact", here=evenly(run), note="12 heads, 0, 1, 5 and 12 of them shared, all on")
    found = in_characters(run)
    record_characters(run, found)
    hurt = converted(run)
    curves = {} if run.quick else tuned(run)
    domains(run)
    run.figure("characters", draw_characters(found))
    run.figure("smollm2", draw_smollm2(hurt, curves))


def evenly(run: Run) -> float:
    """The largest difference of a mixture with even gates over all heads from attention with its weights."""
    run.seed(0)
    worst, hidden = 0.0, torch.randn(2, 20, 96).double()
    for shared in (0, 1, 5, 12):
        mixture = MixtureOfHeads(96, 12, shared=shared, active=12 - shared).double()
        plain = SoftmaxAttention(96, 12).double()
        plain.load_state_dict({k: v for k, v in mixture.state_dict().items() if "router" not in k})
        for name, parameter in mixture.named_parameters():
            if "router" in name:
                torch.nn.init.zeros_(parameter)
        worst = max(worst, float((mixture(hidden) - plain(hidden)).detach().abs().max()))
    return worst


def in_characters(run: Run) -> dict[str, list[dict[str, Any]]]:
    """Every arm for every seed."""
    task = characters(run.pick(quick=16, full=TOKENS))
    size = runs.Size(steps=run.pick(quick=2, full=STEPS))
    seeds, held = range(run.pick(quick=1, full=2)), run.pick(quick=8, full=256)
    names = [n for n in runs.ARMS if not run.quick or n not in ("all heads weighted", "6 heads")]
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for name, seed in run.progress([(n, s) for n in names for s in seeds], "characters"):
        run.seed(seed)
        found[name].append(
            run.partial(f"{name}/{seed}", lambda n=name, s=seed: runs.fit(task, size, n, s, held))
        )
    return found


def above(found: dict[str, list[dict[str, Any]]], one: str, other: str) -> list[float]:
    """How much the loss of `one` is above that of `other`, in percent, for each seed."""
    pairs = zip(found[one], found[other], strict=True)
    return [100 * (a["nats"] / b["nats"] - 1) for a, b in pairs]


def ends(values: Sequence[float], digits: int) -> tuple[float, float]:
    return round(min(values), digits), round(max(values), digits)


def record_characters(run: Run, found: dict[str, list[dict[str, Any]]]) -> None:
    count = len(found["dense"])
    here = (
        f"character models of 2 layers, 12 heads of 4, {TOKENS} characters, {STEPS} steps; 3 heads shared and 6 of 9 on (75 %),"
        f" 2 shared and 4 of 10 on (50 %); {count} seeds"
    )
    losses = "nats a character: " + ", ".join(
        f"{name} " + "/".join(f"{one['nats']:.3f}" for one in arm) for name, arm in found.items()
    )
    note = f"interval: lowest and highest over seeds; {losses}"
    for claim, name in (("three-quarters", "MoH 75 %"), ("half", "MoH 50 %")):
        values = above(found, name, "dense")
        run.record(
            claim, here=round(fmean(values), 2), interval=ends(values, 2), setting=here, note=note
        )
    for claim, other in (("routed", "random 75 %"), ("static", "9 heads")):
        values = above(found, other, "MoH 75 %")
        run.record(
            claim,
            here=round(fmean(values), 2),
            interval=ends(values, 2),
            holds=min(values) > 0,
            setting=here,
            note=note,
        )
    even = {
        name: [runs.evenness(one["usage"]) for one in found[arm]]
        for name, arm in (("with the loss", "MoH 75 %"), ("without", "MoH 75 %, no balance"))
    }
    pairs = zip(*even.values(), strict=True)
    run.record(
        "balanced",
        here={name: round(fmean(values), 3) for name, values in even.items()},
        holds=min(even["with the loss"]) >= 0.9 and all(a > b for a, b in pairs),
        setting=here,
        note="by seed: "
        + "; ".join(f"{k} " + "/".join(f"{v:.3f}" for v in values) for k, values in even.items()),
    )


def methods() -> dict[str, RoutedHeads | None]:
    """Ways to choose 2 of 4 routed heads of SmolLM2."""
    return {
        "dense": None,
        "query norm": QueryNormHeads(SHARED, 2),
        "random": runs.DrawnHeads(SHARED, 2),
        "the same for all tokens": runs.StaticHeads(SHARED, 2),
        "shortest queries": runs.ShortestHeads(SHARED, 2),
        "query norm, first 5 shared": QueryNormHeads(5, 2),
    }


def converted(run: Run) -> dict[str, list[float]]:
    """Nats a token of each window of prose, at once, without training."""
    model, length = run.model(), run.pick(quick=12, full=128)
    rows = run.pick(quick=2, full=6)
    windows = runs.tokens_of(model.tokenizer, texts.prose(8 * rows * length), rows, length)
    names = list(methods())[: run.pick(quick=4, full=None)]
    found = {
        name: run.partial(
            f"at once/{name}", lambda n=name: runs.losses(model, windows, methods()[n])
        )
        for name in run.progress(names, "SmolLM2")
    }
    here = (
        "SmolLM2-135M-Instruct (4-bit weights), 5 of 9 heads shared, spread over the 3 groups, 2 of 4 on (78 %);"
        f" {rows} windows of {length} tokens of prose"
    )
    note = "95 % bootstrap interval over windows; nats a token: " + ", ".join(
        f"{name} {fmean(values):.3f}" for name, values in found.items()
    )
    for claim, other in (("query-norm", "random"), ("once", "the same for all tokens")):
        less = paired(found[other], found["query norm"])
        run.record(
            claim,
            here=round(less.mean, 3),
            interval=(round(less.low, 3), round(less.high, 3)),
            holds=less.low > 0,
            setting=here,
            note=note,
        )
    return found


def tuned(run: Run) -> dict[str, dict[str, list[float]]]:
    """Held-out nats while LoRA tunes the mixture, and the dense model alike."""
    model, length = run.model(), 96
    steps, held = 12, 6
    text = texts.default_text(model.tokenizer, 2 * length * (steps + held))
    ids = runs.tokens_of(model.tokenizer, text, steps + held, length)
    measure = sorted({0, steps // 4, steps // 2, steps})
    curves = {
        name: run.partial(
            f"tuned/{name}",
            lambda n=name: runs.tune(
                model,
                ids[held:],
                ids[:held],
                methods()[n],
                measure,
                lambda count: run.progress(count, n),
            ),
        )
        for name in ("dense", "query norm")
    }
    mean = {name: {s: fmean(v) for s, v in curve.items()} for name, curve in curves.items()}
    before = mean["query norm"]["0"] - mean["dense"]["0"]
    after = mean["query norm"][str(steps)] - mean["dense"][str(steps)]
    share = 100 * (1 - after / before)
    run.record(
        "tuned",
        here=round(share, 1),
        holds=share > 50,
        setting=f"SmolLM2, LoRA of rank 8 on the attention projections, {steps} steps of {length} tokens, 78 % of the heads",
        note="held-out nats by step: "
        + "; ".join(
            f"{name} " + ", ".join(f"{step}: {value:.3f}" for step, value in curve.items())
            for name, curve in mean.items()
        )
        + f". {steps * length} tokens of tuning, the paper 10B",
    )
    return curves


def domains(run: Run) -> None:
    rows, length = run.pick(quick=2, full=5), run.pick(quick=16, full=64)
    found = run.partial(
        "domains",
        lambda: runs.choices_by_domain(run.model(), rows, length, QueryNormHeads(SHARED, 2)),
    )
    labels = [kind for kind, windows in enumerate(found.values()) for _ in windows]
    here, shuffled, source = runs.information(found, labels), [], random.Random(0)
    for _ in range(run.pick(quick=20, full=500)):
        shuffled.append(runs.information(found, source.sample(labels, len(labels))))
    run.record(
        "domains",
        here=round(here, 4),
        holds=here > max(shuffled),
        setting=f"SmolLM2, query norm, {rows} windows of {length} tokens of prose, code and a table each",
        note=f"{len(shuffled)} permutations: mean {fmean(shuffled):.4f}, highest {max(shuffled):.4f}",
    )


def draw_characters(found: dict[str, list[dict[str, Any]]]) -> Figure:
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=(6.4, 2.9), layout="constrained")
    for index, arm in enumerate(found.values()):
        values = [one["nats"] for one in arm]
        ax.plot(values, [index] * len(values), ".", color="0.6", markersize=7)
        ax.plot(fmean(values), index, "|", color="tab:blue", markersize=14, markeredgewidth=2)
    ax.set_yticks(range(len(found)), list(found))
    ax.invert_yaxis()
    ax.set(
        xlabel="nats a character, held out", title="12 heads, trained from scratch (dots: seeds)"
    )
    return figure


def draw_smollm2(hurt: dict[str, list[float]], curves: dict[str, dict[str, list[float]]]) -> Figure:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 2.9), layout="constrained")
    names = [name for name in hurt if name != "dense"]
    dense = fmean(hurt["dense"])
    axes[0].barh(names, [fmean(hurt[name]) - dense for name in names], color="tab:blue")
    axes[0].invert_yaxis()
    axes[0].set(xlabel="nats a token above the dense model", title="7 of 9 heads on, untrained")
    for name, curve in curves.items():
        axes[1].plot([int(s) for s in curve], [fmean(v) for v in curve.values()], ".-", label=name)
    axes[1].set(xlabel="LoRA steps", ylabel="nats a token, held out", title="tuned")
    if curves:
        axes[1].legend()
    return figure
