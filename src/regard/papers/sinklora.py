"""SinkLoRA (arXiv 2406.05678): context extension trained with sink fixed attention, run with full attention.

Grouped attention with half of the heads shifted (S2-Attn, LongLoRA) is cheap to train with and loses quality; SinkLoRA puts a
part of the shifted heads back (S&R) and shows four sink tokens to every query (SF-Attn). Checked here:

* the grouped computation against dense attention under the same mask, and the leak of the rolled heads;
* a character model extended from 128 to 512 positions under each pattern, over seeds (`_sinklora_characters.py`);
* what the patterns cost;
* SmolLM2 with its attention replaced, untrained and after a short fine-tuning (`_sinklora_smollm2.py`).

Perplexities are those of full attention on text that was held out.
"""

from __future__ import annotations

import math
from statistics import fmean, stdev
from typing import Any

import torch

from regard.labs.context_extension import recovery
from regard.ops.grouped_attention import group_visible, grouped_attention
from regard.papers import Claim, Paper, Run
from regard.papers import _sinklora_characters as characters
from regard.papers import _sinklora_figures as figures
from regard.papers import _sinklora_smollm2 as smollm2
from regard.sparse.shifted import S2Attention, SFAttention
from regard.weights import rope_interpolate

MIDWAY = 65.5
"""Between the paper's 39 % and 92 %: the line that tells a small recovery from a large one."""

PAPER = Paper(
    "sinklora",
    claims=[
        Claim(
            "exact",
            "Grouped attention is dense attention under the pattern's mask: largest difference",
            setting="not in the paper: a check of the implementation",
            expect="below 1e-12, in float64",
            holds=lambda gap: gap < 1e-12,
        ),
        Claim(
            "leak",
            "Rolled heads let the first tokens see the end of the sequence; cutting the wrapped group stops it",
            setting="not in the paper: LongLoRA rolls and does not mask; logits changed by other characters at the end",
        ),
        Claim(
            "gain",
            "A longer context needs training, and full attention with adapters, embeddings and norms trains it best: perplexity",
            setting="Llama-2-7B to 8k-64k, PG19 and proof-pile",
        ),
        Claim(
            "s2",
            "S2-Attn keeps a small part of full attention's gain: perplexity recovered",
            setting="LongLoRA fine-tuning of Llama-2-7B",
            paper="39 %",
            unit=" %",
            expect=f"below {MIDWAY} %, midway between the paper's two figures",
            holds=lambda share: share < MIDWAY,
        ),
        Claim(
            "sf",
            "SF-Attn keeps most of it: perplexity recovered",
            setting="Llama-2-7B",
            paper="92 %",
            unit=" %",
            expect=f"above {MIDWAY} %",
            holds=lambda share: share > MIDWAY,
        ),
        Claim(
            "better",
            "SF-Attn recovers more than S2-Attn: difference in points",
            setting="Llama-2-7B",
            paper="53 points",
            unit=" points",
            expect="above one standard error over seeds, paired",
        ),
        Claim(
            "parts",
            "Sinks and restored heads each lower the perplexity of S2-Attn, and both together most",
            setting="Llama-2-7B, PG19 validation",
            paper="9.09 S2, 8.91 with sinks, 8.86 with S&R, 8.64 both",
            expect="both parts below S2, SF below both parts (means over seeds)",
        ),
        Claim(
            "extra",
            "Adapters alone recover less than adapters with embeddings and norms",
            setting="LongLoRA, Llama-2-7B",
            expect="perplexity lower with embeddings and norms, in every seed",
        ),
        Claim(
            "cost",
            "Grouped attention costs a fraction of full attention: floating-point operations and time of a layer",
            setting="groups of a quarter of the sequence",
            expect="operations below 30 % of full attention's, time below 60 %",
        ),
        Claim(
            "swapped",
            "In a pretrained model, untrained, sink tokens soften the damage: loss of full < SF < S2",
            setting="not in the paper: the mechanism that it appeals to",
        ),
        Claim(
            "tuned",
            "Fine-tuning with SF-Attn leaves full attention with a lower loss than fine-tuning with S2-Attn",
            setting="Llama-2-7B, PG19 validation",
            paper="perplexity 8.64 against 9.09",
            expect="loss of SF below S2 by more than one standard error over held-out rows, paired",
        ),
        Claim(
            "one-sided",
            "Reassembling only the input or only the output of attention is worse than S2-Attn",
            setting="Llama-2-7B, PG19 validation",
            paper="9.35 and 9.60 against 9.09",
            beyond="the paper gives the reassembly as an image and releases no code, so its halves are not defined well enough",
        ),
        Claim(
            "h2o",
            "At inference half of the cache, kept by H2O, holds accuracy and runs 1.5 x faster",
            setting="Llama-3-8B, OpenBookQA",
            paper="1.5 x",
            beyond="H2O is a cache policy; it is measured with the other policies under `cake`",
        ),
        Claim(
            "long",
            "Perplexities at 8k to 100k, LongBench, chat quality",
            setting="Llama-2-7B and 13B, Llama-3-8B",
            beyond="the models and the lengths are out of reach of this machine",
        ),
    ],
    needs=("peft", "matplotlib"),
)


