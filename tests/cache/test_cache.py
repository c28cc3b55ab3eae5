"""The cache as a part of a model's life: the same tokens when nothing is dropped, turns, chunks, branches, restoring, errors."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
from transformers import DynamicCache, MambaConfig, MambaForCausalLM

import regard
from cache.held import Comb, Received, Slanted, padded, positions_of, small_llama
from regard._errors import AttachError, InputError
from regard.cache import Budget, Cache, Full, Ragged
from regard.cache.budgets import Global, Uniform
from regard.engine import Method


def ids(tokens: int, seed: int = 3, batch: int = 1) -> torch.Tensor:
    return torch.randint(3, 64, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def test_everything_is_the_untouched_model() -> None:
    model, text = small_llama(), ids(30)
    untouched = model.generate(text, max_new_tokens=12, do_sample=False)
    for cache in (Full(model), Cache(model, Comb(), 1.0), Cache(model, Comb(), 1000, every=1)):
        with cache:
            assert torch.equal(
                model.generate(text, max_new_tokens=12, do_sample=False, past_key_values=cache),
                untouched,
            )


@pytest.mark.parametrize("tokens", [4, 7])
def test_a_question_at_once_equals_one_token_at_a_time(tokens: int) -> None:
    model, text, question = small_llama(), ids(40), ids(tokens, 8)
    with Cache(model, Comb(), Slanted(9)) as cache:
        cache.prefill(text)
        assert len({len(kept) for layer in range(3) for kept in positions_of(cache, layer)[0]}) > 2
        twin = cache.branch()
        with cache.paused(), twin.paused():
            at_once = model(question, past_key_values=cache).logits
            singly = [
                model(question[:, i : i + 1], past_key_values=twin).logits for i in range(tokens)
            ]
        torch.testing.assert_close(at_once, torch.cat(singly, 1), atol=1e-5, rtol=0)
        twin.close()


def test_positions_go_on_where_the_text_ended() -> None:
    model, text = small_llama(), ids(40)
    seen: list[torch.Tensor] = []
    hook = model.model.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["position_ids"]), with_kwargs=True
    )
    with Cache(model, Comb(), 8) as cache:
        cache.prefill(text)
        model(ids(3), past_key_values=cache)
    hook.remove()
    assert seen[-1].tolist() == [[40, 41, 42]]
    assert cache.get_seq_length() == 43 and cache.kept(0, 0).max() == 42


@pytest.mark.parametrize("chunk", [7, 16])
def test_chunks_bound_what_is_held(chunk: int) -> None:
    model, text = small_llama(), ids(64)
    peak = []
    with Cache(model, Comb(), Uniform(12), chunk=chunk) as cache:
        update = cache.layers[1].update
        cache.layers[1].update = lambda *a: (update(*a), peak.append(cache.layers[1].rows.held))[0]
        cache.prefill(text)
    assert cache.get_seq_length() == 64 and max(peak) <= 12 + chunk
    assert cache.tokens is not None and torch.equal(cache.tokens, text)


def test_chunks_of_a_full_cache_change_nothing() -> None:
    model, text = small_llama(), ids(50)
    whole = model(text).logits[:, -1:]
    with Full(model) as cache:
        torch.testing.assert_close(cache.prefill(text, chunk=13).logits, whole, atol=1e-5, rtol=0)


def test_interleaved_conversations_are_those_alone() -> None:
    model = small_llama()
    texts = [ids(30, 1), ids(25, 2)]
    policies: list[dict[str, Any]] = [
        {"scorer": Comb(), "budget": Slanted(8), "every": 1},
        {"scorer": Received(), "budget": Global(0.3), "every": 2},
    ]

    def talk(caches: list[Cache], order: list[int]) -> dict[int, list[torch.Tensor]]:
        said: dict[int, list[torch.Tensor]] = {0: [], 1: []}
        for who in order:
            turn = len(said[who])
            given = texts[who] if turn == 0 else ids(1 + turn % 3, 10 * who + turn)
            said[who].append(model(given, past_key_values=caches[who]).logits)
        return said

    alone = {}
    for who in (0, 1):
        with Cache(model, **policies[who]) as cache:
            alone[who] = talk([cache, cache], [who] * 6)[who]
    caches = [Cache(model, **policy) for policy in policies]
    together = talk(caches, [0, 1, 1, 0, 1, 0, 0, 1, 0, 1, 1, 0])
    for who in (0, 1):
        for a, b in zip(alone[who], together[who], strict=True):
            assert torch.equal(a, b)


def test_the_model_is_restored() -> None:
    model = small_llama()
    config = model.config
    hooks = len(model._forward_hooks), len(model._forward_pre_hooks)
    before = config._attn_implementation

    first, second = Full(model), Cache(model, Comb(), 8)
    assert config._attn_implementation == "regard"
    first.close()
    first.close()
    assert config._attn_implementation == "regard"  # the second still needs it
    del second
    assert config._attn_implementation == before  # at once, without the garbage collector

    with pytest.raises(ZeroDivisionError), Full(model):
        raise ZeroDivisionError
    cache = Full(model)
    cache.prefill(ids(9))
    del cache
    gc.collect()
    assert config._attn_implementation == before
    assert (len(model._forward_hooks), len(model._forward_pre_hooks)) == hooks


def test_instruments_see_what_is_held() -> None:
    class Watch(Method):
        reads_only = True

        def __init__(self) -> None:
            self.sums: list[torch.Tensor] = []
            self.keys: list[int] = []

        def weights(self, block: Any) -> None:
            self.sums.append(block.weights.sum(-1))
            self.keys.append(block.call.keys)

    model, text, question = small_llama(), ids(40), ids(3, 4)
    with Cache(model, Comb(), Slanted(9)) as cache:
        cache.prefill(text)
        twin = cache.branch()
        with cache.paused(), twin.paused():
            plain = model(question, past_key_values=cache).logits
            held = [layer.rows.held for layer in cache.held]
            watch = Watch()
            with regard.attach(model, watch):
                watched = model(question, past_key_values=twin).logits
                model(question[:, :1], past_key_values=twin)
    torch.testing.assert_close(watched, plain, atol=1e-5, rtol=0)
    assert watch.keys == [*held, *(count + 1 for count in held)]
    for sums in watch.sums:
        torch.testing.assert_close(sums, torch.ones_like(sums))


def test_a_branch_is_independent() -> None:
    model, text = small_llama(), ids(40)
    with Cache(model, Received(), Global(0.3), every=1) as cache:
        cache.prefill(text)
        kept = [positions_of(cache, layer) for layer in range(3)]
        twin = copy.deepcopy(cache)
        model(ids(5, 9), past_key_values=twin)
        assert [positions_of(cache, layer) for layer in range(3)] == kept
        assert cache.get_seq_length() == 40 and twin.get_seq_length() == 45
        again = cache.branch()
        assert torch.equal(
            model(ids(5, 9), past_key_values=again).logits,
            model(ids(5, 9), past_key_values=cache).logits,
        )


def test_crop_takes_tokens_back() -> None:
    model, text = small_llama(), ids(40)
    with Cache(model, Comb(), Slanted(9)) as cache, cache.paused():
        cache._paused = False
        cache.prefill(text)
        cache._paused = True
        before = [positions_of(cache, layer) for layer in range(3)]
        first = model(ids(4, 9), past_key_values=cache).logits
        cache.crop(-4)
        assert [positions_of(cache, layer) for layer in range(3)] == before
        assert cache.get_seq_length() == 40 and cache.tokens is not None
        assert torch.equal(cache.tokens, text)
        assert torch.equal(model(ids(4, 9), past_key_values=cache).logits, first)
    with Full(model) as full:
        full.prefill(text)
        full.crop(10)  # all but the first ten
        whole = model(text[:, :12]).logits[:, 10:]
        torch.testing.assert_close(model(text[:, 10:12], past_key_values=full).logits, whole)
        with pytest.raises(InputError, match="12 tokens at most"):
            full.crop(-13)


def test_reset_starts_anew() -> None:
    model = small_llama()
    with Cache(model, Received(), Global(0.3), every=1) as cache:
        first = cache.prefill(ids(30)).logits
        assert cache.memory() > 0
        cache.reset()
        assert cache.memory() == 0 and cache.get_seq_length() == 0 and cache.tokens is None
        assert torch.equal(cache.prefill(ids(30)).logits, first)


def test_bytes_are_those_of_what_is_kept() -> None:
    model, text = small_llama(head_dim=64, num_hidden_layers=2), ids(1000)
    with Full(model) as full, Cache(model, Comb(), Slanted(0.2)) as cache:
        full.prefill(text)
        cache.prefill(text)
        held = sum(int(layer.lengths.sum()) for layer in cache.held)
        whole = sum(int(layer.lengths.sum()) for layer in full.held)
        assert cache.memory() <= (held / whole) * full.memory() * 1.02
        assert cache.memory() == held * (2 * 64 * 4 + 4)
        assert cache.layers[0].keys.untyped_storage().nbytes() < full.layers[0].keys.nbytes


def test_a_budget_in_bytes() -> None:
    model, text = small_llama(), ids(200)
    with Cache(model, Comb(), Uniform("20KB")) as cache:
        cache.prefill(text)
        assert 0.95 * 20_000 < cache.memory() <= 20_000


def test_reduced_precision() -> None:
    model = small_llama().bfloat16()
    text = ids(30)
    expected = model(text, use_cache=True)
    step = model(ids(1, 5), past_key_values=expected.past_key_values).logits
    with Full(model) as full, Cache(model, Comb(), Slanted(9)) as cache:
        full.prefill(text)
        torch.testing.assert_close(
            model(ids(1, 5), past_key_values=full).logits, step, atol=0.06, rtol=0.05
        )
        cache.prefill(text)
        logits = model(ids(3, 5), past_key_values=cache).logits
        assert cache.layers[0].keys.dtype == torch.bfloat16 and bool(logits.isfinite().all())


def test_a_failed_call_is_noticed() -> None:
    model = small_llama()
    cache = Cache(model, Comb(), 8)

    def fail(*given: Any) -> None:
        raise ZeroDivisionError

    handle = model.model.layers[1].mlp.register_forward_hook(fail)
    with pytest.raises(ZeroDivisionError):
        model(ids(20), past_key_values=cache)
    handle.remove()
    with pytest.raises(InputError, match="failed half-way"):
        model(ids(20), past_key_values=cache)
    cache.reset()
    assert torch.equal(model(ids(20), past_key_values=cache).logits, model(ids(20)).logits)


@pytest.mark.parametrize("budget", [0, 0.0, 1.5, -3, "0MB", "many", True])
def test_budgets_out_of_range(budget: Any) -> None:
    with pytest.raises(InputError, match="budget must be"):
        Cache(small_llama(), Comb(), budget)


def test_wrong_parts_and_settings() -> None:
    model = small_llama()
    with pytest.raises(InputError, match="belong together"):
        Cache(model, Comb())
    for name, value in (("every", 0), ("sinks", -1), ("chunk", 0)):
        with pytest.raises(InputError, match=f"{name} must be"):
            Cache(model, Comb(), 0.5, **{name: value})
    with pytest.raises(InputError, match="growth must be"):
        Ragged(growth=0.0)
    assert model.config._attn_implementation == "sdpa"


def test_models_without_a_cache() -> None:
    small = {"hidden_size": 16, "num_hidden_layers": 1, "vocab_size": 32}
    with pytest.raises((InputError, AttachError), match=r"no attention layers|no KV cache"):
        Full(MambaForCausalLM(MambaConfig(**small)))
    with pytest.raises(InputError, match="transformers model"):
        Full(torch.nn.Linear(2, 2))


def test_a_model_that_ignores_its_cache() -> None:
    with Full(small_llama()) as cache:
        cache.entering({})
        with pytest.raises(InputError, match="without using the cache"):
            cache.leaving(failed=False)


def test_another_model_or_batch() -> None:
    model, other = small_llama(), small_llama(1)
    with Full(model) as cache:
        with pytest.raises(InputError, match="belongs to a LlamaForCausalLM"):
            other(ids(5), past_key_values=cache)
        model(ids(5), past_key_values=cache)
        with pytest.raises(InputError, match="one cache for one batch"):
            model(ids(5, batch=2), past_key_values=cache)
        cache.reset()
        assert torch.equal(model(ids(5), past_key_values=cache).logits, model(ids(5)).logits)
    with pytest.raises(InputError, match="is closed"):
        model(ids(5), past_key_values=cache)
    open_again = Full(model)
    assert torch.equal(model(ids(5), past_key_values=open_again).logits, model(ids(5)).logits)
    open_again.close()
    with pytest.raises(InputError, match="layer must be"):
        cache.kept(7, 0)
    with pytest.raises(InputError, match="head must be"):
        cache.kept(0, 2)


def test_counts_are_brought_into_range() -> None:
    class Wild(Budget):
        def counts(self, scores: Any, room: Any) -> list[torch.Tensor]:
            return [torch.tensor([[-5, 10**6]]) for _ in scores]

    with Cache(small_llama(), Comb(), Wild(10), sinks=3) as cache:
        cache.prefill(ids(30))
        assert cache.kept(0, 0).tolist() == [0, 1, 2]  # the sinks in any case
        assert len(cache.kept(0, 1)) == 30


def test_left_padding_is_never_kept() -> None:
    model = small_llama()
    text, mask = padded([30, 11], "left")
    with Cache(model, Comb(), Slanted(20)) as cache:
        cache.prefill(text, mask)
        assert min(int(cache.kept(layer, 0, 1).min()) for layer in range(3)) >= 19
        alone = model(
            text[1:, 19:], use_cache=True, past_key_values=DynamicCache(config=model.config)
        )
    with Full(model) as full:
        logits = full.prefill(text, mask).logits
        torch.testing.assert_close(logits[1, -1], alone.logits[0, -1], atol=1e-5, rtol=0)
        assert full.kept(1, 1, 1).tolist() == list(range(19, 30))
