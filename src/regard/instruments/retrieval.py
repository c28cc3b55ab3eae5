"""Retrieval heads: heads whose strongest look falls on the very token that the model is copying.

A model answers a question whose answer, the needle, is hidden in a long text. At the decode step that generates token
y, let j be the key on which a head puts its largest weight. The head retrieves at this step when j lies in the answer
span of the needle and the prompt's token at j is y; position j then counts as copied. The score of a run is the share
of the span that a head copied, and a head's score is its mean over the runs that were answered correctly (ROUGE-1
recall above 0.5). Heads with a score of at least 0.1 are called retrieval heads.

Source: Wu et al. 2024, "Retrieval Head Mechanistically Explains Long-Context Factuality", arXiv 2404.15574.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from regard._errors import InputError
from regard.engine import Block
from regard.instruments.base import HeadMeasure, Instrument, SiteKey
from regard.instruments.decoding import batches, greedy, prefill, stopper
from regard.instruments.needles import RetrievalReport, RetrievalRun

if TYPE_CHECKING:
    from regard.texts import NeedlePrompt


def copies(
    peaks: Int[Tensor, "steps heads"],
    generated: Int[Tensor, " steps"],
    answer: Int[Tensor, " answer"],
    start: int,
) -> Bool[Tensor, "steps heads"]:
    """At which steps a head's strongest key `peaks` is an answer token equal to the token generated at that step.

    `answer` are the prompt's tokens from position `start` on.

    >>> copies(torch.tensor([[4], [9]]), torch.tensor([70, 71]), torch.tensor([70, 71]), 4).flatten()
    tensor([ True, False])
    """
    place = peaks - start
    inside = (place >= 0) & (place < len(answer))
    return inside & (answer[place.clamp(0, len(answer) - 1)] == generated[:, None])


def distinct_share(
    events: Bool[Tensor, "steps heads"], places: Int[Tensor, "steps heads"], size: int
) -> Float[Tensor, " heads"]:
    """The share of the `size` answer positions that a head copied at least once (the paper's score of a run)."""
    hit = torch.zeros(events.shape[1], size)
    step, head = events.nonzero(as_tuple=True)
    hit[head, places[step, head]] = 1
    return hit.mean(1)


def event_share(
    events: Bool[Tensor, "steps heads"], places: Int[Tensor, "steps heads"], size: int
) -> Float[Tensor, " heads"]:
    """Copying steps over the answer's length, repeats counted again (the score of the paper's released code)."""
    return events.float().sum(0) / size


def rotated_share(
    peaks: Int[Tensor, "steps heads"],
    generated: Int[Tensor, " steps"],
    answer: Int[Tensor, " answer"],
    start: int,
    count: Any = distinct_share,
) -> Float[Tensor, " heads"]:
    """The score by chance: the mean over all rotations of the answer's tokens except the true one.

    A head that looks into the answer without minding which token it is scores the same here; 0 for a one-token answer.
    """
    total = torch.zeros(peaks.shape[1])
    for turn in range(1, len(answer)):
        total += count(
            copies(peaks, generated, answer.roll(turn), start), peaks - start, len(answer)
        )
    return total / max(1, len(answer) - 1)


def soft_share(
    weights: Float[Tensor, "steps heads answer"],
    generated: Int[Tensor, " steps"],
    answer: Int[Tensor, " answer"],
) -> Float[Tensor, " heads"]:
    """Attention on answer tokens equal to the generated one, mean over the steps that generate an answer token."""
    same = answer == generated[:, None]
    steps = same.any(1)
    if not steps.any():
        return torch.zeros(weights.shape[1])
    return (weights * same[:, None]).sum(-1)[steps].mean(0)


COUNTS = {"set": distinct_share, "events": event_share}


class RetrievalHeads(Instrument):
    """Scores heads while needle prompts are being answered; reads decode rows only.

    Attach it around the decode steps, after an ordinary prefill: `begin(prompts)`, then `step(tokens, going)` after each
    decode step, then `finish(answered)`. `retrieval_heads` does all of it.

    Args:
        count: "set" for the share of answer positions copied, "events" to count repeated copies again.

    Cost: an argmax over one row of weights for each head and step; memory O(steps x heads x answer).
    """

    states: ClassVar[dict[str, str]] = {"score": "list", "soft": "list", "chance": "list"}
    names: ClassVar[dict[str, tuple[str, str]]] = {
        "retrieval": (
            "score",
            "share of the needle's answer tokens copied by the head, mean over answered runs",
        ),
        "retrieval_soft": (
            "soft",
            "attention on the answer token being generated, mean over its steps and answered runs",
        ),
        "retrieval_chance": (
            "chance",
            "retrieval score against the needle with its answer tokens rotated, mean over rotations",
        ),
        "retrieval_activation": ("score", "share of answered runs in which the head copied"),
    }

    def __init__(self, count: str = "set") -> None:
        super().__init__()
        if count not in COUNTS:
            raise InputError.of("count", given=count, expected="'set' or 'events'")
        self.count = count
        self._prompts: Sequence[NeedlePrompt] = ()
        self._sizes: dict[SiteKey, int] = {}

    def begin(self, prompts: Sequence[NeedlePrompt], padding: Sequence[int] | None = None) -> None:
        """Names the prompts of the batch whose decoding follows, with the padding in front of each."""
        self._prompts = prompts
        self._padding = list(padding) if padding is not None else [0] * len(prompts)
        self._tokens = len(prompts[0].ids) + self._padding[0]  # key slots at the first decode step
        ends = [p.end - p.start for p in prompts]
        spans = torch.arange(max(ends)).expand(len(prompts), -1)
        starts = [p.start + pad for p, pad in zip(prompts, self._padding, strict=True)]
        self._spans = spans + torch.tensor(starts)[:, None]
        self._peaks: dict[SiteKey, list[Tensor]] = {}
        self._weights: dict[SiteKey, list[Tensor]] = {}
        self._generated: list[Tensor] = []
        self._going: list[Tensor] = []

    def weights(self, block: Block) -> None:
        call = block.call
        if not self._prompts or call.queries != 1 or call.site.kind != "self" or call.site.stack:
            return
        # A sliding-window cache has dropped its oldest keys; slots count from the first token.
        first = block.keys.start + max(0, self._tokens - call.keys)
        rows = block.weights[:, :, 0]
        span = (self._spans.to(rows.device) - first)[:, None].expand(-1, rows.shape[1], -1)
        seen = (span >= 0) & (span < rows.shape[-1])
        held = rows.gather(-1, span.clamp(0, rows.shape[-1] - 1)) * seen
        self._peaks.setdefault(block.site.key, []).append((rows.argmax(-1) + first).cpu())
        self._weights.setdefault(block.site.key, []).append(held.float().cpu())

    def step(self, tokens: Int[Tensor, " batch"], going: Bool[Tensor, " batch"]) -> None:
        """The tokens that the step generated, and which prompts were still being answered."""
        self._generated.append(tokens)
        self._going.append(going)
        self._tokens += 1

    def finish(self, answered: Iterable[bool]) -> None:
        """Scores the batch; runs that were not answered are left out."""
        generated, going = torch.stack(self._generated), torch.stack(self._going)
        count, right = COUNTS[self.count], [row for row, yes in enumerate(answered) if yes]
        for key in self._peaks:
            peaks, weights = torch.stack(self._peaks[key]), torch.stack(self._weights[key])
            for name in self.states:
                self.state[name].setdefault(key, [])
            self._sizes[key] = peaks.shape[2]
            for row in right:
                prompt, steps = self._prompts[row], going[:, row]
                start = prompt.start + self._padding[row]
                tokens, answer = generated[steps, row], prompt.answer_ids
                looked, mass = peaks[steps, row], weights[steps, row, :, : len(answer)]
                events = copies(looked, tokens, answer, start)
                self.accumulate("score", key, [count(events, looked - start, len(answer))])
                self.accumulate(
                    "chance", key, [rotated_share(looked, tokens, answer, start, count)]
                )
                self.accumulate("soft", key, [soft_share(mass, tokens, answer)])
        self._prompts = ()

    def runs(self) -> dict[SiteKey, Float[Tensor, "runs heads"]]:
        """The score of every answered run."""
        found = self.state["score"].items()
        return {k: torch.stack(v) if v else torch.empty(0, self._sizes[k]) for k, v in found}

    def compute(self) -> dict[str, HeadMeasure]:
        """`retrieval`, `retrieval_soft`, `retrieval_chance` and `retrieval_activation`; NaN without an answered run."""
        result = {}
        for name, (state, definition) in self.names.items():
            measure = HeadMeasure(name, "share", {}, {}, definition)
            for key, runs in self.state[state].items():
                table = torch.stack(runs) if runs else torch.full((1, self._sizes[key]), torch.nan)
                if name == "retrieval_activation" and runs:
                    table = (table > 0).float()
                measure.values[key] = table.mean(0)
            result[name] = measure
        return result


def retrieval_heads(
    model: Any,
    tokenizer: Any = None,
    *,
    prompts: Sequence[NeedlePrompt] | None = None,
    lengths: Iterable[int] = (300,),
    depths: Iterable[float] = (0.2, 0.5, 0.8),
    needles: int = 3,
    count: str = "set",
    most: int = 50,
    batch: int = 10,
    seed: int = 0,
) -> RetrievalReport:
    """Finds a causal language model's retrieval heads by the needle-in-a-haystack task.

    Args:
        model: a causal language model.
        tokenizer: by default the model's own.
        prompts: needle prompts of your own (`regard.texts.needle_prompts`), instead of the four settings that follow.
        lengths: tokens in a prompt.
        depths: where the needle lies, 0 (start) to 1 (end).
        needles: how many of the built-in needles.
        count: "set" (the paper) or "events" (its released code; repeated copies count again).
        most: tokens decoded for an answer; an answer also ends at a line break or an end-of-text token.
        batch: prompts decoded together.
        seed: of the haystacks.

    Returns:
        Scores, activation frequency, soft scores, the chance baseline and every run.

    Raises:
        InputError: a model that does not generate text with a cache.

    Cost: one ordinary forward pass over all prompts, plus the decoding of the answers (about 20 s for SmolLM2 on two
    cores at the default 9 prompts of 300 tokens). No attention is read during the prefill.

    >>> import regard  # doctest: +SKIP
    >>> print(retrieval_heads(regard.load("smollm2")).sentence())  # doctest: +SKIP
    """
    from regard._progress import progress
    from regard.attach import attach
    from regard.pretrained import tokenizer_of
    from regard.texts import needle_prompts

    if not hasattr(model, "generate") or getattr(model.config, "is_encoder_decoder", False):
        raise InputError(
            f"retrieval heads need a causal language model, got {type(model).__name__}"
        )
    tokenizer = tokenizer_of(model, tokenizer)
    if prompts is None:
        prompts = needle_prompts(
            tokenizer, lengths=lengths, depths=depths, needles=needles, seed=seed
        )
    instrument, runs = RetrievalHeads(count), dict[int, RetrievalRun]()
    stops = stopper(model, tokenizer)
    with progress(float(len(prompts)), "Needle prompts") as advance:
        for chosen in batches([len(p.ids) for p in prompts], batch):
            held = [prompts[i] for i in chosen]
            prefix = prefill(model, [p.ids for p in held], tokenizer.pad_token_id or 0)
            instrument.begin(held, prefix.padding)
            with attach(model, instrument):
                answers = greedy(model, prefix, stops, most=most, step=instrument.step)
            texts = [tokenizer.decode(answer, skip_special_tokens=True) for answer in answers]
            for index, prompt, text in zip(chosen, held, texts, strict=True):
                runs[index] = RetrievalRun.of(prompt, text)
            instrument.finish([runs[i].answered for i in chosen])
            advance(float(len(chosen)))
    found = instrument.compute()
    return RetrievalReport(
        scores=found["retrieval"],
        activation=found["retrieval_activation"],
        soft=found["retrieval_soft"],
        chance=found["retrieval_chance"],
        runs=[runs[i] for i in sorted(runs)],
        per_run=instrument.runs(),
        count=count,
    )
