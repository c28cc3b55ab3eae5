from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from fixtures_models import tiny_llama
from regard.bench.replay import Prefill
from regard.cache import Budget, Cache, Room
from regard.cache.scorers import CAKE, H2O, TOVA, ExpectedAttention, KeyNorm, SnapKV, Streaming

TOKENS = torch.randint(0, 320, (90,), generator=torch.Generator().manual_seed(5))
SCORERS = [
    H2O(), H2O(normalise=True), SnapKV(window=8), TOVA(), KeyNorm(), Streaming(), CAKE(window=8),
    ExpectedAttention(horizon=16),
]  # fmt: skip


@dataclass(frozen=True)
class Slanted(Budget):
    """More for later layers and for head 1."""

    def counts(self, scores: Any, room: Room) -> Any:
        return [
            (room.tokens[:, None] * torch.tensor([0.6, 1.0])).long() + 3 * layer.index
            for layer in room.layers
        ]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_llama().double()


@pytest.mark.parametrize("scorer", SCORERS, ids=lambda s: type(s).__name__)
def test_a_replayed_cache_holds_what_a_real_prefill_leaves(model: Any, scorer: Any):
    prefill = Prefill(model, TOKENS)
    assert prefill.replays
    replayed, _ = prefill.watched(scorer).evicted(Slanted(0.3))
    real = Cache(model, scorer, Slanted(0.3))
    real.prefill(TOKENS[None])
    assert replayed.get_seq_length() == real.get_seq_length() == len(TOKENS)
    assert replayed.memory() == real.memory()
    for layer in range(2):
        for head in range(2):
            assert replayed.kept(layer, head).tolist() == real.kept(layer, head).tolist()
    following = torch.tensor([[5, 9, 200]])
    with torch.no_grad():
        ours = model(following, past_key_values=replayed).logits
        theirs = model(following, past_key_values=real).logits
    torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=0)


def test_one_watched_cache_serves_many_budgets(model: Any):
    watched = Prefill(model, TOKENS).watched(H2O())
    small, _ = watched.evicted(Slanted(0.2))
    large, _ = watched.evicted(Slanted(0.6))
    again, _ = watched.evicted(Slanted(0.2))
    assert small.memory() < large.memory() < watched.cache.memory()
    assert set(small.kept(0, 0).tolist()) < set(large.kept(0, 0).tolist())
    assert again.kept(1, 1).tolist() == small.kept(1, 1).tolist()


def test_prefill_gives_the_plain_models_logits(model: Any):
    with torch.no_grad():
        plain = model(TOKENS[None]).logits[0, -1]
    torch.testing.assert_close(Prefill(model, TOKENS).logits.double(), plain, atol=1e-5, rtol=0)


def test_models_with_sliding_windows_are_prefilled_again():
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, sliding_window=32,
    )  # fmt: skip
    torch.manual_seed(0)
    sliding = MistralForCausalLM(config).eval()
    prefill = Prefill(sliding, TOKENS)
    assert not prefill.replays
    replayed, _ = prefill.watched(H2O()).evicted(Slanted(0.2))
    real = Cache(sliding, H2O(), Slanted(0.2))
    real.prefill(TOKENS[None])
    assert replayed.kept(1, 0).tolist() == real.kept(1, 0).tolist()


def test_the_model_is_as_before_once_everything_is_closed(model: Any):
    before = model.config._attn_implementation
    prefill = Prefill(model, TOKENS)
    watched = prefill.watched(KeyNorm())
    branch, _ = watched.evicted(Slanted(0.5))
    for part in (branch, watched, prefill):
        part.close()
    assert model.config._attn_implementation == before
