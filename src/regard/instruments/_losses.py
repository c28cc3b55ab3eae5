"""The loss of every token of a language model, without holding the logits of all tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from regard._errors import InputError
from regard.instruments.observe import context_length, token_ids

CHUNK = 128  # tokens whose logits are held at a time


def evaluation_inputs(model: nn.Module, text: Any, window: int = 512) -> dict[str, Tensor]:
    """Model inputs of a text to measure the loss on.

    A text or a row of token ids that is longer than `window` is cut into windows of that length (the remainder is dropped), which
    become the rows of a batch. Several texts, a batch of ids and a dict of inputs are taken as they are.
    """
    if isinstance(text, Mapping):
        inputs = {name: value for name, value in text.items() if isinstance(value, Tensor)}
    else:
        single = isinstance(text, str) or (isinstance(text, Tensor) and text.dim() == 1)
        ids = _one_row(model, text) if single else None
        window = min(window, context_length(model) or window)
        if ids is not None and ids.shape[1] > window:
            text = ids[0, : ids.shape[1] // window * window].view(-1, window)
        inputs = token_ids(model, text)
    if targets_of(inputs).shape[1] < 2:
        raise InputError(
            "the text has one token, so there is nothing to predict; give a longer text"
        )
    return inputs


def _one_row(model: nn.Module, text: Any) -> Tensor:
    if isinstance(text, Tensor):
        return text[None]
    from regard.pretrained import tokenizer_of

    encoded = tokenizer_of(model)(text, return_tensors="pt", verbose=False)
    return encoded["input_ids"]


def targets_of(inputs: Mapping[str, Tensor]) -> Int[Tensor, "batch tokens"]:
    """The tokens that are predicted: `decoder_input_ids`, else `input_ids`; -100 at padding."""
    prefix = "decoder_" if "decoder_input_ids" in inputs else ""
    if f"{prefix}input_ids" not in inputs:
        raise InputError.of("inputs", given=sorted(inputs), expected="a dict with input_ids")
    ids, mask = inputs[f"{prefix}input_ids"], inputs.get(f"{prefix}attention_mask")
    return ids if mask is None else ids.masked_fill(mask == 0, -100)


def surprise(
    logits: Float[Tensor, "*tokens vocabulary"], targets: Int[Tensor, "*tokens"]
) -> Float[Tensor, "*tokens"]:
    """`-log p(target)` in nats; NaN where the target is negative.

    >>> surprise(torch.zeros(2, 4), torch.tensor([1, -100]))
    tensor([1.3863,    nan])
    """
    if logits.dtype not in (torch.float32, torch.float64):
        logits = logits.float()
    picked = logits.gather(-1, targets.clamp_min(0)[..., None])[..., 0]
    return (logits.logsumexp(-1) - picked).masked_fill(targets < 0, float("nan"))


def next_tokens(targets: Int[Tensor, "batch tokens"], rows: int) -> Int[Tensor, "rows next"]:
    """What each token but the last should predict, once for each copy of the batch in `rows`; -100 where either is padding."""
    wanted = targets[:, 1:].masked_fill(targets[:, :-1] < 0, -100)
    return wanted.repeat(rows // targets.shape[0], 1)


@contextmanager
def streamed_losses(
    model: nn.Module, targets: Int[Tensor, "batch tokens"]
) -> Iterator[list[Tensor]]:
    """While open, the output layer turns chunks of tokens into losses at once and the model's logits are a stub.

    Yields a list that receives `[rows, tokens - 1]` at each forward pass.
    """
    layer = output_layer(model)
    if layer is None:
        raise InputError(f"{type(model).__name__} does not say which layer makes its logits")
    kept, original = vars(layer).get("forward"), layer.forward
    found: list[Tensor] = []

    def forward(hidden: Tensor) -> Tensor:
        rows, tokens, width = hidden.shape
        wanted = next_tokens(targets, rows).reshape(-1)
        states = hidden[:, :-1].reshape(-1, width)
        size = CHUNK
        parts = [
            surprise(original(states[start : start + size]), wanted[start : start + size])
            for start in range(0, len(wanted), size)
        ]
        found.append(torch.cat(parts).view(rows, tokens - 1))
        return hidden[..., :1]

    layer.forward = forward
    try:
        yield found
    finally:
        if kept is None:
            del layer.forward
        else:
            layer.forward = kept


def output_layer(model: nn.Module) -> nn.Module | None:
    """The layer that makes logits of the last states, when the model says which one it is."""
    find = getattr(model, "get_output_embeddings", None)
    layer = find() if find is not None else None
    return layer if isinstance(layer, nn.Module) else None
