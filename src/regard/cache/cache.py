"""The cache: a transformers `Cache` made of a scorer, a budget rule and a store.

    cache = regard.cache.Cache(model, scorer=KeyNorm(), budget=0.2)
    model.generate(**inputs, past_key_values=cache)
    cache.memory(), cache.kept(layer=3, head=0)

Evicting changes what later tokens see, never the tokens that were there: a prompt's own states come from all of it (or, when it
is fed in chunks, from what was kept of the chunks before). Everything that a cache knows is on the cache; the model only
runs regard's attention function while a cache of its lives, and is as before when the last one is closed or collected.
"""

from __future__ import annotations

import copy
import os
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from transformers import Cache as TransformersCache
from transformers.cache_utils import CacheLayerMixin

from regard._errors import InputError
from regard.attach.cache_names import cache_argument, given_cache, takes
from regard.attach.hold import hold
from regard.cache.budget import Budget
from regard.cache.eviction import evict
from regard.cache.layer import Layer
from regard.cache.models import make_layers
from regard.cache.scorer import Scorer
from regard.cache.seam import Tag
from regard.cache.store import Ragged
from regard.engine import AttentionCall


class Cache(TransformersCache):
    """Keys and values of one conversation (or batch of conversations) with one model, kept within a budget.

    Prompts are evicted from when a layer has seen them (after each chunk, when fed in chunks); generated tokens too if
    `every` is set. Sinks and the scorer's window are kept before anything else, padding is never kept. Positions stay those
    of the text, so later turns go on where the text ended.

    Args:
        model: the model that will be run with this cache.
        scorer: ranks the held keys; None keeps everything.
        budget: a rule, or a size for the even rule: a fraction of the tokens seen (0.2), tokens per KV head (512) or
            bytes ("64MB").
        store: how held keys lie in memory (`Ragged()` unless given).
        every: also evict while decoding, at every step (1) or every n steps; None keeps all generated tokens.
        sinks: first tokens of each row that are kept in any case.
        chunk: tokens per chunk of `prefill`, None for the whole prompt at once.

    Raises:
        InputError: a budget out of range, or a model without a KV cache.
        AttachError: a model whose attention cannot be reached.

    Cost: appending is amortised O(1) a token and head; an eviction is one sort of the scores and one copy of what is kept.
    """

    state: tuple[str, ...] = ()
    """Attributes of a subclass that a saved cache keeps beside its policy (plain JSON values)."""

    def __init__(
        self,
        model: nn.Module,
        scorer: Scorer | None = None,
        budget: Budget | float | int | str | None = None,
        store: Any = None,
        *,
        every: int | None = None,
        sinks: int = 4,
        chunk: int | None = None,
    ) -> None:
        if (scorer is None) != (budget is None):
            raise InputError(
                "scorer and budget belong together: give both, or neither to keep everything (regard.cache.Full)"
            )
        if scorer is not None and not isinstance(scorer, Scorer):
            raise InputError.of(
                "scorer", given=scorer, expected="an instance of regard.cache.Scorer"
            )
        for name, value, least in (("every", every, 1), ("sinks", sinks, 0), ("chunk", chunk, 1)):
            if value is not None and (not isinstance(value, int) or value < least):
                raise InputError.of(name, given=value, expected=f"a whole number >= {least}")
        self.scorer = scorer
        self.budget = as_rule(budget)
        self.store = store or Ragged()
        self.every, self.sinks, self.chunk = every, sinks, chunk
        self.argument = cache_argument(model)
        slots = scorer.slots if scorer else {}
        layers, self.shares = make_layers(model, self.store, slots, evicts=scorer is not None)
        self._begin()
        super().__init__(layers=layers)
        self._open(model)

    def _begin(self) -> None:
        self.tokens: Tensor | None = None
        self._depth = self._updates = 0
        self._tag: Tag | None = None
        self._mask: Tensor | None = None
        self._ids: Tensor | None = None
        self._waiting: list[tuple[Layer, Tensor | None, int]] = []
        self._paused = self._broken = False

    def _open(self, model: nn.Module) -> None:
        self.model: nn.Module = model
        release = hold(model)
        self._release = weakref.finalize(self, release)
        self._release.atexit = False

    # life

    def close(self) -> None:
        """Lets the model go; what is held can still be read and saved. Safe to call twice."""
        self._release()

    @property
    def closed(self) -> bool:
        return not self._release.alive

    def __enter__(self) -> Cache:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        parts = [type(self.model).__name__]
        parts += [repr(part) for part in (self.scorer, self.budget) if part is not None]
        return (
            f"{type(self).__name__}({', '.join(parts)}; {self.get_seq_length()} tokens seen, "
            f"{self.memory() / 1e6:.1f} MB{', closed' if self.closed else ''})"
        )

    def branch(self) -> Cache:
        """An independent copy, to ask another question of the same text."""
        self._check_open()
        twin = copy.copy(self)
        twin._begin()
        twin.tokens = None if self.tokens is None else self.tokens.clone()
        twin.layers = [
            layer.copy() if isinstance(layer, Layer) else copy.deepcopy(layer)
            for layer in self.layers
        ]
        twin._open(self.model)
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> Cache:
        return self.branch()

    def _check_open(self) -> None:
        if self.closed:
            raise InputError("this cache is closed and can no longer be used to run its model")

    # what is held

    @property
    def held(self) -> list[Layer]:
        """The layers that hold keys of their own, in the model's order."""
        return [layer for layer in self.layers if isinstance(layer, Layer)]

    @property
    def is_linear(self) -> list[bool]:
        """Which layers hold a recurrent state and no keys; transformers 5.23 counts those that hold both among them."""
        return [not isinstance(layer, CacheLayerMixin) for layer in self.layers]

    def memory(self) -> int:
        """Bytes held now, by the size of the buffers: free slots, positions and the scorer's statistics included."""
        total = 0
        for layer in self.layers:
            if isinstance(layer, Layer):
                total += layer.nbytes
            else:
                total += sum(tensor.nbytes for tensor in _tensors(vars(layer)))
        return total

    def kept(self, layer: int, head: int, row: int = 0) -> Int[Tensor, "kept"]:
        """Positions of the tokens that one KV head still holds, ascending: columns of the input as it was given."""
        try:
            found = self.layers[layer]
        except IndexError:
            raise InputError.of(
                "layer", given=layer, expected=f"below {len(self.layers)}"
            ) from None
        if not isinstance(found, Layer):
            raise InputError(f"layer {layer} ({type(found).__name__}) holds no keys of its own")
        if found.rows is None:
            return torch.zeros(0, dtype=torch.int32)
        for name, value, size in (("head", head, found.rows.heads), ("row", row, found.rows.batch)):
            if not -size <= value < size:
                raise InputError.of(name, given=value, expected=f"below {size}")
        return found.positions[row, head][found.rows.filled[row, head]].clone()

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes the cache to a safetensors file, for `regard.cache.load(path, model)`; see `regard.cache.files`."""
        from regard.cache.files import save

        return save(self, path)

    # the model's side

    def entering(self, arguments: dict[str, Any]) -> None:
        """The model is called with this cache (`regard.attach.hold`)."""
        self._depth += 1
        if self._depth > 1:
            return
        self._updates = 0
        self._enter(arguments)

    def _enter(self, arguments: dict[str, Any]) -> None:
        self._check_open()
        if self._broken:
            raise InputError(
                "an earlier call of the model failed half-way, so layers have seen different numbers of tokens; "
                "call cache.reset() and start again"
            )
        self._tag, self._waiting = None, []
        decoder = arguments.get("decoder_attention_mask")
        encodes = getattr(getattr(self.model, "config", None), "is_encoder_decoder", False)
        if encodes and given_cache(arguments) is self:
            raise InputError(
                f"{type(self.model).__name__} has an encoder, whose keys need a cache of their own: pass "
                "transformers.EncoderDecoderCache(cache, DynamicCache())"
            )
        mask = decoder if encodes else arguments.get("attention_mask")
        self._mask = mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None
        self._ids = arguments.get("decoder_input_ids" if encodes else "input_ids")

    def leaving(self, failed: bool) -> None:
        """The call is over."""
        self._depth -= 1
        if self._depth > 0:
            return
        ids, self._ids, self._mask = self._ids, None, None
        if failed:
            self._tag, self._waiting, self._broken = None, [], self._updates > 0
            return
        self._finish_tag()
        for layer, valid, tokens in self._waiting:
            self._settle(layer, valid, tokens)
        self._waiting = []
        if self._updates == 0:
            raise InputError(
                f"{type(self.model).__name__} ran without using the cache it was given: it has no KV cache in this configuration"
            )
        self._remember(ids)

    def _remember(self, ids: Tensor | None) -> None:
        """Token ids of all that was seen, as long as every call came with ids."""
        before = 0 if self.tokens is None else self.tokens.shape[1]
        if ids is not None and before + ids.shape[1] == self.get_seq_length():
            new = ids.detach().to("cpu", torch.long)
            self.tokens = new.clone() if self.tokens is None else torch.cat([self.tokens, new], 1)

    def given_valid(self, tokens: int) -> Bool[Tensor, "batch tokens"] | None:
        """Which of the newest tokens the model's own padding mask calls real; None when all are."""
        if self._mask is None:
            return None
        seen = self.get_seq_length()
        valid = self._mask[:, seen - tokens : seen]
        return None if valid.shape[1] != tokens or bool(valid.all()) else valid

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Called by the model's attention layers with their new keys and values `[batch, kv_heads, tokens, dim]`."""
        if self._depth == 0:
            self._check_open()
            raise InputError(
                f"this cache belongs to a {type(self.model).__name__} and was given to another model (or to a bare attention "
                "layer); make one cache for each model"
            )
        if key_states.requires_grad and self.model.training:
            raise InputError(
                "no gradient flows through a cache; train without one (use_cache=False)"
            )
        self._finish_tag()
        self._updates += 1
        layer: Any = self.layers[layer_idx]
        if not isinstance(layer, Layer):
            return layer.update(key_states, value_states, *args, **kwargs)
        keys, values = layer.update(key_states, value_states)
        tag: Any = Tag(self, layer, key_states.shape[2])
        keys.held = values.held = self._tag = tag  # type: ignore[attr-defined]
        return keys, values

    def _finish_tag(self) -> None:
        """What the last update gave must have reached attention by now, unless it was the plain tensors anyway."""
        tag, self._tag = self._tag, None
        if tag is None or not tag.open:
            return
        tag.lost("keys")
        tag.open = False
        self._settle(tag.layer, None, tag.tokens)

    def watching(self, decoding: bool) -> bool:
        """Whether the scorer wants to see the call."""
        return (
            self.scorer is not None
            and self.scorer.watches
            and not (decoding and self.every is None)
        )

    def attended(
        self, layer: Layer, call: AttentionCall | None, valid: Tensor | None, tokens: int
    ) -> None:
        """A layer's attention is done: the scorer sees it, padding goes, and the budget is kept."""
        self._tag = None
        if call is not None and self.scorer is not None and self.watching(decoding=tokens == 1):
            with torch.no_grad():
                self.scorer.watch(call, layer)
        if self.shares:
            self._waiting.append((layer, valid, tokens))
        else:
            self._settle(layer, valid, tokens)

    def _settle(self, layer: Layer, valid: Tensor | None, tokens: int) -> None:
        layer.settle(valid, tokens)
        self._keep_budget(layer, tokens)
        layer.rows.rest()

    def _keep_budget(self, layer: Layer, tokens: int) -> None:
        if self.budget is None or self._paused:
            return
        decoding = tokens == 1
        if decoding:
            layer.steps += 1
            if self.every is None or layer.steps % self.every:
                return
        if self.budget.scope == "layer" or (decoding and self.budget.scope == "cascade"):
            self._evict([layer], decoding)
        elif self.budget.scope == "cascade":
            self._evict([one for one in self.held if one.index <= layer.index], decoding)
        elif layer is self.held[-1]:
            self._evict(self.held, decoding)

    # eviction

    @contextmanager
    def paused(self) -> Iterator[Cache]:
        """Nothing is evicted inside; the scorer goes on watching."""
        before, self._paused = self._paused, True
        try:
            yield self
        finally:
            self._paused = before

    def compress(self) -> None:
        """Evicts now what is over the budget."""
        if self.budget is None:
            raise InputError(
                "this cache has no budget; make one with regard.cache.Cache(model, scorer, budget)"
            )
        if self.budget.scope == "layer":
            for layer in self.held:
                self._evict([layer], False)
        else:
            self._evict(self.held, False)

    @torch.no_grad()
    def _evict(self, layers: Sequence[Layer], decoding: bool) -> None:
        assert self.scorer is not None and self.budget is not None
        evict(layers, self.scorer, self.budget, self.sinks, self.held, decoding)

    # prefill

    @torch.no_grad()
    def prefill(
        self,
        input_ids: Int[Tensor, "batch tokens"],
        attention_mask: Tensor | None = None,
        chunk: int | None = None,
        **arguments: Any,
    ) -> Any:
        """Reads a text into the cache and returns the model's output for its last chunk (logits of the last token only).

        With `chunk`, the cache evicts after each chunk, so that memory stays within the budget plus one chunk however long
        the text is; the states of a chunk then come from what was kept of the earlier ones, which is not the same as
        evicting once at the end.

        Args:
            input_ids: the new tokens.
            attention_mask: padding of everything seen and new, `[batch, seen + tokens]`.
            chunk: tokens per chunk; the cache's own setting unless given.
            arguments: further arguments for the model.
        """
        size = chunk or self.chunk or input_ids.shape[1]
        if size < 1:
            raise InputError.of("chunk", given=chunk, expected="a whole number >= 1")
        start, output = self.get_seq_length(), None
        if attention_mask is not None and attention_mask.shape[1] != start + input_ids.shape[1]:
            raise InputError(
                f"attention_mask must cover the {start} tokens seen and the {input_ids.shape[1]} new ones, "
                f"got {attention_mask.shape[1]} columns"
            )
        if takes(self.model, "logits_to_keep"):
            arguments.setdefault("logits_to_keep", 1)
        arguments |= {self.argument: self, "use_cache": True}
        positions = None
        if attention_mask is not None and takes(self.model, "position_ids"):
            positions = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, start:]
        for at in range(0, input_ids.shape[1], size):
            part = slice(at, min(at + size, input_ids.shape[1]))
            if attention_mask is not None:
                arguments["attention_mask"] = attention_mask[:, : start + part.stop]
            if positions is not None:
                arguments["position_ids"] = positions[:, part]
            output = None  # frees the logits of the chunk before
            output = self.model(input_ids[:, part], **arguments)
        return output

    # transformers' operations

    def crop(self, tokens_to_remove: int) -> None:
        """Takes back the newest `-n` tokens (for n > 0: all but the first n). What was evicted before stays evicted."""
        super().crop(tokens_to_remove)
        if self.tokens is not None:
            self.tokens = self.tokens[:, : self.get_seq_length()]

    def reset(self) -> None:
        """Forgets everything; the cache can be used for another text."""
        super().reset()
        self._begin()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]
        if self.tokens is not None:
            self.tokens = self.tokens[beam_idx.cpu()]

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        if self.tokens is not None:
            self.tokens = self.tokens[indices.cpu()]

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        if self.tokens is not None:
            self.tokens = self.tokens.repeat_interleave(repeats, 0)


class Full(Cache):
    """Keeps everything: growing buffers instead of a copy of the cache at every token, and grouped heads read once.

    The same numbers as transformers' `DynamicCache`, faster; what a compressed cache should be compared with.
    """

    def __init__(self, model: nn.Module, store: Any = None) -> None:
        super().__init__(model, store=store)


def as_rule(budget: Budget | float | int | str | None) -> Budget | None:
    """A budget rule, from one or from a size for the even rule."""
    if budget is None or isinstance(budget, Budget):
        return budget
    from regard.cache.budgets import Uniform

    return Uniform(budget)


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, dict):
        for value in values.values():
            yield from _tensors(value)
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _tensors(value)
