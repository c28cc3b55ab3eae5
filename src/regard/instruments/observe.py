"""`regard.observe`: run a text through a model once and read its attention."""

from __future__ import annotations

import inspect
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from regard._errors import InputError
from regard.attach import Session
from regard.attach.equality import check_finite
from regard.instruments.base import HeadMeasure, Instrument
from regard.instruments.distance import WAAD, Distance
from regard.instruments.entropy import Entropy
from regard.instruments.influence import FutureInfluence
from regard.instruments.profile import PatternProfile
from regard.instruments.sinks import SinkMass, Sinks
from regard.pretrained import load, tokenizer_of

if TYPE_CHECKING:
    import polars


def standard_instruments() -> list[Instrument]:
    """Entropy, distance, WAAD, FAI, sinks and pattern shares with their papers' settings."""
    return [Entropy(), Distance(), WAAD(), FutureInfluence(), SinkMass(), Sinks(), PatternProfile()]


@dataclass(slots=True)
class Observation:
    """What the instruments saw: `observation["entropy"]` is a `HeadMeasure`, `observation.instruments` the rest.

    Attributes:
        tokens: the token ids `[batch, tokens]`.
        instruments: the instruments by class name, ready for `compute()`.
        rows: None when every query row was read, else the sampled fraction.
        seconds: wall time of the observed forward pass.
    """

    tokens: Tensor
    instruments: dict[str, Instrument]
    rows: float | None
    seconds: float
    pieces: list[str] = field(default_factory=list)

    def measures(self) -> dict[str, HeadMeasure]:
        found: dict[str, HeadMeasure] = {}
        for instrument in self.instruments.values():
            found.update(instrument.measures())
        return found

    def __getitem__(self, name: str) -> HeadMeasure:
        measures = self.measures()
        if name not in measures:
            raise InputError.of("measure", given=name, expected=f"one of {sorted(measures)}")
        return measures[name]

    def to_frame(self) -> polars.DataFrame:
        """Every per-head number: columns `stack, layer, head, measure, value, error`."""
        import polars

        return polars.concat([measure.to_frame() for measure in self.measures().values()])

    def __repr__(self) -> str:
        batch, tokens = self.tokens.shape
        seen = "every query row" if self.rows is None else f"1 query row in {round(1 / self.rows)}"
        return f"Observation({batch} x {tokens} tokens, {seen}, {self.seconds:.1f} s): {', '.join(self.measures())}"


def token_ids(
    model: nn.Module, text: str | Sequence[str] | Tensor, tokenizer: Any = None
) -> dict[str, Tensor]:
    """`input_ids` and, for a padded batch, `attention_mask` of a text, several texts, or ready token ids.

    Raises:
        InputError: for an empty text, ids of the wrong shape, or more tokens than the model's context.
    """
    if isinstance(text, Tensor):
        ids = text[None] if text.dim() == 1 else text
        if ids.dim() != 2 or ids.numel() == 0 or ids.is_floating_point():
            raise InputError(
                f"token ids must be integers [tokens] or [batch, tokens], got {tuple(text.shape)} {text.dtype}"
            )
        inputs = {"input_ids": ids}
    else:
        texts = [text] if isinstance(text, str) else list(text)
        if not texts or any(not piece.strip() for piece in texts):
            raise InputError("the text is empty; give at least one word")
        tokenizer = tokenizer_of(model, tokenizer)
        if len(texts) > 1 and tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        encoded = tokenizer(texts, return_tensors="pt", padding=len(texts) > 1)
        inputs = {
            name: encoded[name] for name in ("input_ids", "attention_mask") if name in encoded
        }
        if inputs["input_ids"].numel() == 0:
            raise InputError("the text has no tokens; give at least one word")
    limit = context_length(model)
    if limit is not None and inputs["input_ids"].shape[1] > limit:
        raise InputError(
            f"the text has {inputs['input_ids'].shape[1]} tokens, but the model's context is {limit}; cut the text or pass fewer"
        )
    device = next(model.parameters()).device
    return {name: value.to(device) for name, value in inputs.items()}


def context_length(model: nn.Module) -> int | None:
    """The longest input the model's position encoding was made for, when its config says so."""
    config: Any = getattr(model, "config", None)
    for holder in (getattr(config, "get_text_config", lambda: None)(), config):
        for name in ("max_position_embeddings", "n_positions", "max_target_positions"):
            value = getattr(holder, name, None)
            if isinstance(value, int) and value > 0:
                return value
    return None


def observe(
    model: nn.Module | str,
    text: str | Sequence[str] | Tensor,
    *instruments: Instrument,
    tokenizer: Any = None,
    rows: float | None = None,
    seed: int = 0,
) -> Observation:
    """Reads a model's attention on a text, in one forward pass and O(tokens) memory.

    Args:
        model: a live transformers model, or a name or path that `regard.load` takes.
        text: a text, several texts (padded to one batch) or token ids `[batch, tokens]`.
        instruments: what to read; `standard_instruments()` when none is given.
        tokenizer: needed when the model does not say which tokenizer it has.
        rows: None for every query row, or a fraction such as 1/16 (results then carry standard errors).

    Returns:
        an `Observation`; `observation["entropy"]["L5H3"]`, `.to_frame()`.

    Cost: about 1.4 to 1.8 forward passes when exact, 1.1 to 1.2 with `rows=1/16` from 1,024 tokens on (benchmarks in the
    documentation).

    Raises:
        InputError: for an empty or overlong text.
        ModelError: when the model's output is not finite.
        AttachError: when the model's attention cannot be reached.
    """
    subject = load(model) if isinstance(model, str) else model
    chosen = list(instruments) or standard_instruments()
    inputs = token_ids(subject, text, tokenizer)
    arguments = model_inputs(subject, inputs["input_ids"], inputs.get("attention_mask"))
    start = time.perf_counter()
    with torch.inference_mode(), Session(subject, *chosen, rows=rows, seed=seed):
        output = subject(**arguments)
    seconds = time.perf_counter() - start
    check_finite(subject, output)
    pieces: list[str] = []
    if not isinstance(text, Tensor):
        found = tokenizer_of(subject, tokenizer)
        pieces = [found.decode([token]) for token in inputs["input_ids"][0].tolist()]
    named = {type(instrument).__name__: instrument for instrument in chosen}
    return Observation(
        inputs["input_ids"].cpu(),
        named,
        None if rows is None or rows >= 1 else rows,
        seconds,
        pieces,
    )


def model_inputs(
    model: nn.Module, ids: Tensor, attention_mask: Tensor | None = None, *, logits: int = 1
) -> dict[str, Any]:
    """Arguments for one forward pass that reads: no cache, and as few logits as the model lets one ask for.

    An encoder-decoder reads the same tokens on both sides.
    """
    known = inspect.signature(model.forward).parameters
    arguments: dict[str, Any] = {"input_ids": ids}
    if attention_mask is not None:
        arguments["attention_mask"] = attention_mask
    if "decoder_input_ids" in known:
        arguments["decoder_input_ids"] = ids
        if attention_mask is not None and "decoder_attention_mask" in known:
            arguments["decoder_attention_mask"] = attention_mask
    if "logits_to_keep" in known:
        arguments["logits_to_keep"] = logits
    if "use_cache" in known:
        arguments["use_cache"] = False
    return arguments
