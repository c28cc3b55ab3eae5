"""Caches by name: with room for everything they change nothing; the replay and the re-counted positions by their definitions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import regard.cache as caches
from regard._errors import InputError
from regard.cache import Calibration
from regard.cache.calibration import fingerprint
from regard.cache.reconstruction import FIRST, LATER, OVERLAP, _reply_prefix, _tokens, reconstruct
from regard.cache.rotary import Rotary


def calibration(model: Any) -> Calibration:
    return Calibration("tiny", fingerprint(model), 1, 100, (0.5,), (((0.8, 0.2),) * 3,))


NAMED = {
    "streaming": lambda m, size: caches.Streaming(m, size),
    "streaming exact": lambda m, size: caches.StreamingExact(m, size),
    "h2o": lambda m, size: caches.H2O(m, size, normalise=True),
    "snapkv": lambda m, size: caches.SnapKV(m, size, window=4),
    "tova": lambda m, size: caches.TOVA(m, size),
    "key norm": lambda m, size: caches.KeyNorm(m, size),
    "expected": lambda m, size: caches.ExpectedAttention(m, size),
    "pyramid": lambda m, size: caches.PyramidKV(m, size, window=4),
    "cake": lambda m, size: caches.Cake(m, size, window=4),
    "kvzip": lambda m, size: caches.KVzip(m, size),
    "calibrated": lambda m, size: caches.Calibrated(m, size, calibration(m)),
    "retrieval heads": lambda m, size: caches.RetrievalHeads(m, size, torch.rand(3, 4)),
}


def generate(model: Any, ids: Tensor, mask: Tensor, cache: Any = None) -> list[list[int]]:
    given = {} if cache is None else {"past_key_values": cache}
    out = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=6,
        do_sample=False,
        pad_token_id=0,
        **given,
    )
    return out[:, ids.shape[1] :].tolist()


@pytest.mark.parametrize("name", NAMED)
def test_room_for_everything_gives_the_untouched_tokens(name, model):
    torch.manual_seed(7)
    ids, mask = torch.randint(1, 64, (2, 30)), torch.ones(2, 30, dtype=torch.long)
    mask[0, :7] = 0
    plain = generate(model, ids, mask)
    with NAMED[name](model, 1000) as cache:
        assert generate(model, ids, mask, cache) == plain


@pytest.mark.parametrize("name", sorted(set(NAMED) - {"kvzip"}))
def test_generates_within_its_budget(name, model):
    ids, mask = torch.randint(1, 64, (1, 30)), torch.ones(1, 30, dtype=torch.long)
    with NAMED[name](model, 10) as cache:
        assert len(generate(model, ids, mask, cache)[0]) == 6
        held = torch.stack([layer.lengths for layer in cache.held]).double()
        assert held.mean() == 10 + 5  # what was generated is kept, the last token not yet read


def test_streaming_exact_counts_positions_in_the_cache(model):
    """Each step equals a forward pass over the held tokens' keys, rotated to positions 0, 1, 2, ..."""
    from transformers import DynamicCache

    torch.manual_seed(3)
    size, sinks = 12, 2
    text = torch.randint(0, 64, (1, 40))
    bare: list[Tensor] = []  # keys before rotation, one entry a layer and call
    hooks = [
        layer.self_attn.k_proj.register_forward_hook(lambda m, i, o: bare.append(o))
        for layer in model.model.layers
    ]

    def taken() -> list[Tensor]:
        keys = [k.unflatten(-1, (2, -1)).transpose(1, 2) for k in bare]
        bare.clear()
        return keys

    try:
        with torch.no_grad(), caches.StreamingExact(model, size, every=1, sinks=sinks) as cache:
            cache.prefill(text[:, :30])
            bare.clear()
            whole: Any = DynamicCache(config=model.config)
            model(text[:, :30], past_key_values=whole)
            keys, values = taken(), [layer.values for layer in whole.layers]

            for t in range(30, 36):
                kept = [*range(sinks), *range(keys[0].shape[2] - size + sinks, keys[0].shape[2])]
                keys = [k[:, :, kept] for k in keys]
                values = [v[:, :, kept] for v in values]
                counted: Any = DynamicCache(config=model.config)
                for i, layer in enumerate(model.model.layers):
                    rotary = Rotary.of(layer.self_attn, i)
                    turned = rotary.turn(keys[i], torch.arange(size)[None]).double()
                    counted.update(turned, values[i], i)
                place = torch.tensor([[size]])
                wanted = model(
                    text[:, t : t + 1], past_key_values=counted, position_ids=place
                ).logits
                new = taken()
                found = cache.prefill(text[:, t : t + 1]).logits
                bare.clear()
                torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
                keys = [torch.cat(pair, 2) for pair in zip(keys, new, strict=True)]
                values = [layer.values for layer in counted.layers]
    finally:
        for hook in hooks:
            hook.remove()


