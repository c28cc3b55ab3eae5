"""What a `LanguageModel` remembers between calls: one state for each layer, in the form that `generate()` carries."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache as TransformersCache

from regard._errors import InputError
from regard.nn.mixer import State


class States(TransformersCache):
    """The states of all mixers of a model, empty at first.

    >>> States(2).memory()
    0
    """

    def __init__(self, layers: int) -> None:
        super().__init__(layers=[])
        self.states: list[State] = [{} for _ in range(layers)]
        self.seen = 0
        self.positions: Tensor | None = None

    def memory(self) -> int:
        """Bytes of all states."""
        return sum(tensor.nbytes for state in self.states for tensor in state.values())

    def get_seq_length(self, layer_idx: int = 0, *args: Any, **kwargs: Any) -> int:
        """Tokens seen, padding included."""
        return self.seen

    def get_max_cache_shape(self, *args: Any, **kwargs: Any) -> int:
        return -1

    @property
    def is_compileable(self) -> bool:
        return False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows in another order, rows repeated or left out (beam search)."""
        for state in self.states:
            for name, tensor in state.items():
                state[name] = tensor.index_select(0, beam_idx.to(tensor.device))
        if self.positions is not None:
            self.positions = self.positions.index_select(0, beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        for state in self.states:
            for name, tensor in state.items():
                state[name] = tensor.repeat_interleave(repeats, 0)
        if self.positions is not None:
            self.positions = self.positions.repeat_interleave(repeats, 0)

    def crop(self, *args: Any, **kwargs: Any) -> None:
        raise InputError(
            "a recurrent state cannot forget its last tokens: assisted generation needs a model whose cache can be cropped"
        )

    def reset(self) -> None:
        self.__init__(len(self.states))

    def step(self, valid: Tensor) -> Tensor:
        """Counts new tokens; returns the position of each, padding not counted, `[batch, tokens]`."""
        counted = valid.long().cumsum(-1)
        start = 0 if self.positions is None else self.positions[:, None]
        self.positions = (start + counted)[:, -1]
        self.seen += valid.shape[1]
        return (start + counted - 1).clamp(min=0)


def positions_of(valid: Tensor) -> Tensor:
    """Positions of tokens without a state, padding not counted, `[batch, tokens]`."""
    return (valid.long().cumsum(-1) - 1).clamp(min=0)


def all_valid(tokens: Tensor) -> Tensor:
    return torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
