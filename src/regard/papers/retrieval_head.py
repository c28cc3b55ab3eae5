"""Retrieval heads on SmolLM2: how few they are, whether they are a property of the model, and what masking them does.

Needles in haystacks of 300 to 1000 tokens. Heads are ranked on one half of the needles and masked while the model answers
the other half, and the other way round; every control masks random heads of the same layers. Masking acts on decode rows
only, as in the paper, so the prompt is read by the whole model.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from regard.papers import Claim, Paper, Run
from regard.papers._retrieval_figures import draw_elsewhere, draw_masking, draw_scores
from regard.papers._retrieval_runs import copy_scores, flat, head_name, masking_runs, score

HERE = "SmolLM2-135M-Instruct (270 heads, de-quantised Q4_1)"
THRESHOLD = 0.1
FAMILIES = "Llama-2-7B-80K and other long-context models, 1k to 50k tokens"

PAPER = Paper(
    "retrieval-head",
    claims=[
        Claim(
            "sparse",
            "Few heads retrieve: share of heads with a retrieval score of at least 0.1",
            setting=FAMILIES,
            paper="3.2 % (Llama-2-7B-80K), 3.8 to 5.2 % (Yi, Mistral, Qwen1.5)",
            unit=" %",
            expect="below 15 %",
            holds=lambda share: share < 15,
        ),
        Claim(
            "five",
            "Retrieval heads are fewer than 5 % of all heads",
            setting=FAMILIES,
            paper="< 5 %",
            unit=" %",
            expect="below 5 %",
            holds=lambda share: share < 5,
        ),
        Claim(
            "zero",
            "Most heads never retrieve: share of heads with a score of exactly 0",
            setting="Llama-2-7B-80K, released scores",
            paper="70 %",
            unit=" %",
            expect="above 50 %",
            holds=lambda share: share > 50,
        ),
        Claim(
            "dynamic",
            "Some retrieval heads are active in every run, the others only in some contexts",
            setting="Llama-2-7B",
            paper="12 heads always active",
            expect="at least one head of each kind",
        ),
        Claim(
            "reliable",
            "The score is a property of the head: rank correlation between two halves of the needles",
            setting="not in the paper; heads that copy in either half",
            expect="above 0.8",
            holds=lambda correlation: correlation > 0.8,
        ),
        Claim(
            "causal",
            "Masking the ten best heads breaks the needle task, masking ten random heads does not",
            setting="Llama-2-7B-80K, 30 heads, against random heads outside the top 100",
            paper="needle task fails against nearly no change (figure)",
            unit=" points of answered prompts",
            expect="best heads: at least 60 points fewer answers; random: at most 15 in mean",
        ),
        Claim(
            "logprob",
            "Answer log-probability falls more for the best heads than for any random set, at each K >= 5",
            setting="not in the paper; a smoother outcome than recall",
            unit=" nats per token",
            expect="at K = 5, 10 and 20",
        ),
        Claim(
            "prefill",
            "The same holds when the heads are masked while the prompt is read, too",
            setting="not in the paper, which masks during decoding only",
            expect="best heads lose more answers than every random set, ten heads each",
        ),
        Claim(
            "intrinsic",
            "The same heads copy elsewhere: of the ten best heads, how many are among the ten best at "
            "continuing a repeated random string",
            setting="paper: base, chat and long-context variants of a model share their heads",
            expect="at least 5 of 10",
            holds=lambda shared: shared >= 5,
        ),
        Claim(
            "induction",
            "Retrieval heads overlap with induction heads: correlation of the two scores over heads",
            setting="discussed, not measured in the paper",
            expect="above 0.3",
            holds=lambda correlation: correlation > 0.3,
        ),
        Claim(
            "long",
            "The same few heads retrieve at 1k to 50k tokens and in every model family",
            setting=FAMILIES,
            beyond="the model at hand is one model of one family and answers up to about 2k tokens",
        ),
        Claim(
            "reasoning",
            "Masking retrieval heads hurts chain-of-thought, not tasks answered from memory",
            setting="Mistral-7B-Instruct, GSM8K, MuSiQue, MMLU",
            beyond="a model of 135M parameters does not solve these tasks",
        ),
    ],
    needs=("scipy", "matplotlib"),
)


def experiment(run: Run) -> None:
    from regard.instruments.probes import probe_heads
    from regard.texts import needle_prompts

    run.seed(0)
    model = run.model()
    lengths = run.pick(quick=(120,), full=(300, 600, 1000))
    depths = run.pick(quick=(0.5,), full=(0.1, 0.4, 0.6, 0.9))
    needles = run.pick(quick=2, full=10)
    rows: list[dict[str, Any]] = []
    grid = {length: depths if length < 1000 else depths[::2] for length in lengths}
    for length, places in run.progress(list(grid.items()), "scoring heads"):
        prompts = needle_prompts(
            model.tokenizer, lengths=(length,), depths=places, needles=needles, seed=length
        )
        rows += run.partial(f"score/{length}", lambda p=prompts: score(model, p))
    answered = [row for row in rows if row["answered"]]
    table = np.array([row["scores"] for row in answered])
    groups = np.array([row["needle"] for row in answered])
    setting = (
        f"{HERE}; {needles} needles at "
        + ", ".join(f"{len(places)} depths of {length} tokens" for length, places in grid.items())
        + f"; {len(answered)} of {len(rows)} prompts answered"
    )
    _record_scores(run, table, groups, setting)

    induction = run.partial(
        "induction",
        lambda: flat(probe_heads(model, batch=run.pick(quick=1, full=8))["induction"]),
    )
    copying = run.partial("copying", lambda: copy_scores(model, run.pick(quick=2, full=12)))
    _record_elsewhere(run, table.mean(0), np.array(copying), np.array(induction), setting)

    masking = masking_runs(run, model, table, groups, needles)
    _record_masking(run, masking, needles)
    run.figure("scores", draw_scores(table))
    run.figure("masking", draw_masking(masking))
    run.figure("elsewhere", draw_elsewhere(table.mean(0), np.array(copying), np.array(induction)))


def _record_scores(run: Run, table: np.ndarray, groups: np.ndarray, setting: str) -> None:
    mean, heads = table.mean(0), table.shape[1]
    generator = np.random.default_rng(0)
    resampled = []
    for _ in range(1000):
        drawn = generator.choice(np.unique(groups), len(np.unique(groups)))
        resampled.append(np.concatenate([table[groups == g] for g in drawn]).mean(0))
    shares = [100 * np.mean(m >= THRESHOLD) for m in resampled]
    interval = tuple(np.percentile(shares, [2.5, 97.5]))
    share = 100 * float(np.mean(mean >= THRESHOLD))
    best = ", ".join(f"{head_name(int(i))} {mean[i]:.2f}" for i in np.argsort(-mean)[:5])
    note = f"interval: bootstrap over needles, 95 %; best heads {best}; Gini {gini(mean):.2f}"
    run.record("sparse", here=share, interval=interval, setting=setting, note=note)
    run.record("five", here=share, interval=interval, setting=setting, note=note)
    zeros = [100 * np.mean(m == 0) for m in resampled]
    run.record(
        "zero",
        here=100 * float(np.mean(mean == 0)),
        interval=(float(np.min(zeros)), float(np.max(zeros))),
        setting=setting,
        note="interval: range of the bootstrap over needles, which can only add zeros; more prompts give fewer zeros",
    )
    active = (table > 0).mean(0)
    found = mean >= THRESHOLD
    always, sometimes = int((active[found] == 1).sum()), int((active[found] < 1).sum())
    run.record(
        "dynamic",
        here={"always": always, "sometimes": sometimes},
        holds=always > 0 and sometimes > 0,
        setting=setting,
        note=f"of the {int(found.sum())} heads with a score of at least {THRESHOLD}; heads: {heads}",
    )
    halves = [_split_half(table, groups, generator) for _ in range(100)]
    run.record(
        "reliable",
        here=float(np.mean(halves)),
        interval=tuple(np.percentile(halves, [5, 95])),
        setting=setting,
        note="Spearman over heads that copy in either half, mean over 100 random halvings of the needles; "
        "interval: 5th to 95th percentile",
    )


def _split_half(table: np.ndarray, groups: np.ndarray, generator: np.random.Generator) -> float:
    from scipy.stats import spearmanr

    drawn = generator.permutation(np.unique(groups))
    left = np.isin(groups, drawn[: len(drawn) // 2])
    a, b = table[left].mean(0), table[~left].mean(0)
    some = (a > 0) | (b > 0)
    return float(np.asarray(spearmanr(a[some], b[some]))[0])


def _record_elsewhere(
    run: Run, mean: np.ndarray, copying: np.ndarray, induction: np.ndarray, setting: str
) -> None:
    from scipy.stats import spearmanr

    best = [set(np.argsort(-scores)[:10].tolist()) for scores in (mean, copying, induction)]
    run.record(
        "intrinsic",
        here=len(best[0] & best[1]),
        setting=f"{HERE}; random strings of 40 tokens, of which 20 are shown again",
        note=f"correlation of the two scores over all heads {np.corrcoef(mean, copying)[0, 1]:.2f}; "
        "the variants that the paper compares are not at hand",
    )
    generator = np.random.default_rng(1)
    draws = generator.integers(0, len(mean), (1000, len(mean)))
    resampled = [np.corrcoef(mean[d], induction[d])[0, 1] for d in draws]
    run.record(
        "induction",
        here=float(np.corrcoef(mean, induction)[0, 1]),
        interval=tuple(np.percentile(resampled, [2.5, 97.5])),
        setting=setting,
        note=f"Pearson over all heads, interval: bootstrap over heads; Spearman {np.asarray(spearmanr(mean, induction))[0]:.2f}; "
        f"{len(best[0] & best[2])} of the ten best are shared",
    )


def _record_masking(run: Run, masking: dict[str, Any], needles: int) -> None:
    runs, draws, ten = masking["runs"], masking["draws"], masking["ten"]
    answers = {name: np.array(r["recall"]) > 0.5 for name, r in runs.items()}
    logs = {name: np.array(r["logprob"]) for name, r in runs.items()}
    prompts = len(answers["none"])
    setting = (
        f"{HERE}; {prompts} prompts of {masking['length']} tokens ({needles} needles), heads ranked on the other half "
        f"of the needles, output zeroed in decode rows; controls: {draws} layer-matched random sets"
    )
    lost = answers["none"].astype(float) - answers[f"top/{ten}"]
    chance = [
        100 * float(np.mean(answers["none"].astype(float) - answers[f"random/{ten}/{d}"]))
        for d in range(draws)
    ]
    generator = np.random.default_rng(2)
    again = [100 * lost[generator.integers(0, prompts, prompts)].mean() for _ in range(1000)]
    said = next(
        (
            t
            for t, ok in zip(runs[f"top/{ten}"]["texts"], answers[f"top/{ten}"], strict=True)
            if not ok
        ),
        "",
    )
    run.record(
        "causal",
        here={"best": 100 * float(lost.mean()), "random": float(np.mean(chance))},
        interval=None,
        holds=100 * lost.mean() >= 60 and np.mean(chance) <= 15,
        setting=setting,
        note=f"answered without masking: {int(answers['none'].sum())} of {prompts}; best heads, 95 % bootstrap over "
        f"prompts: {np.percentile(again, 2.5):.0f} to {np.percentile(again, 97.5):.0f}; random sets: "
        f"{min(chance):.0f} to {max(chance):.0f}; a masked answer: {said.strip()[:90]!r}",
    )
    counts = [k for k in masking["counts"] if k >= 5]
    falls = {k: float((logs["none"] - logs[f"top/{k}"]).mean()) for k in counts}
    worst = {
        k: max(float((logs["none"] - logs[f"random/{k}/{d}"]).mean()) for d in range(draws))
        for k in counts
    }
    here = {f"best {k}": falls[k] for k in counts} | {f"worst random {k}": worst[k] for k in counts}
    run.record(
        "logprob",
        here=here,
        holds=all(falls[k] > worst[k] for k in counts),
        setting=setting,
        note="mean fall of the log-probability of the answer's tokens after the beginning of the needle's sentence",
    )
    alone = [int(answers[f"all/random/{ten}/{d}"].sum()) for d in range(draws)]
    best = int(answers[f"all/top/{ten}"].sum())
    run.record(
        "prefill",
        here={
            "answered": int(answers["all/none"].sum()),
            "best": best,
            "random": float(np.mean(alone)),
        },
        holds=best < min(alone),
        setting=f"{HERE}; {len(answers['all/none'])} prompts of {masking['length']} tokens, masked in every row",
        note=f"answers with random heads masked: {min(alone)} to {max(alone)} over {draws} layer-matched sets",
    )


def gini(values: np.ndarray) -> float:
    ordered = np.sort(values)
    rank = np.arange(1, len(ordered) + 1)
    return float((2 * rank - len(ordered) - 1) @ ordered / (len(ordered) * ordered.sum()))
