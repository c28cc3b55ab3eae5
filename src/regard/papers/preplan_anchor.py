"""Attention Illuminates LLM Reasoning (arXiv 2510.13554): the measurement part, on a pretrained model.

The paper reads two signals from attention, WAAD (local heads looking far back: a chunk opens) and FAI (global heads of later
tokens looking at a token: an anchor), and finds that they are coupled to each other and to token entropy. Checked here:

* the closed forms of both signals;
* the three couplings on greedy answers to generated word problems, against shuffled peaks;
* the perturbation test: another token forced at a high-FAI position changes the continuation more than at a low-FAI one.

In the laboratory (they need reinforcement learning and are not recorded here): the credit rules and their scores.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from regard.engine import AttentionCall, Pipeline, attend
from regard.instruments import WAAD, FutureInfluence
from regard.instruments.rhythm import Coupling, Rhythm, coupling_report, read_rhythm
from regard.papers import Claim, Paper, Run
from regard.texts import arithmetic_problems

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LO, AFTER = 10, 1
STOP = {
    *("the", "and", "that", "for", "with", "are", "was", "were", "has", "have", "had"),
    *("how", "each", "from", "will", "this", "not", "but", "then", "they", "you"),
}

PAPER = Paper(
    "preplan-anchor",
    claims=[
        Claim(
            "closed",
            "WAAD and FAI of a strictly previous-token head and of uniform rows: largest deviation from the closed forms",
            setting="not in the paper: a check of the instruments",
            expect="below 1e-5",
            holds=lambda worst: worst < 1e-5,
        ),
        Claim(
            "entropy",
            "Tokens at WAAD peaks are less certain: mean entropy there over the mean at random places, minus 1",
            setting="Qwen3-4B on GSM8K; Llama-3.1-8B: +28 %",
            paper="+52 % (.361 against .239)",
            expect="above 0 with p < 0.05",
        ),
        Claim(
            "receiver",
            "Receiver and global heads mark the same anchors: share of FAI peaks in common over chance, minus 1",
            setting="Qwen3-4B on GSM8K; Llama-3.1-8B: +199 %",
            paper="+171 % (60.8 % against 22.4 %)",
            expect="above 0 with p < 0.05",
        ),
        Claim(
            "coupled",
            "An anchor follows a preplan peak: share of WAAD peaks with an FAI peak at or after them over chance, minus 1",
            setting="Qwen3-4B on GSM8K; Llama-3.1-8B: +34 %",
            paper="+42 % (52.5 % against 36.9 %)",
            expect="above 0 with p < 0.05",
        ),
        Claim(
            "perturbed",
            "Forcing another token at a high-FAI place changes the continuation more than at a low-FAI place: share of problems",
            setting="Qwen3, 70 problems; Jaccard index of content words .534 against .631",
            paper="87.1 %",
            unit=" %",
            expect="above 60 % of the problems that differ",
            holds=lambda share: share > 60,
        ),
        Claim(
            "qwen",
            "The figures on Qwen3 and AIME, and the gains of the credit rules",
            setting="Qwen3-4B and 8B",
            beyond="the models are not at hand; the credit rules need reinforcement learning",
        ),
    ],
    needs=("matplotlib",),
)


@dataclass
class Answer:
    """A greedy answer: `ids` holds prompt and response, the response begins at `start`."""

    ids: Tensor
    start: int


def experiment(run: Run) -> None:
    run.record("closed", here=closed_forms(), note="float32, 64 tokens")
    model = run.model()
    run.seed(0)
    problems = run.pick(quick=4, full=60)
    most = run.pick(quick=40, full=160)
    prompts = [prompt(model.tokenizer, p.question) for p in arithmetic_problems(problems, seed=7)]
    answers = [
        Answer(torch.tensor(ids), start)
        for ids, start in run.partial("answers", lambda: respond(model, prompts, most, run))
    ]
    usable = [a for a in answers if len(a.ids) - a.start >= LO + 12]
    rhythms = [
        read_rhythm(model, a.ids, a.start, lo=LO) for a in run.progress(usable, "reading answers")
    ]
    here = (
        f"SmolLM2-135M-Instruct (4-bit weights), {len(rhythms)} greedy answers of up to {most} tokens"
        " to generated word problems"
    )
    couplings = coupling_report(
        rhythms, shuffles=run.pick(quick=100, full=1000), after=AFTER, lo=LO
    )
    ids = {
        "entropy": "entropy at WAAD peaks",
        "receiver": "receiver and global",
        "coupled": "anchor after preplan",
    }
    for claim, name in ids.items():
        found = couplings[name]
        run.record(
            claim,
            here=round(found.lift, 4),
            holds=found.lift > 0 and found.p < 0.05,
            setting=here,
            note=f"{found.observed:.3f} against {found.chance:.3f} for shuffled peaks, p = {found.p:.4f}",
        )
    chosen = run.pick(quick=2, full=30)
    rows = run.partial(
        "perturbed", lambda: perturb(model, usable[:chosen], rhythms[:chosen], most, run)
    )
    high, low = torch.tensor([r[0] for r in rows]), torch.tensor([r[1] for r in rows])
    differ = high != low
    share = 100 * float((high < low)[differ].double().mean()) if bool(differ.any()) else 0.0
    run.record(
        "perturbed",
        here=round(share, 1),
        setting=f"{here}; {len(rows)} problems, second and third token forced at one place each",
        note=f"mean Jaccard index {float(high.mean()):.3f} at high FAI, {float(low.mean()):.3f} at low FAI;"
        f" {int(differ.sum())} problems differ; sign test p = {sign_test(int((high < low).sum()), int(differ.sum())):.4f}",
    )
    run.figure("rhythm", draw(rhythms[0], model.tokenizer, usable[0]))
    run.figure("couplings", draw_couplings(couplings))


def closed_forms(tokens: int = 64, window: int = 10) -> float:
    """The largest deviation of WAAD and FAI from what previous-token and uniform attention must give."""
    worst = 0.0
    uniform = torch.zeros(1, 1, tokens, 8)
    waad, fai = WAAD(window), FutureInfluence(LO)
    attend(AttentionCall.make(uniform, uniform, uniform), Pipeline([waad, fai]))
    for t, value in enumerate(waad.compute().tensor()[0, 0].tolist()):
        worst = max(worst, abs(value - sum(min(j, window) for j in range(t + 1)) / (t + 1)))
    for s, value in enumerate(fai.compute().tensor()[0, 0].tolist()):
        rows = range(s + LO, tokens)
        exact = sum(1 / (t + 1) for t in rows) / len(rows) if rows else 0.0
        worst = max(worst, abs(value - exact))
    # queries that match only the key before them: one-hot positions, shifted by one
    one_hot = torch.eye(tokens)[None, None] * 1000
    query = one_hot.roll(-1, -1)
    query[..., 0, :] = one_hot[..., 0, :]
    waad, fai = WAAD(window), FutureInfluence(2)
    attend(AttentionCall.make(query, one_hot, one_hot), Pipeline([waad, fai]))
    worst = max(worst, float((waad.compute().tensor()[0, 0, 1:] - 1).abs().max()))
    return max(worst, float(fai.compute().tensor().abs().max()))


def prompt(tokenizer: Any, question: str) -> list[int]:
    """A question in the model's chat template."""
    message = [{"role": "user", "content": f"{question} Explain step by step."}]
    text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def generate(
    model: Any, rows: list[list[int]], most: list[int], batch: int = 15
) -> list[list[int]]:
    """Greedy continuations of ragged rows, at most `most[i]` tokens each, cut at the end-of-text token."""
    end, found = model.tokenizer.eos_token_id, []
    for start in range(0, len(rows), batch):
        held, limits = rows[start : start + batch], most[start : start + batch]
        width = max(map(len, held))
        ids = torch.tensor([[end] * (width - len(row)) + row for row in held])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in held])
        with torch.inference_mode():
            out = model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=max(limits),
                do_sample=False,
                pad_token_id=end,
            )
        for row, limit in zip(out[:, width:].tolist(), limits, strict=True):
            row = row[:limit]
            found.append(row[: row.index(end)] if end in row else row)
    return found


