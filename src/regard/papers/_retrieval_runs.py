"""Model passes of the retrieval-head experiment: scoring heads, and answering with heads masked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from regard.coordinates import Head
    from regard.papers import Run
    from regard.texts import NeedlePrompt

WIDTH = 9  # heads in a layer of the model
"""Heads are numbered through: head h of layer l is `9 * l + h`."""


def score(model: Any, prompts: Sequence[NeedlePrompt]) -> list[dict[str, Any]]:
    """One row for each prompt: its needle, whether it was answered, and the score of every head (0 if it was not)."""
    from regard.instruments.retrieval import retrieval_heads

    report = retrieval_heads(model, prompts=prompts)
    runs = iter(torch.cat([report.per_run[key] for key in sorted(report.per_run)], dim=1).tolist())
    order = list(dict.fromkeys(p.needle.answer for p in prompts))
    return [
        {
            "needle": order.index(p.needle.answer),
            "answered": one.answered,
            "text": one.text,
            "scores": next(runs) if one.answered else [],
        }
        for p, one in zip(prompts, report.runs, strict=True)
    ]


def copy_scores(model: Any, batch: int, length: int = 40, shown: int = 20, most: int = 12) -> list:
    """Retrieval scores while the model continues a random string whose beginning is repeated; mean over strings."""
    from regard.attach import attach
    from regard.instruments.decoding import greedy, prefill
    from regard.instruments.retrieval import RetrievalHeads
    from regard.texts import Needle, NeedlePrompt, random_tokens

    strings = random_tokens(model.tokenizer, length, batch, seed=1)
    nothing = Needle("", "", "")
    items = [
        NeedlePrompt(torch.cat([x, x[:shown]]), shown, shown + most, nothing, 0.0) for x in strings
    ]
    prefix, heads = prefill(model, [p.ids for p in items]), RetrievalHeads()
    heads.begin(items)
    with attach(model, heads):
        found = greedy(model, prefix, lambda token: False, most=most, step=heads.step)
    right = [
        np.mean([a == b for a, b in zip(y, p.answer_ids.tolist(), strict=True)])
        for y, p in zip(found, items, strict=True)
    ]
    heads.finish([bool(share > 0.5) for share in right])
    return flat(heads.compute()["retrieval"])


def flat(measure: Any) -> list[float]:
    return torch.cat([measure.values[key] for key in sorted(measure.values)]).tolist()


def head_name(index: int) -> Head:
    from regard.coordinates import Head

    return Head(index // WIDTH, index % WIDTH)


def matched(
    chosen: Sequence[int], excluded: set[int], generator: np.random.Generator, layers: int = 30
) -> list[int]:
    """For each chosen head a random one of the same layer (the nearest with one left), none of them excluded."""
    drawn: list[int] = []
    for index in chosen:
        layer = index // WIDTH
        for near in sorted(range(layers), key=lambda other: (abs(other - layer), other)):
            free = sorted({*range(WIDTH * near, WIDTH * (near + 1))} - excluded - {*drawn})
            if free:
                drawn.append(int(generator.choice(free)))
                break
    return drawn


def masking_runs(
    run: Run, model: Any, table: np.ndarray, groups: np.ndarray, needles: int
) -> dict[str, Any]:
    """Answers and log-probabilities under masks; heads come from the needles that are not being answered."""
    from regard.texts import needle_prompts

    counts = run.pick(quick=(5,), full=(1, 2, 5, 10, 20))
    draws, most = run.pick(quick=(1, 10), full=(5, 24))
    length, depths = run.pick(quick=(120, (0.5,)), full=(300, (0.1, 0.6)))
    prompts = needle_prompts(
        model.tokenizer, lengths=(length,), depths=depths, needles=needles, seed=length
    )
    half = needles // 2
    order = list(dict.fromkeys(p.needle.answer for p in prompts))
    first = [p for p in prompts if order.index(p.needle.answer) < half]
    second = [p for p in prompts if order.index(p.needle.answer) >= half]
    rankings = []
    for own in (groups >= half, groups < half):  # the other half ranks the heads
        mean = table[own].mean(0)
        rankings.append((np.argsort(-mean, kind="stable").tolist(), mean))
    variants: dict[str, list[list[int]]] = {"none": [[], []]}
    generator = np.random.default_rng(0)
    for k in counts:
        variants[f"top/{k}"] = [ranking[:k] for ranking, _ in rankings]
        for draw in range(draws):
            variants[f"random/{k}/{draw}"] = [
                matched(
                    ranking[:k], {*ranking[:20], *np.flatnonzero(mean >= 0.1).tolist()}, generator
                )
                for ranking, mean in rankings
            ]
    state: dict[str, Any] = {}
    result = {
        name: run.partial(
            f"mask/{name}", lambda h=heads: masked(model, first + second, h, state=state, most=most)
        )
        for name, heads in run.progress(list(variants.items()), "masking heads")
    }
    ten = counts[-1] if run.quick else 10
    few = [p for p in first + second if p.depth == depths[-1]]
    everywhere = ["none", f"top/{ten}", *(f"random/{ten}/{d}" for d in range(draws))]
    result |= {
        f"all/{name}": run.partial(
            f"mask-all/{name}",
            lambda h=variants[name]: masked(model, few, h, prompt_too=True, most=most),
        )
        for name in run.progress(everywhere, "masking heads in the prompt, too")
    }
    return {"counts": counts, "draws": draws, "ten": ten, "length": length, "runs": result}


def masked(
    model: Any,
    prompts: Sequence[NeedlePrompt],
    heads: Sequence[Sequence[int]],
    *,
    prompt_too: bool = False,
    state: dict[str, Any] | None = None,
    most: int = 24,
) -> dict[str, Any]:
    """What the model answers with `heads[0]` silent for the first half of the prompts and `heads[1]` for the second."""
    from regard.attach import attach
    from regard.instruments.decoding import answer_logprob, greedy, prefill, stopper
    from regard.interventions.heads import ZeroHeads

    state = {} if state is None else state
    silent = ZeroHeads.each([[head_name(index) for index in half] for half in heads])
    if prompt_too:
        with attach(model, silent):
            state["prefix"] = prefill(model, [p.ids for p in prompts])
    elif "prefix" not in state:
        state["prefix"] = prefill(model, [p.ids for p in prompts])
    prefix, tokenizer = state["prefix"], model.tokenizer
    starts = [
        tokenizer(p.needle.statement, add_special_tokens=False, return_tensors="pt").input_ids[0]
        for p in prompts
    ]
    sentences = [torch.cat([s, p.answer_ids]) for s, p in zip(starts, prompts, strict=True)]
    with attach(model, silent):
        logprob = answer_logprob(model, prefix, sentences, given=[len(s) for s in starts])
        prefix.rewind()
        tokens = greedy(model, prefix, stopper(model, tokenizer), most=most)
        prefix.rewind()
    texts = [tokenizer.decode(t, skip_special_tokens=True) for t in tokens]
    recall = [p.recall(text) for p, text in zip(prompts, texts, strict=True)]
    return {"recall": recall, "logprob": logprob.tolist(), "texts": texts}
