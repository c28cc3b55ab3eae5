"""The mean output of every head over a reference text: what mean ablation puts in a head's place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from regard._errors import InputError, ModelError
from regard.attach import Session
from regard.engine import AttentionCall
from regard.instruments.base import Instrument, SiteKey
from regard.instruments.observe import token_ids
from regard.pretrained import tokenizer_of

REFERENCE_TOKENS = 1024


class MeanOutput(Instrument):
    """Mean over tokens of each head's output before the output projection, `[heads, dim]` for each site.

    Padding tokens are left out. Cost: one pass over the head outputs, the fused kernel stays; memory O(heads x dim).

    >>> import torch
    >>> from regard.engine import AttentionCall, Pipeline, attend
    >>> mean, x = MeanOutput(), torch.ones(1, 2, 3, 4)
    >>> _ = attend(AttentionCall.make(x, x, x), Pipeline([mean]))
    >>> mean.compute()["", 0].shape, mean.compute()["", 0].mean()
    (torch.Size([2, 4]), tensor(1., dtype=torch.float64))
    """

    states = {"total": "sum", "tokens": "sum"}

    def heads(self, call: AttentionCall, output: Tensor) -> None:
        held = output.detach().double()
        if call.valid is None:
            count = float(held.shape[0] * held.shape[2])
        else:
            held = torch.where(call.valid[:, None, :, None], held, 0)
            count = float(call.valid.sum())
        self.accumulate("total", call.site.key, held.sum((0, 2)).cpu())
        self.accumulate("tokens", call.site.key, torch.tensor(count))

    def compute(self) -> dict[SiteKey, Tensor]:
        """`{(stack, layer): [heads, dim]}` in float64."""
        tokens = self.state["tokens"]
        return {key: total / tokens[key] for key, total in self.state["total"].items()}


def mean_outputs(model: nn.Module, reference: Any = None) -> dict[SiteKey, Tensor]:
    """The mean output of every head of `model` over a reference.

    Args:
        reference: a text, several texts, token ids `[tokens]` or `[batch, tokens]`, or a dict of model inputs; the first 1,024
            tokens of `regard.texts.default_text` when None.

    Raises:
        InputError: there is no reference and the model has no tokenizer to read the default one.

    Cost: one forward pass.
    """
    if reference is None:
        from regard.texts import default_text

        try:
            tokenizer = tokenizer_of(model)
        except ModelError as error:
            raise InputError(
                f"mean ablation needs a reference to average over: give means=text or token ids ({error})"
            ) from error
        reference = default_text(tokenizer, REFERENCE_TOKENS)
    inputs = dict(reference) if isinstance(reference, Mapping) else token_ids(model, reference)
    instrument = MeanOutput()
    with torch.inference_mode(), Session(model, instrument):
        model(**inputs)
    return instrument.compute()
