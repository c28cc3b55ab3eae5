"""Under `generate()`: greedy, sampled, beams, assisted, several turns, windows, encoder-decoders."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    DynamicCache,
    EncoderDecoderCache,
    MistralConfig,
    MistralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from cache.held import Comb, Received, Slanted, padded, positions_of, small_llama
from regard._errors import InputError
from regard.cache import Cache, Full
from regard.cache.budgets import Global, Uniform

WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "temperature": 1.2, "top_k": 20},
    "beams": {"do_sample": False, "num_beams": 3},
    "sampled beams": {"do_sample": True, "num_beams": 2, "num_return_sequences": 2},
}


def generate(model: Any, ids: torch.Tensor, cache: Any = None, **more: Any) -> torch.Tensor:
    torch.manual_seed(11)
    given = {} if cache is None else {"past_key_values": cache}
    return model.generate(ids, max_new_tokens=14, **given, **more)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("side", ["alone", "left"])
def test_full_generates_the_same(way: str, side: str) -> None:
    model = small_llama()
    ids, mask = padded([20] if side == "alone" else [20, 12, 16], "left")
    untouched = generate(model, ids, attention_mask=mask, **WAYS[way])
    with Full(model) as cache:
        assert torch.equal(generate(model, ids, cache, attention_mask=mask, **WAYS[way]), untouched)
    with Cache(model, Received(), Global(1.0), every=1) as cache:
        assert torch.equal(generate(model, ids, cache, attention_mask=mask, **WAYS[way]), untouched)


def test_beams_carry_what_they_hold() -> None:
    """A beam search over a compressed prompt equals the one written out: every beam a batch row of its own from the start."""
    model = small_llama()
    ids, _ = padded([24], "left")
    with Cache(model, Comb(), Slanted(8)) as cache, Cache(model, Comb(), Slanted(8)) as rows:
        found = generate(model, ids, cache, num_beams=3, do_sample=False)
        rows.prefill(ids)
        scores, texts = torch.zeros(1), ids
        logits = model(ids, past_key_values=None).logits[:, -1]
        for _ in range(14):
            total = scores[:, None] + logits.log_softmax(-1)
            best = total.flatten().topk(3)
            parent, token = best.indices // 64, best.indices % 64
            scores, texts = best.values, torch.cat([texts[parent], token[:, None]], 1)
            rows.reorder_cache(parent)
            logits = model(token[:, None], past_key_values=rows).logits[:, -1]
    assert torch.equal(found[0], texts[0])


def test_assisted_generation_takes_tokens_back() -> None:
    model, assistant = small_llama(), small_llama(3)
    ids, _ = padded([20], "left")
    untouched = generate(model, ids, do_sample=False)
    with Full(model) as cache:
        found = generate(model, ids, cache, do_sample=False, assistant_model=assistant)
    assert torch.equal(found, untouched)


@pytest.mark.parametrize("chunk", [5, 8])
def test_transformers_own_chunked_prefill(chunk: int) -> None:
    model = small_llama()
    ids, _ = padded([29], "left")
    untouched = generate(model, ids, do_sample=False)
    with Full(model) as cache:
        found = generate(model, ids, cache, do_sample=False, prefill_chunk_size=chunk)
    assert torch.equal(found, untouched)
    with (
        Cache(model, Comb(), Uniform(8), every=1) as cache,
        Cache(model, Comb(), Uniform(8)) as own,
    ):
        generate(model, ids, cache, do_sample=False, prefill_chunk_size=chunk)
        assert max(max(layer.rows.sizes) for layer in cache.held) == 8
        own.prefill(ids[:, :-1], chunk=chunk)
        assert max(max(layer.rows.sizes) for layer in own.held) == 8


def test_a_second_turn() -> None:
    model = small_llama()
    text, more = padded([20], "left")[0], padded([6], "left", 7)[0]
    with Full(model) as cache:
        first = generate(model, text, cache, do_sample=False)
        whole = torch.cat([first, more], 1)
        found = generate(model, whole, cache, do_sample=False)
    assert torch.equal(found, generate(model, whole, do_sample=False))
    with Cache(model, Received(), Slanted(8), every=1) as cache:
        first = generate(model, text, cache, do_sample=False)
        again = generate(model, torch.cat([first, more], 1), cache, do_sample=False)
        assert again.shape[1] == 54 and cache.get_seq_length() == 53
        assert cache.tokens is not None and torch.equal(cache.tokens, again[:, :-1])


def small_mistral() -> MistralForCausalLM:
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, sliding_window=9, initializer_range=0.3, bos_token_id=1,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return MistralForCausalLM(config).eval().requires_grad_(False)


def test_sliding_windows_forget_what_they_left_behind() -> None:
    model = small_mistral()
    ids, mask = padded([30, 22], "left")
    untouched = generate(model, ids, attention_mask=mask, do_sample=False)
    with Full(model) as cache:
        assert torch.equal(
            generate(model, ids, cache, attention_mask=mask, do_sample=False), untouched
        )
        assert max(layer.rows.held for layer in cache.held) <= 9 * 4 / 3
    with Full(model) as cache:
        generate(model, ids[:1], cache, do_sample=False)
        assert cache.kept(0, 0).tolist() == list(range(43 - 8, 43))


def test_evicting_inside_a_window() -> None:
    """A budget below the window: what is kept is attended to while it is inside the window, by position."""
    model = small_mistral()
    ids, _ = padded([30], "left")
    with Cache(model, Comb(), Uniform(5)) as cache:
        cache.prefill(ids)
        kept = positions_of(cache, 0)[0]
        assert all(len(one) == 5 and min(one) >= 22 for one in kept) and kept[0] != kept[1]
        twin = cache.branch()
        new = padded([7], "left", 5)[0]
        with cache.paused(), twin.paused():
            at_once = model(new, past_key_values=cache).logits
            singly = [model(new[:, i : i + 1], past_key_values=twin).logits for i in range(7)]
    torch.testing.assert_close(at_once, torch.cat(singly, 1), atol=1e-5, rtol=0)


def test_the_decoder_of_an_encoder_decoder() -> None:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, initializer_factor=3.0,
        decoder_start_token_id=0, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = T5ForConditionalGeneration(config).eval().requires_grad_(False)
    ids, _ = padded([12], "left")
    untouched = model.generate(ids, max_new_tokens=20, do_sample=False)
    with Full(model) as cache:
        both = EncoderDecoderCache(cache, DynamicCache())
        found = model.generate(ids, max_new_tokens=20, do_sample=False, past_key_values=both)
        assert torch.equal(found, untouched) and cache.get_seq_length() == 20
        with pytest.raises(InputError, match="EncoderDecoderCache"):
            model.generate(ids, max_new_tokens=2, past_key_values=cache)
    with Cache(model, Comb(), Uniform(6), every=1) as cache:
        both = EncoderDecoderCache(cache, DynamicCache())
        model.generate(ids, max_new_tokens=20, do_sample=False, past_key_values=both)
        assert [len(cache.kept(layer, 0)) for layer in (0, 1)] == [6, 6]
