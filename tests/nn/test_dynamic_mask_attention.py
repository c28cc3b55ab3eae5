"""DMA against transformers' Doge, and its bounded state."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import regard
from regard._errors import InputError
from regard.instruments import Entropy
from regard.nn import DynamicMaskAttention, LanguageModel, LanguageModelConfig, make_mixer
from regard.nn.dynamic_mask_attention import LinearDynamicMaskAttention
from regard.ops import dynamic_mask, lifetimes

doge = pytest.importorskip(
    "transformers.models.doge.modeling_doge", reason="no Doge in transformers"
)


def pair(window: int, kv_heads: int) -> tuple[DynamicMaskAttention, Any, Any]:
    """Ours and Doge's layer with the same weights, and Doge's rotary angles."""
    torch.manual_seed(0)
    config = doge.DogeConfig(
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        keep_window_size=window,
        max_position_embeddings=128,
    )
    config._attn_implementation = "eager"
    theirs = doge.DogeAttention(config, layer_idx=0)
    ours = DynamicMaskAttention(32, 4, kv_heads=kv_heads, window=window)
    for parameter in ours.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.3)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs.eval(), doge.DogeRotaryEmbedding(config)


def run(theirs: Any, rotary: Any, hidden: torch.Tensor, first: int = 0, cache: Any = None) -> Any:
    tokens = hidden.shape[1]
    positions = torch.arange(first, first + tokens)
    rows = torch.arange(first + tokens) <= positions[:, None]
    mask = torch.zeros(rows.shape).masked_fill(~rows, torch.finfo(torch.float32).min)
    return theirs(
        hidden,
        position_embeddings=rotary(hidden, positions[None]),
        attention_mask=mask[None, None].expand(len(hidden), -1, -1, -1),
        cache=cache,
    )[0]


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("window", [6, 40])
def test_equals_doge(window: int, kv_heads: int) -> None:
    ours, theirs, rotary = pair(window, kv_heads)
    hidden = torch.randn(2, 29, 32)
    one, other = (hidden.clone().requires_grad_() for _ in range(2))
    found, expected = ours(one), run(theirs, rotary, other)
    assert (found - expected).abs().max() <= 1e-6
    weight = torch.randn_like(found)
    (found * weight).mean().backward()
    (expected * weight).mean().backward()
    assert one.grad is not None and other.grad is not None
    assert (one.grad - other.grad).abs().max() <= 1e-6
    gradients = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert (parameter.grad - gradients[name].grad).abs().max() <= 1e-6, name


def test_decodes_as_doge_does() -> None:
    from transformers import DynamicCache

    ours, theirs, rotary = pair(6, 2)
    hidden, state, cache = torch.randn(2, 20, 32), {}, DynamicCache()
    for first, last in ((0, 11), *((i, i + 1) for i in range(11, 20))):
        part = hidden[:, first:last]
        found = ours(part, state=state)
        expected = run(theirs, rotary, part, first, cache)
        assert (found - expected).abs().max() <= 1e-6
        assert state["key"].shape[2] <= 6 < cache.get_seq_length()


@pytest.mark.parametrize("local", [0, 3])
def test_the_state_does_not_grow(local: int) -> None:
    mixer = DynamicMaskAttention(32, 4, window=8, local=local).double()
    torch.nn.init.normal_(mixer.A)
    hidden, state = torch.randn(2, 50, 32).double(), {}
    parts = [mixer(part, state=state) for part in hidden.split(1, 1)]
    assert state["key"].shape == (2, 4, state["key"].shape[2], 8)
    assert 8 <= state["key"].shape[2] <= 8 + local
    assert int(state["seen"][0]) == 50
    torch.testing.assert_close(torch.cat(parts, 1), mixer(hidden), atol=1e-10, rtol=1e-10)


def test_gaps_in_a_text_change_nothing() -> None:
    mixer = DynamicMaskAttention(32, 4, window=5, kv_heads=2).double()
    torch.nn.init.normal_(mixer.A)
    hidden, valid = torch.randn(1, 24, 32).double(), torch.rand(1, 24) > 0.3
    state: dict[str, torch.Tensor] = {}
    pairs = zip(hidden.split(1, 1), valid.split(1, 1), strict=True)
    stepwise = torch.cat([mixer(one, valid=real, state=state) for one, real in pairs], 1)
    whole = mixer(hidden, valid=valid)
    torch.testing.assert_close(stepwise[valid], whole[valid], atol=1e-10, rtol=1e-10)


def test_what_reads_weights_sees_the_mask() -> None:
    class Weights(regard.engine.Method):
        reads_only = True

        def weights(self, block: regard.engine.Block) -> None:
            seen.append((block.rows, block.keys, block.weights.clone()))

    seen: list[Any] = []
    torch.manual_seed(3)
    config = LanguageModelConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=1,
        mixers=[["dma", {"window": 6, "kv_heads": 2}]],
    )
    model = LanguageModel(config).eval()
    mixer = model.mixers[0]
    assert isinstance(mixer, DynamicMaskAttention)
    torch.nn.init.normal_(mixer.A)
    ids = torch.randint(50, (2, 30))
    plain, entropy = model(ids).logits, Entropy()
    with regard.attach(model, entropy, Weights()):
        torch.testing.assert_close(model(ids).logits, plain, atol=1e-5, rtol=1e-5)
    block: Any = model.layers[0]
    hidden = block.input_layernorm(model.embed_tokens(ids))
    value = mixer.v_proj(hidden).unflatten(-1, (2, -1)).transpose(1, 2)
    mask = dynamic_mask(lifetimes(mixer.importance(value), 6), torch.arange(30))
    for rows, keys, weights in seen:
        expected = mask[:, :, rows, keys].repeat_interleave(2, 1)
        assert torch.equal(weights > 0, expected)


def test_linear_importance_may_be_negative() -> None:
    mixer = LinearDynamicMaskAttention(32, 4, window=5)
    torch.nn.init.constant_(mixer.A, -1.0)
    value = torch.randn(1, 4, 9, 8)
    assert (mixer.importance(value) < 0).all()
    plain = DynamicMaskAttention(32, 4, window=5)
    plain.load_state_dict(mixer.state_dict())
    torch.testing.assert_close(mixer.importance(value).exp(), plain.importance(value))


def test_bad_input() -> None:
    with pytest.raises(InputError, match="window"):
        make_mixer("dma", 32, 4, window=0)
    with pytest.raises(InputError, match="kv_heads"):
        make_mixer("dma", 32, 4, kv_heads=3)
    with pytest.raises(InputError, match="local"):
        make_mixer("dma", 32, 4, local=-1)
