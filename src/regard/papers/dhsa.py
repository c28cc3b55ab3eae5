"""DHSA on SmolLM2: are boundaries found, does cutting at them catch more attention than cutting anywhere, what does it cost?

Texts of 1024 tokens that the boundary predictor was not trained on, blocks of 64 queries, budgets of an eighth and a
quarter of the text, of which 32 keys at either end are fixed. The mass caught is measured on the dense model's own attention;
loss and needles with the method attached.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from regard.papers import Claim, Paper, Run

HERE = "SmolLM2-135M-Instruct (30 layers, 9 heads, 3 KV heads; de-quantised Q4_1)"
GEMMA = "Gemma-2-2B-it, budget 1k to 2k of 8k tokens"
FEWER = ("predicted, no root", "teacher, own layer")
"""Measured by the mass they catch only."""

PAPER = Paper(
    "dhsa",
    claims=[
        Claim(
            "exact",
            "With a budget of the whole text DHSA is dense attention: largest difference of a logit",
            setting="construction",
            expect="at most 1e-3 (logits of about 30)",
            holds=lambda gap: gap <= 1e-3,
        ),
        Claim(
            "predictor",
            "A small network finds boundaries from keys alone: area under the ROC curve on layers above 0",
            setting="Gemma-2-2B-it, trained on thousands of texts; no figure in the abstract",
            expect="above 0.6 on every layer that was judged, and F1 above that of punctuation",
        ),
        Claim(
            "first-layer",
            "Boundaries of the first layer serve the others: rank correlation of R between layer 0 and the layers above",
            setting="implied: the network reads layer 0 and all layers share its cuts",
            expect="above 0.3",
            holds=lambda correlation: correlation > 0.3,
        ),
        Claim(
            "predicted",
            "Chunks cut at predicted boundaries catch more attention mass than chunks of equal length, at equal budget",
            setting=f"{GEMMA}; implied by DHSA matching dense where block-sparse does not",
            unit=" % of attention mass",
            expect="more than 1 point on at least one budget, and no less than with the same lengths shuffled",
        ),
        Claim(
            "teacher",
            "Boundaries of the teacher catch at least as much as predicted ones",
            setting="not in the paper",
            unit=" % of attention mass",
            expect="teacher's, of each layer itself, at least as much on both budgets",
        ),
        Claim(
            "root",
            "The root of the chunk length in the chunk's vector catches more mass than the plain mean",
            setting=f"{GEMMA}; avgpool against avgpool_norm",
            unit=" points of attention mass",
            expect="above 0 on both budgets, for predicted cuts",
        ),
        Claim(
            "even-handed",
            "The root makes chunks of different length comparable: share of long chunks among those chosen, random keys",
            setting="the paper's reason for it; lengths 1 to 8",
            expect="within 0.1 of one half with the root, below 0.2 without",
        ),
        Claim(
            "mass",
            "Chunk scores choose better than a sliding window with sinks of the same size",
            setting=f"{GEMMA}; StreamingLLM-like baselines",
            unit=" % of attention mass",
            expect="more mass on both budgets",
        ),
        Claim(
            "loss",
            "The loss stays near that of dense attention, nearer than with equal chunks",
            setting="LongBench matches dense, 6 to 18 % relative better than block-sparse",
            paper="6 to 18 % better than block-sparse (LongBench scores)",
            unit=" nats per token above dense",
            expect="DHSA at most equal chunks' loss on both budgets",
        ),
        Claim(
            "needle",
            "Needles are found as with dense attention, and not found with a sliding window",
            setting="Gemma-2-2B-it, needle test to 8k tokens",
            paper="matches dense (figure)",
            unit=" nats per answer token",
            expect="DHSA >= equal chunks >= window and sinks, with all prompt queries sparse",
        ),
        Claim(
            "speed",
            "Prefill takes 20 to 60 % less time and 35 % less memory",
            setting="Gemma-2-2B-it on one 24 GB GPU, 8k to 32k tokens",
            paper="8k: 1.65 s to 1.19 s, 10.7 GB to 6.9 GB",
            beyond="a figure of GPU kernels at 8k to 32k tokens; attention is a quarter of the prefill at our 1k",
        ),
        Claim(
            "longbench",
            "LongBench scores match dense attention",
            setting="Gemma-2-2B-it",
            beyond="a model of 135M parameters does not solve these tasks",
        ),
    ],
    needs=("matplotlib",),
)


def experiment(run: Run) -> None:
    from regard.papers import _dhsa_figures as figures
    from regard.papers import _dhsa_runs as runs
    from regard.sparse.dhsa import DHSA
    from regard.texts import needle_prompts

    model = run.model()
    run.seed(0)
    predictor = DHSA.for_smollm2().predictor
    tokenizer = model.tokenizer
    shares = run.pick(quick=(0.3, 0.5), full=(0.125, 0.25))
    texts = runs.held_out(tokenizer, *run.pick(quick=(256, 1), full=(1024, 4)))

    gap = run.partial("gap", lambda: runs.gap_to_dense(model, predictor, texts[0]))
    run.record("exact", here=gap, setting=f"{HERE}; one text of {len(texts[0])} tokens")

    studies = [
        run.partial(f"study/{i}", lambda ids=ids: runs.study(model, predictor, ids, shares))
        for i, ids in run.progress(list(enumerate(texts)), "attention mass")
    ]
    lengths = " and ".join(str(n) for n in sorted({len(ids) for ids in texts}))
    setting = f"{HERE}; {len(texts)} held-out texts of {lengths} tokens, blocks of {runs.BLOCK}, n_local = n_global = {runs.EDGE}"
    _record_boundaries(run, studies, setting)
    recall = _table(studies, shares)
    _record_mass(run, recall, studies, setting)

    uneven = [runs.root_on_uneven(seed, 8) for seed in range(run.pick(quick=20, full=200))]
    share = {name: float(np.mean([one[name] for one in uneven])) for name in ("root", "mean")}
    run.record(
        "even-handed",
        here=share,
        holds=abs(share["root"] - 0.5) <= 0.1 and share["mean"] < 0.2,
        setting="64 chunks, half of length 8 and half of 64, Gaussian keys of 64 dimensions, the best quarter chosen",
    )

    loss: dict[str, list[float]] = {}
    for share in run.progress(run.pick(quick=shares[1:], full=shares), "loss"):
        ways = runs.methods(predictor, len(texts[0]), share)
        for name, make in run.progress(list(ways.items()), "ways to choose"):
            if name in FEWER:
                continue
            loss[f"{share}/{name}"] = [
                run.partial(
                    f"loss/{0 if name == 'dense' else share}/{name}/{i}",
                    lambda ids=ids, make=make: runs.losses(model, ids, make()),
                )
                for i, ids in enumerate(texts[: run.pick(quick=1, full=2)])
            ]
    _record_loss(run, loss, len(texts[0]))

    answered: dict[str, list[float]] = {}
    for length in run.pick(quick=(200,), full=(700,)):
        prompts = needle_prompts(
            tokenizer,
            lengths=(length,),
            depths=run.pick(quick=(0.5,), full=(0.3, 0.7)),
            needles=run.pick(quick=1, full=3),
            seed=length,
        )
        ways = runs.methods(predictor, length, shares[1], 1)
        for name, make in run.progress(list(ways.items()), f"needles in {length} tokens"):
            if name in FEWER:
                continue
            answered.setdefault(name, []).extend(
                run.partial(
                    f"needle/{length}/{name}", lambda p=prompts, m=make: runs.needles(model, p, m())
                )
            )
    _record_needles(run, answered)
    run.figure("mass", figures.draw_mass(recall, shares))
    run.figure("layers", figures.draw_layers(studies, shares[0]))
    run.figure("loss", figures.draw_loss(loss))


def _table(
    studies: list[dict[str, Any]], shares: tuple[float, ...]
) -> dict[str, dict[str, list[float]]]:
    """Percent of attention mass by way to choose, budget and text."""
    return {
        name: {
            share: [100 * s["recall"][name][share] for s in studies] for share in map(str, shares)
        }
        for name in studies[0]["recall"]
    }


def _mean(recall: dict[str, dict[str, list[float]]], name: str) -> dict[str, float]:
    return {share: float(np.mean(values)) for share, values in recall[name].items()}


def _record_boundaries(run: Run, studies: list[dict[str, Any]], setting: str) -> None:
    layers = sorted({int(layer) for s in studies for layer in s["found"]})
    by = {
        layer: {
            key: float(
                np.mean(
                    [s["found"][str(layer)][key] for s in studies if s["found"].get(str(layer))]
                )
            )
            for key in ("area", "f1", "f1 text", "f1 chance")
        }
        for layer in layers
        if any(s["found"].get(str(layer)) for s in studies)
    }
    above = {layer: values for layer, values in by.items() if layer}
    words = "; ".join(
        f"layer {layer}: F1 {v['f1']:.2f}, after punctuation {v['f1 text']:.2f}, chance {v['f1 chance']:.2f}"
        for layer, v in by.items()
    )
    run.record(
        "predictor",
        here={f"layer {layer}": values["area"] for layer, values in by.items()},
        holds=all(v["area"] > 0.6 and v["f1"] > v["f1 text"] for v in above.values()),
        setting=setting,
        note=f"gaps with R >= 2 against all others; {words}; the weights come from the second of two training settings tried, "
        "taken for its area on four texts of which one lies within those measured here",
    )
    related = [s["related"] for s in studies]
    run.record(
        "first-layer",
        here=float(np.mean(related)),
        interval=(min(related), max(related)),
        setting=setting,
        note="Spearman over gaps, mean over layers 1 to 29; interval: range over texts",
    )


def _record_mass(
    run: Run, recall: dict[str, Any], studies: list[dict[str, Any]], setting: str
) -> None:
    means = {name: _mean(recall, name) for name in recall}
    chunks = {name: np.mean([s["chunks"][name] for s in studies]) for name in studies[0]["chunks"]}

    def both(*names: str) -> dict[str, float]:
        return {
            f"{name}, {share}": means[name][share] for share in means["predicted"] for name in names
        }

    def over(one: str, other: str) -> dict[str, float]:
        """Mean lead over texts."""
        return {share: means[one][share] - means[other][share] for share in means[one]}

    lead = over("predicted", "fixed, as many")
    fine = over("predicted", "fixed 8")
    shuffled = over("predicted", "shuffled")
    run.record(
        "predicted",
        here=both("predicted", "fixed, as many", "fixed 8", "shuffled"),
        holds=max(lead[s] for s in lead) > 1
        and max(fine.values()) > 1
        and all(v >= 0 for v in shuffled.values()),
        setting=setting,
        note="mean over layers and blocks whose budget is smaller than their past; chunks a text: "
        f"predicted {chunks['predicted']:.0f}, "
        f"fixed 8 {chunks['fixed 8']:.0f}; range of predicted - fixed (as many) over texts "
        + ", ".join(
            f"{min(d):.1f} to {max(d):.1f} ({s})"
            for s in lead
            for d in [np.subtract(recall["predicted"][s], recall["fixed, as many"][s])]
        ),
    )
    ahead = over("teacher, own layer", "predicted")
    run.record(
        "teacher",
        here=both("teacher, own layer", "teacher, layer 0", "predicted", "tokens", "best possible"),
        holds=all(v >= 0 for v in ahead.values()),
        setting=setting,
        note="tokens: every token a chunk of its own; best possible: the keys that the block pays most",
    )
    root = over("predicted", "predicted, no root")
    other = over("teacher, own layer", "teacher, own layer, no root")
    run.record(
        "root",
        here=root,
        holds=all(v > 0 for v in root.values()),
        setting=setting,
        note="the same with the teacher's cuts: "
        + ", ".join(f"{v:+.2f} ({s})" for s, v in other.items()),
    )
    window = over("predicted", "window and sinks")
    run.record(
        "mass",
        here=both("predicted", "fixed 8", "window and sinks"),
        holds=all(v > 0 for v in window.values()),
        setting=setting,
    )


def _record_loss(run: Run, loss: dict[str, list[float]], length: int) -> None:
    above = {}
    for key, values in loss.items():
        share, name = key.split("/")
        if name != "dense":
            above[f"{name}, {share}"] = float(np.mean(np.subtract(values, loss[f"{share}/dense"])))
    shares = sorted({key.split("/")[0] for key in loss})
    dense = loss[f"{shares[0]}/dense"]
    run.record(
        "loss",
        here=above,
        holds=all(above[f"predicted, {s}"] <= above[f"fixed 8, {s}"] for s in shares),
        setting=f"{HERE}; {len(dense)} of the texts of {length} tokens; the last 32 queries dense and left out of the loss",
        note=f"dense loss {np.mean(dense):.3f} nats",
    )


def _record_needles(run: Run, answered: dict[str, list[float]]) -> None:
    mean = {name: float(np.mean(values)) for name, values in answered.items()}
    generator = np.random.default_rng(0)
    lead = np.subtract(answered["predicted"], answered["fixed 8"])
    again = [generator.choice(lead, len(lead)).mean() for _ in range(1000)]
    run.record(
        "needle",
        here=mean,
        holds=mean["predicted"] >= mean["fixed 8"] >= mean["window and sinks"],
        setting=f"{HERE}; {len(lead)} prompts of 700 tokens, budget a quarter, "
        "all prompt queries but the last two sparse",
        note="haystacks are shuffled passages of the reference, of which a third was read in training; predicted - fixed 8, "
        "95 % bootstrap over prompts: "
        f"{np.percentile(again, 2.5):+.2f} to {np.percentile(again, 97.5):+.2f}",
    )
