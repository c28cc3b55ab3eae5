"""Greedy decoding in two parts, so that only the decode steps are observed.

`prefill` runs every prompt but its last token through the model's ordinary fused kernels, nothing attached. The last
prompt token is the first decode step: its row predicts the first new token. Methods attached around `greedy` or
`answer_logprob` therefore see, or change, the decode rows only.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from regard.attach.cache_names import cache_argument, returned_cache


@dataclass
class Prefix:
    """A batch of prompts, read up to their last token.

    Attributes:
        ids: `[batch, tokens]`, padded on the left.
        valid: `[batch, tokens]`, False at padding.
        cache: keys and values of `ids[:, :-1]`.
        padding: padding tokens in front of each prompt.
    """

    ids: Int[Tensor, "batch tokens"]
    valid: Bool[Tensor, "batch tokens"]
    cache: Any
    padding: list[int]

    def rewind(self) -> None:
        """Forgets what was decoded, so that the same prompts can be continued again."""
        extra = self.cache.get_seq_length() - (self.ids.shape[1] - 1)
        if extra:
            self.cache.crop(-extra)


@torch.no_grad()
def prefill(model: Any, prompts: Sequence[Int[Tensor, " _"]], pad: int = 0) -> Prefix:
    """Reads all but the last token of each prompt into a cache.

    Time of one forward pass over the prompts; memory of their keys and values.
    """
    device = next(model.parameters()).device
    longest = max(len(prompt) for prompt in prompts)
    padding = [longest - len(prompt) for prompt in prompts]
    ids = torch.full((len(prompts), longest), pad, dtype=torch.long)
    valid = torch.zeros(len(prompts), longest, dtype=torch.bool)
    for row, (prompt, before) in enumerate(zip(prompts, padding, strict=True)):
        ids[row, before:], valid[row, before:] = prompt, True
    ids, valid = ids.to(device), valid.to(device)
    output = _forward(model, ids[:, :-1], valid[:, :-1], None, keep=1)
    return Prefix(ids, valid, returned_cache(output), padding)


@torch.no_grad()
def greedy(
    model: Any,
    prefix: Prefix,
    stops: Callable[[int], bool],
    *,
    most: int = 50,
    step: Callable[[Int[Tensor, " batch"], Bool[Tensor, " batch"]], None] | None = None,
) -> list[list[int]]:
    """Continues each prompt with its likeliest tokens, until `stops(token)` or `most` tokens.

    Args:
        step: called after every step with the new tokens and a mask of the prompts still going before it.

    Returns:
        The new tokens of each prompt, a stopping one left out.
    """
    answers: list[list[int]] = [[] for _ in prefix.padding]
    going = torch.ones(len(answers), dtype=torch.bool)
    valid, newest, cache = prefix.valid, prefix.ids[:, -1:], prefix.cache
    for _ in range(most):
        output = _forward(model, newest, valid, cache, keep=1)
        tokens = output.logits[:, -1].argmax(-1)
        if step is not None:
            step(tokens.cpu(), going.clone())
        for row, token in enumerate(tokens.tolist()):
            if going[row] and stops(token):
                going[row] = False
            elif going[row]:
                answers[row].append(token)
        if not going.any():
            break
        newest = tokens[:, None]
        valid = torch.cat([valid, torch.ones_like(newest, dtype=torch.bool)], dim=1)
    return answers


@torch.no_grad()
def answer_logprob(
    model: Any,
    prefix: Prefix,
    answers: Sequence[Int[Tensor, "_"]],
    given: Sequence[int] | None = None,
) -> Float[Tensor, " batch"]:
    """Mean log-probability (nats) of the tokens of a given answer to each prompt, in one forward pass.

    `given` is the number of leading tokens of each answer that are not counted (the beginning of a sentence whose end
    is asked for).
    """
    longest = max(len(answer) for answer in answers)
    targets = torch.zeros(len(answers), longest, dtype=torch.long)
    counted = torch.zeros(len(answers), longest, dtype=torch.bool)
    for row, answer in enumerate(answers):
        targets[row, : len(answer)] = answer
        counted[row, given[row] if given else 0 : len(answer)] = True
    device = prefix.ids.device
    targets, counted = targets.to(device), counted.to(device)
    inputs = torch.cat([prefix.ids[:, -1:], targets[:, :-1]], dim=1)
    valid = torch.cat([prefix.valid, torch.ones_like(targets[:, :-1], dtype=torch.bool)], dim=1)
    logits = _forward(model, inputs, valid, prefix.cache, keep=longest).logits[:, -longest:]
    found = logits.float().log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    return ((found * counted).sum(1) / counted.sum(1)).cpu()


def stopper(model: Any, tokenizer: Any) -> Callable[[int], bool]:
    """Whether a token ends an answer: an end-of-text token, or one with a line break in it."""
    ends: set[int] = set()
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    for end in (configured, getattr(tokenizer, "eos_token_id", None)):
        ends.update(end if isinstance(end, list | tuple) else [] if end is None else [end])
    return lambda token: token in ends or "\n" in tokenizer.decode([token])


def batches(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Indices in order of length, so that a batch has little padding, `size` at a time."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    for start in range(0, len(order), size):
        yield order[start : start + size]


def _forward(model: Any, ids: Tensor, valid: Tensor, cache: Any, *, keep: int) -> Any:
    """One forward pass; the mask and the positions are given only where there is padding."""
    accepted = inspect.signature(model.forward).parameters
    inputs: dict[str, Any] = {"input_ids": ids, "use_cache": True}
    if cache is not None:
        inputs[cache_argument(model)] = cache
    if "logits_to_keep" in accepted:
        inputs["logits_to_keep"] = keep
    if not bool(valid.all()):
        inputs["attention_mask"] = valid.long()
        if "position_ids" in accepted:
            positions = (valid.long().cumsum(1) - 1).clamp_min(0)
            inputs["position_ids"] = positions[:, -ids.shape[1] :]
    return model(**inputs)