def respond(
    model: Any, prompts: list[list[int]], most: int, run: Run
) -> list[tuple[list[int], int]]:
    """Each prompt with its greedy answer, and where the answer begins."""
    found = []
    for start in run.progress(range(0, len(prompts), 15), "answering"):
        held = prompts[start : start + 15]
        replies = generate(model, held, [most] * len(held))
        found += [(p + reply, len(p)) for p, reply in zip(held, replies, strict=True)]
    return found


def perturb(
    model: Any, answers: list[Answer], rhythms: list[Rhythm], most: int, run: Run
) -> list[tuple[float, float]]:
    """For each answer the mean Jaccard index after a forced token at its highest and at its lowest FAI."""
    cases: list[tuple[int, int, list[int], int]] = []
    for index, (answer, rhythm) in enumerate(zip(answers, rhythms, strict=True)):
        size = len(rhythm.fai)
        inside = rhythm.fai[2 : max(3, size - LO)]
        with torch.inference_mode():
            logits = model(input_ids=answer.ids[None]).logits[0]
        for kind, place in ((0, int(inside.argmax()) + 2), (1, int(inside.argmin()) + 2)):
            at = answer.start + place
            own = int(answer.ids[at])
            options = [t for t in logits[at - 1].topk(3).indices.tolist() if t != own][:2]
            cases += [(index, kind, [*answer.ids[:at].tolist(), token], place) for token in options]
    replies: list[list[int]] = []
    for start in run.progress(range(0, len(cases), 30), "perturbing"):
        held = cases[start : start + 30]
        limits = [max(1, most - place - 1) for *_, place in held]
        replies += generate(model, [row for _, _, row, _ in held], limits, batch=30)
    scores: list[tuple[list[float], list[float]]] = [([], []) for _ in answers]
    decode = model.tokenizer.decode
    for (index, kind, _, place), reply in zip(cases, replies, strict=True):
        answer = answers[index]
        rest = decode(answer.ids[answer.start + place + 1 :].tolist())
        scores[index][kind].append(jaccard(rest, decode(reply)))
    return [(sum(high) / len(high), sum(low) / len(low)) for high, low in scores]