def experiment(run: Run) -> None:
    run.record(
        "exact",
        here=largest_difference(run),
        note="float64, 64 tokens in groups of 8 to 64",
    )
    found = in_characters(run)
    record_characters(run, found)
    cost(run)
    pretrained = in_smollm2(run)
    record_smollm2(run, pretrained)
    run.figure("perplexity", figures.draw_perplexity(found))
    run.figure("positions", figures.draw_positions(found))
    run.figure("first-token", figures.draw_first_token(found, pretrained))


def largest_difference(run: Run) -> float:
    """Grouped against dense attention over patterns, group sizes and grouped heads."""
    generator, worst = run.seed(0), 0.0
    positions = torch.arange(64)
    patterns = [S2Attention(), S2Attention(leak=False)]
    patterns += [
        SFAttention(restore=restore, sinks=sinks, leak=leak)
        for restore in (0.0, 0.25, 0.5, 1.0)
        for sinks in (0, 4)
        for leak in (True, False)
    ]
    for pattern in patterns:
        for size in (8, 16, 32, 64):
            query = torch.randn(2, 8, 64, 32, generator=generator).double()
            key, value = (torch.randn(2, 2, 64, 32, generator=generator).double() for _ in range(2))
            shifted = pattern.shifted(8)
            settings: dict[str, Any] = {"sinks": pattern.sinks, "leak": pattern.leak}
            seen = torch.stack(
                [
                    group_visible(
                        positions[:, None],
                        positions,
                        64,
                        size,
                        shifted=head >= 8 - shifted,
                        **settings,
                    )
                    for head in range(8)
                ]
            )
            scores = query @ key.repeat_interleave(4, 1).transpose(2, 3)
            weights = (scores / math.sqrt(32)).masked_fill(~seen, -torch.inf).softmax(-1)
            dense = weights @ value.repeat_interleave(4, 1)
            grouped = grouped_attention(query, key, value, size, shifted=shifted, **settings)
            worst = max(worst, float((grouped - dense).abs().max()))
    return worst


