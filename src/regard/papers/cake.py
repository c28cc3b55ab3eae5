"""CAKE on SmolLM2: what its layer budgets and its indicator are worth, beside SnapKV, PyramidKV, H2O and StreamingLLM.

Every method compresses the same prefill of each text to the same number of tokens per KV head (in the mean over layers), so all
comparisons are paired. Two outcomes: recall of a needle whose question stands at the end of the prompt,
inside the observation window; and the loss on the text that really follows a prompt.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from regard.metrics.bootstrap import Estimate, paired
from regard.ops import attention_dispersion
from regard.papers import Claim, Paper, Run
from regard.papers._cake_runs import (
    BASELINES,
    METHODS,
    identities,
    layer_slots,
    needle,
    next_tokens,
)
from regard.texts import code, default_text, needle_prompts

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HERE = "SmolLM2-135M-Instruct (30 layers, 3 KV heads, de-quantised Q4_1)"
THEIRS = "Llama, Mistral and Qwen models of 7 to 13B, LongBench and NeedleBench"
SMALL = (64, 128)

PAPER = Paper(
    "cake",
    claims=[
        Claim(
            "exact",
            "Identities: a cascade keeps what one selection at the end keeps; slots add up to the budget; a cache that holds "
            "everything changes nothing; dispersion of uniform attention is heads x queries x log(keys)",
            setting="stated in the paper (theorem on cascading)",
            expect="no head differs, no slot is missing, both numerical differences below 1e-4",
        ),
        Claim(
            "profile",
            "Layers prefer very different sizes: most slots of a layer over fewest, 128 tokens per KV head",
            setting="paper: figures of layer preferences",
            unit=" x",
            expect="at least 5",
            holds=lambda ratio: ratio >= 5,
        ),
        Claim(
            "needle",
            "CAKE recalls more needles than SnapKV, PyramidKV, H2O and StreamingLLM at small budgets: points of recall above "
            "each, mean of 64 and 128 tokens per KV head",
            setting=THEIRS,
            paper="best in NeedleBench and LongBench, most at 128 per layer",
            unit=" points",
            expect="above 0 for all four, and no 95 % interval below 0",
        ),
        Claim(
            "loss",
            "CAKE predicts the following text better than the four at small budgets: nats per token below each, "
            "mean of 64 and 128",
            setting=f"not in the paper; {THEIRS}",
            unit=" nats",
            expect="above 0 for all four, and no 95 % interval below 0",
        ),
        Claim(
            "streaming",
            "Methods that look at attention recall needles that StreamingLLM has dropped: points of recall above it",
            setting=THEIRS,
            paper="large gap (figures)",
            unit=" points",
            expect="every 95 % interval above 0",
        ),
        Claim(
            "layers",
            "Sharing by layer preference helps: points of recall above the same indicator with equal layers, mean of 64 and 128",
            setting="paper: ablation",
            unit=" points",
            expect="95 % interval above 0",
        ),
        Claim(
            "indicator",
            "Rewarding fluctuation helps: points of recall of CAKE's indicator above SnapKV's, equal layers, mean of 64 and 128",
            setting="paper: ablation",
            unit=" points",
            expect="95 % interval above 0",
        ),
        Claim(
            "compose",
            "CAKE's layer budgets help SnapKV's score, too: points of recall above SnapKV, mean of 64 and 128",
            setting="paper: combined with other indicators",
            unit=" points",
            expect="95 % interval above 0",
        ),
        Claim(
            "large",
            "At 512 tokens per KV head CAKE and SnapKV are alike: points of recall, and nats per token",
            setting="not in the paper",
            expect="both differences below 5 points and 0.02 nats",
        ),
        Claim(
            "longbench",
            "Full-cache quality with 3.2 % of the cache at 32k tokens, over ten times faster decoding at 128k",
            setting=THEIRS,
            paper="LongBench; A100, FlashAttention-2",
            beyond="needs models that use such contexts and a GPU; decoding speed on this machine is in the benchmarks",
        ),
    ],
    needs=("matplotlib",),
)


def experiment(run: Run) -> None:
    model = run.model()
    run.seed(0)
    sizes = run.pick(quick=(64,), full=(64, 128, 256, 512))
    context = run.pick(quick=150, full=1536)
    after = run.pick(quick=9, full=129)
    texts = documents(model.tokenizer, context + after, *run.pick(quick=(1, 0), full=(8, 4)))
    prompts = needle_prompts(
        model.tokenizer,
        lengths=run.pick(quick=(150,), full=(600, 1000)),
        depths=run.pick(quick=(0.5,), full=(0.25, 0.6)),
        needles=run.pick(quick=1, full=4),
    )
    most = run.pick(quick=2, full=32)
    first = texts[0][: run.pick(quick=100, full=1024)]
    exact(run, model, first)
    profile(run, model, first)
    losses = [
        run.partial(f"loss/{i}", lambda t=text: next_tokens(model, t, context, sizes))
        for i, text in enumerate(run.progress(texts, "reading on"))
    ]
    found = [
        run.partial(f"needle/{i}", lambda p=prompt: needle(model, p, sizes, most))
        for i, prompt in enumerate(run.progress(prompts, "looking for needles"))
    ]
    settings = {
        "needle": f"{HERE}; {len(prompts)} prompts of {len(prompts[0].ids)} to {len(prompts[-1].ids)} tokens, the question in "
        "the window of 32; 4 first tokens kept by all methods",
        "loss": f"{HERE}; {len(texts)} texts of {context} tokens and the {after - 1} that follow; "
        "4 first tokens kept by all methods",
    }
    compare(run, losses, found, sizes, settings)
    run.figure("methods", draw(losses, found, sizes))


def documents(tokenizer: Any, length: int, prose: int, programs: int) -> list[Tensor]:
    """Disjoint pieces of explained English and of Python code, `length` tokens each."""
    ids = tokenizer(default_text(tokenizer, length * prose), return_tensors="pt", verbose=False)
    found = list(ids.input_ids[0].split(length))[:prose]
    if programs:
        ids = tokenizer(code(6 * length * programs), return_tensors="pt", verbose=False)
        found += list(ids.input_ids[0].split(length))[:programs]
    return found


def exact(run: Run, model: Any, ids: Tensor) -> None:
    uniform = torch.full((1, 3, 8, 50), 1 / 50, dtype=torch.float64)
    closed = abs(float(attention_dispersion(uniform)) - 3 * 8 * math.log(50))
    here = run.partial("identities", lambda: identities(model, ids, 64))
    here = {**here, "dispersion against its closed form": closed}
    whole = list(here.values())
    run.record(
        "exact",
        here={name: float(f"{value:.3g}") for name, value in here.items()},
        holds=whole[0] == whole[1] == 0 and max(whole[2:]) < 1e-4,
        setting=f"{HERE}, {len(ids)} tokens, 64 per KV head",
        note="the released code cuts fractions off and repairs the sum, so that its cascade may differ by a few slots",
    )


def profile(run: Run, model: Any, ids: Tensor) -> None:
    slots = run.partial("profile", lambda: layer_slots(model, ids, 128))
    order = sorted(range(len(slots)), key=slots.__getitem__)
    run.record(
        "profile",
        here=round(max(slots) / max(1.0, min(slots)), 1),
        setting=f"{HERE}, {len(ids)} tokens, slots beside 4 sinks and a window of 32",
        note=f"from {min(slots):.0f} to {max(slots):.0f} slots; most in layers {', '.join(map(str, order[:-5:-1]))}, "
        f"fewest in layers {', '.join(map(str, order[:4]))}",
    )
    run.figure("layers", draw_layers(slots))


def compare(
    run: Run,
    losses: Sequence[Mapping[str, Any]],
    found: Sequence[Mapping[str, Any]],
    sizes: Sequence[int],
    settings: Mapping[str, str],
) -> None:
    small = [size for size in SMALL if size in sizes]

    def recall(name: str, at: Sequence[int] = small) -> list[float]:
        return [100 * sum(row[name][str(size)][0] for size in at) / len(at) for row in found]

    def loss(name: str, at: Sequence[int] = small) -> list[float]:
        return [sum(row[name][str(size)] for size in at) / len(at) for row in losses]

    points = {name: paired(recall("CAKE"), recall(name)) for name in BASELINES}
    nats = {name: paired(loss(name), loss("CAKE")) for name in BASELINES}
    for claim, gains, digits in (("needle", points, 1), ("loss", nats, 4)):
        better = all(gain.mean > 0 for gain in gains.values())
        worse = [name for name, gain in gains.items() if gain.high < 0]
        run.record(
            claim,
            here={name: round(gain.mean, digits) for name, gain in gains.items()},
            holds=better and not worse,
            setting=settings[claim],
            note="paired 95 % intervals: " + "; ".join(f"{n} {span(g)}" for n, g in gains.items()),
        )
    gaps = {n: paired(recall(n), recall("StreamingLLM")) for n in METHODS if n != "StreamingLLM"}
    run.record(
        "streaming",
        here={name: round(gap.mean, 1) for name, gap in gaps.items()},
        holds=all(gap.low > 0 for gap in gaps.values()),
        setting=settings["needle"],
        note="paired 95 % intervals: " + "; ".join(f"{n} {span(g)}" for n, g in gaps.items()),
    )
    pairs = {
        "layers": ("CAKE", "CAKE, equal layers"),
        "indicator": ("CAKE, equal layers", "SnapKV"),
        "compose": ("SnapKV, CAKE's layers", "SnapKV"),
    }
    for claim, (one, other) in pairs.items():
        gain = paired(recall(one), recall(other))
        logprob = paired(answer_logprob(found, one, small), answer_logprob(found, other, small))
        drop = paired(loss(other), loss(one))
        run.record(
            claim,
            here=round(gain.mean, 1),
            interval=None if math.isnan(gain.low) else (round(gain.low, 1), round(gain.high, 1)),
            holds=bool(gain.low > 0),
            setting=settings["needle"],
            note=f"log-probability per answer token {logprob.mean:+.2f} {span(logprob)} nats; loss on the text that follows "
            f"{-drop.mean:+.4f} (95 % {-drop.high:.4f} to {-drop.low:.4f}) nats",
        )
    most = [sizes[-1]]
    gain = paired(recall("CAKE", most), recall("SnapKV", most))
    drop = paired(loss("SnapKV", most), loss("CAKE", most))
    run.record(
        "large",
        here={"points of recall": round(gain.mean, 1), "nats": round(drop.mean, 4)},
        holds=abs(gain.mean) < 5 and abs(drop.mean) < 0.02,
        setting=f"{settings['needle']}; {settings['loss'].removeprefix(HERE + '; ')}",
        note=f"CAKE above SnapKV, paired 95 % intervals {span(gain)} points and {span(drop)} nats; full cache: recall "
        f"{100 * mean([row['full'][0] for row in found]):.0f} %",
    )


def answer_logprob(found: Sequence[Mapping[str, Any]], name: str, at: Sequence[int]) -> list[float]:
    return [sum(row[name][str(size)][1] for size in at) / len(at) for row in found]


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def span(estimate: Estimate) -> str:
    digits = 1 if max(abs(estimate.low), abs(estimate.high)) > 2 else 3
    return f"({estimate.low:.{digits}f} to {estimate.high:.{digits}f})"


def draw(
    losses: Sequence[Mapping[str, Any]], found: Sequence[Mapping[str, Any]], sizes: Sequence[int]
) -> Figure:
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for name in METHODS:
        recalls = [100 * mean([row[name][str(size)][0] for row in found]) for size in sizes]
        extra = [mean([row[name][str(size)] - row["full"] for row in losses]) for size in sizes]
        style = {"marker": "o", "ms": 3, "lw": 1.2, "ls": "--" if "," in name else "-"}
        left.plot(sizes, recalls, label=name, **style)
        right.plot(sizes, extra, **style)
    left.axhline(100 * mean([row["full"][0] for row in found]), color="0.6", lw=0.8)
    right.axhline(0, color="0.6", lw=0.8)
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks(list(sizes), [str(size) for size in sizes])
        axes.set_xlabel("tokens per KV head")
    left.set(ylabel="recall, %", title="needles (line: full cache)")
    right.set(ylabel="nats per token", title="loss above the full cache")
    figure.legend(loc="outside lower center", ncols=4, fontsize=7, frameon=False)
    return figure


def draw_layers(slots: Sequence[float]) -> Figure:
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 2.2), layout="constrained")
    axes.bar(range(len(slots)), slots)
    axes.set(xlabel="layer", ylabel="slots", title="what CAKE gives each layer, 128 in the mean")
    return figure