def jaccard(one: str, other: str) -> float:
    """Shared content words (words of three letters or more and numbers, stop words left out) over all of them."""

    def words(text: str) -> set[str]:
        return {w for w in re.findall(r"[a-z]{3,}|\d+", text.lower()) if w not in STOP}

    a, b = words(one), words(other)
    return len(a & b) / len(a | b) if a | b else 1.0


def sign_test(wins: int, total: int) -> float:
    """One-sided binomial p-value of `wins` or more of `total` at even odds."""
    return sum(math.comb(total, k) for k in range(wins, total + 1)) / 2**total if total else 1.0


def draw(rhythm: Rhythm, tokenizer: Any, answer: Answer) -> Figure:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 1, figsize=(9, 3.6), sharex=True, layout="constrained")
    axes[0].plot(rhythm.waad.tolist(), lw=1)
    axes[0].set(
        ylabel="WAAD, tokens",
        title="one answer: local heads look back, later tokens look at anchors",
    )
    axes[1].plot(rhythm.fai.tolist(), lw=1, color="tab:orange")
    axes[1].set(ylabel="FAI", xlabel="token of the answer")
    size = len(rhythm.fai) - LO
    for at in rhythm.fai[:size].topk(min(6, size)).indices.tolist():
        token = (
            tokenizer.decode([int(answer.ids[answer.start + at])]).strip().replace("$", r"\$")
            or "(space)"
        )
        axes[1].annotate(token, (at, float(rhythm.fai[at])), fontsize=7, ha="center", va="bottom")
    return figure


def draw_couplings(couplings: dict[str, Coupling]) -> Figure:
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=(6, 2.2), layout="constrained")
    names = list(couplings)
    ax.barh(names, [100 * couplings[name].lift for name in names])
    ax.axvline(0, color="0.6", lw=0.8)
    ax.set(xlabel="above chance, %")
    return figure