def in_characters(run: Run) -> dict[str, Any]:
    """Every arm for every seed: losses, their course over positions, attention on token 0, the leak."""
    scale = run.pick(
        quick=characters.Scale(base=2, extend=1, rows=1, batch=4),
        full=characters.Scale(base=250, extend=100, rows=32),
    )
    data = characters.corpus()
    held = characters.consecutive(data.held, characters.LONG)[: scale.rows]
    tuning = characters.consecutive(data.tune, characters.LONG)[: scale.rows]
    bases: list[Any] = []

    def base() -> Any:
        if not bases:
            run.seed(0)
            bases.append(
                characters.base_model(
                    data, scale, 0, lambda steps: run.progress(steps, "base model")
                )
            )
        return bases[0]

    def tune() -> dict[str, float]:
        rates = run.pick(quick=(1e-3,), full=characters.RATES)
        return {
            f"{rate:g}": characters.losses(
                characters.extended(base(), data, scale, "full", 0, rate), tuning
            )["loss"]
            for rate in run.progress(rates, "rates")
        }

    def before() -> dict[str, Any]:
        model = base()
        known = characters.consecutive(data.held, characters.KNOWN)[: 4 * scale.rows]
        found: dict[str, Any] = {
            "known": characters.losses(model, known)["loss"],
            "beyond": characters.losses(model, held)["loss"],
        }
        with rope_interpolate(model, characters.LONG // characters.KNOWN):
            found["none"] = characters.losses(model, held)
            found["leaks"] = [
                characters.leaked(model, held[:8], S2Attention(leak=leak)) for leak in (True, False)
            ]
        return found

    def extend(name: str, seed: int) -> dict[str, Any]:
        run.seed(seed)
        model = characters.extended(base(), data, scale, name, seed, rate)
        return characters.losses(model, held) | {
            "first token": characters.first_token(model, held[:8])
        }

    rates = run.partial("rates", tune)
    rate = float(min(rates, key=rates.__getitem__))
    count = run.pick(quick=1, full=3)
    start = run.partial("before", before)
    seeds = [
        {"none": start["none"]}
        | {
            name: run.partial(f"{name}/{seed}", lambda name=name, seed=seed: extend(name, seed))
            for name in run.progress(characters.ARMS, f"patterns, seed {seed}")
        }
        for seed in range(count)
    ]
    here = (
        f"4 layers, 4 heads, width 128, {scale.base} steps at {characters.KNOWN} characters; extended to {characters.LONG} in "
        f"{scale.extend} steps of 2 rows, rate {rate:g}; {len(held)} held-out rows of Python's reference, {count} seeds of the "
        "extension"
    )
    return {"seeds": seeds, "rates": rates, "before": start, "here": here}


def recovered(found: dict[str, Any], name: str) -> list[float]:
    """The share of full attention's gain, in percent, for each seed."""
    triples = zip(
        *(characters.perplexity(found, arm) for arm in ("none", name, "full")), strict=True
    )
    return [100 * recovery(*triple) for triple in triples]


def spread(values: list[float]) -> float:
    """The standard error of the mean (0 for one value)."""
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def ends(values: list[float]) -> tuple[float, float]:
    mean, error = fmean(values), spread(values)
    return round(mean - error, 4), round(mean + error, 4)


def record_characters(run: Run, found: dict[str, Any]) -> None:
    seeds, here = found["seeds"], found["here"]
    rolled, cut = found["before"]["leaks"]
    run.record(
        "leak",
        here={"rolled": round(rolled, 4), "cut": cut},
        holds=rolled > 1e-3 and cut == 0,
        setting="the character model before extension, S2-Attn at 512 characters, the last 64 replaced",
        note="largest change of a logit of the first 64 characters",
    )
    if run.quick:
        return  # two steps of training gain nothing to recover
    table = {name: characters.perplexity(found, name) for name in ("none", *characters.ARMS)}
    means = {name: round(fmean(values), 4) for name, values in table.items()}
    arms = [name for name in table if name not in ("none", "full")]
    best = [
        all(table["full"][i] < table[name][i] for name in arms)
        and table["none"][i] > max(table[name][i] for name in (*arms, "full"))
        for i in range(len(seeds))
    ]
    beyond, known = (math.exp(found["before"][key]) for key in ("beyond", "known"))
    run.record(
        "gain",
        here={"no training": means["none"]} | {name: means[name] for name in characters.ARMS},
        holds=all(best),
        setting=here,
        note=f"no training is with interpolated positions (without: {beyond:.2f}; at 128 characters: {known:.3f}); it is "
        f"worst and full attention best in {sum(best)} of {len(best)} seeds; rate tuned on full attention: "
        + ", ".join(f"{rate} gave {math.exp(loss):.3f}" for rate, loss in found["rates"].items()),
    )
    for claim, name in (("s2", "S2"), ("sf", "SF")):
        share = recovered(found, name)
        run.record(
            claim,
            here=round(fmean(share), 2),
            interval=ends(share),
            setting=here,
            note="interval: one standard error over seeds; by seed " + listed(share),
        )
    gain = [a - b for a, b in zip(recovered(found, "SF"), recovered(found, "S2"), strict=True)]
    others = {name: listed(recovered(found, name)) for name in arms if name not in ("S2", "SF")}
    run.record(
        "better",
        here=round(fmean(gain), 3),
        interval=ends(gain),
        holds=fmean(gain) > spread(gain),
        setting=here,
        note=f"interval: one standard error over seeds; by seed {listed(gain)}; recovered by the others, by seed: "
        + "; ".join(f"{name} {values}" for name, values in others.items()),
    )
    s2, sinks, restored, both = (means[name] for name in ("S2", "S2 + sinks", "S&R", "SF"))
    run.record(
        "parts",
        here={"S2": s2, "with sinks": sinks, "with S&R": restored, "both": both},
        holds=max(sinks, restored) < s2 and both < min(sinks, restored),
        setting=here,
        note="differences from S2-Attn by seed: "
        + "; ".join(
            f"{name} {listed([a - b for a, b in zip(table[name], table['S2'], strict=True)], 4)}"
            for name in ("S2 + sinks", "S&R", "SF", "block-local", "S2 without the leak")
        ),
    )
    alone, extra = table["full, adapters alone"], table["full"]
    run.record(
        "extra",
        here={"adapters alone": round(fmean(alone), 4), "with extra": round(fmean(extra), 4)},
        holds=all(a > b for a, b in zip(alone, extra, strict=True)),
        setting=here,
        note="full attention in training; adapters alone recover "
        + listed(recovered(found, "full, adapters alone"))
        + " % by seed",
    )


def listed(values: list[float], digits: int = 2) -> str:
    return ", ".join(f"{value:.{digits}f}" for value in values)


def cost(run: Run) -> None:
    tokens = run.pick(quick=256, full=4096)
    patterns = {"S2": S2Attention(), "SF": SFAttention()}
    counted = {name: smollm2.operations(p, tokens, 9) for name, p in patterns.items()}
    ratios = run.partial("times", lambda: smollm2.times(tokens, run.pick(quick=1, full=7)))
    here = {f"operations, {name}": round(value, 4) for name, value in counted.items()}
    run.record(
        "cost",
        here=here | {f"time, {name}": round(value, 3) for name, value in ratios.items()},
        holds=max(counted.values()) < 0.3 and max(ratios.values()) < 0.6,
        setting=f"one attention layer of SmolLM2 (9 heads on 3 KV heads), {tokens} tokens, forward and backward on a CPU",
        note="shares of full causal attention by the same kernel; time: medians of interleaved repeats",
    )


def in_smollm2(run: Run) -> dict[str, Any]:
    """Losses of SmolLM2 with its attention replaced, and after fine-tuning."""
    model = run.model()
    length, steps = run.pick(quick=64, full=512), run.pick(quick=1, full=20)
    text = smollm2.read(model.tokenizer, length, steps, run.pick(quick=2, full=4))
    run.seed(0)
    long = text.held.view(
        -1, 2 * length
    )  # replaced attention is measured on rows of twice that length
    swaps = {
        name: run.partial(f"swap/{name}", lambda name=name: smollm2.swapped(model, long, name))
        for name in run.progress(run.pick(quick=smollm2.TUNED, full=smollm2.SWAPPED), "patterns")
    }
    before = run.partial("swap/none", lambda: smollm2.swapped(model, text.held, "full"))
    names = run.pick(quick=("SF",), full=smollm2.TUNED)
    tuned = {
        name: run.partial(
            f"tuned/{name}",
            lambda name=name: smollm2.tuned(
                model, text, name, steps, lambda items: run.progress(items, f"tuning with {name}")
            ),
        )
        for name in run.progress(names, "fine-tuning")
    }

    def views() -> dict[str, list[float]]:
        row = long[:1]
        patterns = {"full": None, "S2": S2Attention(), "SF": SFAttention()}
        return {name: characters.first_token(model, row, p) for name, p in patterns.items()}

    here = (
        "SmolLM2-135M-Instruct (4-bit weights), {} held-out rows of {} tokens of Python's reference"
    )
    return {
        "swaps": swaps,
        "tuned": tuned,
        "views": run.partial("views", views),
        "steps": steps,
        "before": before,
        "swapped on": here.format(*long.shape),
        "tuned on": here.format(*text.held.shape),
    }


def record_smollm2(run: Run, found: dict[str, Any]) -> None:
    means = {name: fmean(rows) for name, rows in found["swaps"].items()}
    run.record(
        "swapped",
        here={name: round(value, 3) for name, value in means.items()},
        holds=means["full"] < means["SF"] < means["S2"],
        setting=found["swapped on"],
        note="nats per token, nothing trained",
    )
    if run.quick:
        return
    before, after = found["before"], {n: t["held"] for n, t in found["tuned"].items()}
    gain = [s2 - sf for s2, sf in zip(after["S2"], after["SF"], strict=True)]
    trained = ", ".join(
        f"{name} {fmean(t['training'][:4]):.2f} to {fmean(t['training'][-4:]):.2f}"
        for name, t in found["tuned"].items()
    )
    run.record(
        "tuned",
        here={"before": round(fmean(before), 4)}
        | {f"after {name}": round(fmean(rows), 4) for name, rows in after.items()},
        holds=fmean(gain) > spread(gain) and fmean(gain) > 0,
        setting=f"{found['tuned on']}; LoRA r = 8 with embeddings and norms, {found['steps']} steps of one row, rate "
        f"{smollm2.RATE:g}",
        note=f"nats per token under full attention; S2 minus SF: {fmean(gain):.4f}, standard error {spread(gain):.4f} over rows; "
        f"training loss under the pattern, first and last four steps: {trained}; the model knew this length before, so what is "
        "learnt is the text and the pattern",
    )
