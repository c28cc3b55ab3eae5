"""The language model around the mixers that take queries and keys from elsewhere, its hybrids, and the skip test.

    random_qk, fixed_text_qk:  X_0 = noise, or the embeddings of a fixed text;   X_l = layer_l(X_{l-1}), every mixer attending as
                               usual;   layer l of the model makes queries and keys of norm_l(X_{l-1}), values of its own input
    static_qk:                 queries and keys of the embeddings of the input, in every layer

`replaced` names the mixers of a hybrid, in which some layers keep softmax attention; `without_layers` is the skip test, which
asks whether the other layers matter at all.
Source: "Deconstructing Attention" (arXiv 2510.11602).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from regard._errors import InputError
from regard.nn.deconstructed import (
    FixedQKAttention,
    FixedTextQKAttention,
    GivenQKAttention,
    RandomQKAttention,
    StaticQKAttention,
)
from regard.nn.language_model import LanguageModel, LanguageModelConfig
from regard.nn.mixer import Mixer
from regard.nn.states import States


class DeconstructedLanguageModel(LanguageModel):
    """A `LanguageModel` that also knows the mixers `random_qk`, `fixed_text_qk` and `static_qk`.

    For the first two, a second stream (noise, or a fixed text) goes through the same layers, where every mixer attends as usual,
    and its states at each layer give the queries and keys of that layer. In training it runs in every step and is trained with
    the rest; in evaluation it is kept until a parameter changes.

    Args:
        config: as of a `LanguageModel`; `config.fixed_text`, a list of token ids, is the text of `fixed_text_qk`.
            `max_position_embeddings` is the length of the noise.

    What is attached to the model sees the second stream too when it runs; in evaluation, call the model once before.

    Cost: in training one more sequence for each kind of stream.

    Raises:
        InputError: `fixed_text_qk` without a text.

    >>> model = DeconstructedLanguageModel(LanguageModelConfig(hidden_size=32, num_hidden_layers=2, mixers=["random_qk"]))
    >>> model(torch.randint(256, (1, 12))).logits.shape
    torch.Size([1, 12, 256])
    """

    noise: Tensor
    text: Tensor

    def __init__(self, config: LanguageModelConfig) -> None:
        super().__init__(config)
        kinds = {type(mixer) for mixer in self.mixers}
        self.streams = [kind for kind in (RandomQKAttention, FixedTextQKAttention) if kind in kinds]
        if RandomQKAttention in kinds:
            noise = 0.02 * torch.randn(config.max_position_embeddings, config.hidden_size)
            self.register_buffer("noise", noise)
        if FixedTextQKAttention in kinds:
            ids = getattr(config, "fixed_text", None)
            if not ids:
                raise InputError.of(
                    "config.fixed_text", given=ids, expected="the token ids of a text"
                )
            self.register_buffer("text", torch.as_tensor(ids))
        self._held: dict[type[Mixer], tuple[Any, list[Tensor]]] = {}

    def forward(
        self,
        input_ids: Int[Tensor, "batch tokens"],
        attention_mask: Tensor | None = None,
        labels: Int[Tensor, "batch tokens"] | None = None,
        cache: States | None = None,
        past_key_values: States | None = None,
        use_cache: bool | None = None,
        **ignored: Any,
    ) -> Any:
        """As `LanguageModel.forward`."""
        memory = cache if cache is not None else past_key_values
        seen = memory.seen if isinstance(memory, States) else 0
        given = [mixer for mixer in self.mixers if isinstance(mixer, GivenQKAttention)]
        try:
            for kind in self.streams:
                sources = self._stream(kind, seen + input_ids.shape[1])
                for mixer, source in zip(self.mixers, sources, strict=True):
                    if isinstance(mixer, kind):
                        mixer.source = source
            for mixer in given:
                if isinstance(mixer, StaticQKAttention):
                    mixer.source = self.embed_tokens(input_ids)
            return super().forward(
                input_ids,
                attention_mask=attention_mask,
                labels=labels,
                cache=cache,
                past_key_values=past_key_values,
                use_cache=use_cache,
            )
        finally:
            for mixer in given:
                mixer.source = None

    def _stream(self, kind: type[FixedQKAttention], tokens: int) -> list[Tensor]:
        """The normed states of a second stream at every layer, `[positions, width]` each, for at least `tokens` positions."""
        start = self.noise if kind is RandomQKAttention else self.text
        if tokens > len(start):
            raise InputError.of(
                "tokens",
                given=tokens,
                expected=f"at most {len(start)}, the length of the fixed stream",
            )
        if self.training:
            return self._states(start[:tokens])
        version = tuple((p._version, p.data_ptr()) for p in self.parameters())
        held = self._held.get(kind)
        if held is None or held[0] != version or len(held[1][0]) < tokens:
            longer = min(len(start), 1 << (tokens - 1).bit_length())
            with torch.no_grad():
                self._held[kind] = held = (version, self._states(start[:longer]))
        return held[1]

    def _states(self, start: Tensor) -> list[Tensor]:
        hidden = start if start.is_floating_point() else self.embed_tokens(start)
        first, hidden, states = hidden, hidden[None], []
        for block in self.layers:
            normed = block.input_layernorm(hidden)  # type: ignore[union-attr, operator]
            mixer = block.self_attn
            if isinstance(mixer, StaticQKAttention):
                mixer.source = first[None]
            elif isinstance(mixer, FixedQKAttention):
                mixer.source = normed[0]
            states.append(normed[0])
            hidden = block(hidden, None, None)
        return states


Placement = Callable[[int, int], bool]
PLACEMENTS: dict[str, Placement] = {
    "uniform": lambda layer, layers: False,
    "even": lambda layer, layers: layer % 2 == 0,
    "odd": lambda layer, layers: layer % 2 == 1,
    "quarter": lambda layer, layers: layer % 4 == 0,
    "top": lambda layer, layers: layer <= layers // 2,
    "middle": lambda layer, layers: layer <= layers // 4 or layer > layers - layers // 4,
    "bottom": lambda layer, layers: layer > layers - layers // 2,
    "first": lambda layer, layers: layer == 1,
    "last": lambda layer, layers: layer == layers,
    "bilateral": lambda layer, layers: layer in (1, layers),
}
"""Which layers, counted from 1, keep standard attention: the first half ("top"), the first and last quarter ("middle"), ..."""


def replaced(mixer: str, layers: int, placement: str = "even") -> list[str]:
    """The mixers of a model in which `mixer` replaces softmax attention, except where the placement keeps it.

    Raises:
        InputError: an unknown placement.

    >>> replaced("taylor", 4)
    ['taylor', 'softmax', 'taylor', 'softmax']
    """
    if placement not in PLACEMENTS:
        raise InputError.of(
            "placement", given=placement, expected=f"one of {', '.join(PLACEMENTS)}"
        )
    keeps = PLACEMENTS[placement]
    return ["softmax" if keeps(layer, layers) else mixer for layer in range(1, layers + 1)]


def without_layers(model: LanguageModel, layers: Iterable[int]) -> LanguageModel:
    """A copy of the model that lacks some layers (counted from 0); what they wrote to the residual stream is missing.

    Raises:
        InputError: no layer is left.
    """
    gone = set(layers)
    left = [i for i in range(len(model.layers)) if i not in gone]
    if not left:
        raise InputError.of("layers", given=sorted(gone), expected="a part of the model's layers")
    shorter = copy.deepcopy(model)
    shorter.layers = nn.ModuleList(shorter.layers[i] for i in left)
    return shorter
