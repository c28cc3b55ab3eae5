"""A scorer ranks what a cache holds: one number for each held key of each KV head, higher = keep.

A scorer is a frozen dataclass of hyper-parameters. What it learns while the model runs lives on the layer it is asked
about, in two places:

* `layer.slots[name]`, `[batch, kv_heads, held]`: a number for every held key. Declared in `Scorer.slots` with the value
  that a new key starts with; the layer appends, moves and drops it together with its key.
* `layer.memory[name]`, `[batch, ...]`: anything else (the last queries, running means). It follows the batch in beam search,
  and is saved with the cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from jaxtyping import Float
from torch import Tensor

if TYPE_CHECKING:
    from regard.cache.layer import Layer
    from regard.engine import AttentionCall


@dataclass(frozen=True)
class Scorer:
    """Base of all scorers: override `score`, and `watch` when the score needs to see queries.

    Attributes:
        slots: statistics that ride with the keys, by name, with the value that a new key starts with.
        window: the newest tokens of each row, kept before all others but the sinks (a subclass may make it a field).
        recent: share of each head's slots that is kept for its newest tokens, when that is more than the window.
    """

    slots: ClassVar[Mapping[str, float]] = {}
    window: int = 0
    recent: float = 0.0

    @property
    def watches(self) -> bool:
        """Whether the scorer looks at attention calls at all."""
        return type(self).watch is not Scorer.watch

    def watch(self, call: AttentionCall, layer: Layer) -> None:
        """Sees an attention call once its output is known, in prefill, in each chunk and in each decoding step.

        `call.query` is `[batch, heads, queries, dim]` after position embedding; `call.key` and `call.value` are
        `layer.keys` and `layer.values`, the new tokens included as the last slots; `call.valid` `[batch, queries]` is
        False at padding queries (None without padding); `call.mask` hides what is padding, future or out of the window.
        """

    def score(self, layer: Layer) -> Float[Tensor, "batch kv_heads held"]:
        """The worth of every held slot. What is said about padding, sinks and the window is ignored."""
        raise NotImplementedError(f"{type(self).__name__} has no score")