def test_streaming_exact_needs_rotary_positions():
    from transformers import GPT2Config, GPT2LMHeadModel

    plain = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2)).eval()
    with pytest.raises(InputError, match="rotary"):
        caches.StreamingExact(plain, 8)


@pytest.mark.parametrize("chunk", [2048, 24])
def test_reconstruction_is_the_peak_of_the_replay(chunk, tiny_tokenizer):
    """Against eager maps over the text and each replay, restricted to the keys that count."""
    from fixtures_models import tiny_llama

    model = tiny_llama().double()
    ids = torch.randint(3, 320, (1, 40))
    found = reconstruct(model, ids, tokenizer=tiny_tokenizer, chunk=chunk)
    suffix = _reply_prefix(tiny_tokenizer)
    model.set_attn_implementation("eager")
    for start in range(0, 40, chunk):
        end = min(start + chunk, 40)
        request = _tokens(tiny_tokenizer, LATER if start else FIRST)
        quoted = ids[:, max(0, start - OVERLAP) : start]
        replay = torch.cat([request, quoted, suffix, ids[:, start:end]], 1)
        with torch.no_grad():
            whole = torch.cat([ids, replay], 1)
            maps = model(whole, output_attentions=True).attentions
        counted = [
            j for j in range(whole.shape[1]) if j >= 40 or start <= j < end or j < min(4, start)
        ]
        for layer, weights in enumerate(maps):
            rows = weights[0, :, 40:, counted]
            rows = rows / rows.sum(-1, keepdim=True)
            place = counted.index(start)
            own = rows[..., place : place + end - start].unflatten(0, (2, -1)).amax((1, 2))
            torch.testing.assert_close(found[layer, :, start:end], own, atol=1e-6, rtol=1e-5)


def test_kvzip_replays_once_and_keeps_what_was_needed(tiny_tokenizer):
    from fixtures_models import tiny_llama

    model = tiny_llama()
    ids = torch.randint(3, 320, (1, 40))
    peaks = reconstruct(model, ids, tokenizer=tiny_tokenizer)
    with caches.KVzip(model, 0.5, tokenizer=tiny_tokenizer, sinks=0) as cache:
        cache.prefill(ids)
        bar = peaks.flatten().sort(descending=True).values[79]  # half of 2 x 2 x 40
        for layer in range(2):
            for head in range(2):
                wanted = (peaks[layer, head] >= bar).nonzero().flatten()
                assert cache.kept(layer, head).tolist() == wanted.tolist()
        cache.prefill(torch.randint(3, 320, (1, 10)))  # a second turn is kept whole
        held = sum(int(layer.lengths.sum()) for layer in cache.held)
        assert held == 80 + 4 * 10
        assert cache.get_seq_length() == 50


def test_kvzip_refuses_a_batch(tiny_tokenizer):
    from fixtures_models import tiny_llama

    with (
        caches.KVzip(tiny_llama(), 0.5, tokenizer=tiny_tokenizer) as cache,
        pytest.raises(InputError, match="batch of 2"),
    ):
        cache.prefill(torch.randint(3, 320, (2, 40)))
