"""S2-Attn and SF-Attn on transformers models, against the model's eager attention under the same boolean mask."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import regard
from regard._errors import InputError
from regard.engine import AttentionCall, Block, Method
from regard.sparse.shifted import S2Attention, SFAttention

PATTERNS = {
    "S2": S2Attention(),
    "S2 without the leak": S2Attention(leak=False),
    "S2 with sinks": SFAttention(restore=0),
    "restored": SFAttention(sinks=0),
    "SF": SFAttention(),
    "SF without the leak": SFAttention(leak=False),
    "block-local": SFAttention(restore=1, sinks=0),
    "8 tokens": SFAttention(8, restore=0.75, sinks=2),
}
SIZES = {
    "vocab_size": 64,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "initializer_range": 0.3,
}


def llama(kv_heads: int = 2) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, num_key_value_heads=kv_heads, max_position_embeddings=128)
    return LlamaForCausalLM(config).eval().double()


class Dense(Method):
    """Hides what a pattern hides in the scores of every row: the slow way to the same numbers."""

    def __init__(self, seen: Tensor) -> None:
        self.seen = seen  # [batch|1, heads, queries, keys]

    def before(self, call: AttentionCall) -> AttentionCall:
        mask = self.seen.expand(call.query.shape[0], -1, -1, -1)
        return AttentionCall.make(
            call.query, call.key, call.value, mask=mask, site=call.site, module=call.module
        )


def pairs(pattern: S2Attention | SFAttention, heads: int, tokens: int, size: int) -> Tensor:
    """The visible pairs of each head, written down pair by pair."""
    seen = torch.zeros(heads, tokens, tokens, dtype=torch.bool)
    half = size // 2
    order = [*range(half, tokens), *range(half)]
    place = {t: i for i, t in enumerate(order)}
    for h in range(heads):
        rolled = h >= heads - pattern.shifted(heads)
        for t in range(tokens):
            for k in range(tokens):
                inside = k <= t and k // size == t // size
                if rolled:
                    i, j = place[t], place[k]
                    inside = j <= i and i // size == j // size and (pattern.leak or k <= t)
                seen[h, t, k] = inside or k <= min(t, pattern.sinks - 1)
    return seen[None]


@pytest.mark.parametrize("kv_heads", [6, 2])
@pytest.mark.parametrize("name", PATTERNS)
def test_a_model_computes_what_the_dense_mask_says(name, kv_heads):
    model, pattern = llama(kv_heads), PATTERNS[name]
    tokens = torch.randint(64, (2, 48))
    with torch.no_grad():
        plain = model(tokens).logits
        with regard.attach(model, pattern):
            found = model(tokens).logits
        with regard.attach(model, Dense(pairs(pattern, 6, 48, pattern.size(48)))):
            expected = model(tokens).logits
        after = model(tokens).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    assert float((found - plain).abs().max()) > 1e-3
    assert torch.equal(plain, after)


@pytest.mark.parametrize("name", PATTERNS)
def test_what_instruments_see_is_what_is_computed(name):
    class Seen(Method):
        """Weights of every row; returning them makes the engine compute the output from them."""

        def __init__(self) -> None:
            self.maps: list[Tensor] = []

        def before(self, call: AttentionCall) -> None:
            shape = (call.query.shape[0], call.heads, call.queries, call.keys)
            self.maps.append(torch.zeros(shape, dtype=torch.bool))

        def weights(self, block: Block) -> Tensor:
            self.maps[-1][:, :, block.rows, block.keys] = block.weights > 0
            return block.weights

    model, pattern, seen = llama(), PATTERNS[name], Seen()
    tokens = torch.randint(64, (2, 48))
    with torch.no_grad():
        with regard.attach(model, pattern):
            grouped = model(tokens).logits
        with regard.attach(model, pattern, seen):
            blockwise = model(tokens).logits
    torch.testing.assert_close(grouped, blockwise, rtol=0, atol=1e-9)
    expected = pairs(pattern, 6, 48, pattern.size(48)).expand(2, -1, -1, -1)
    assert all(torch.equal(found, expected) for found in seen.maps)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("read", [False, True])
def test_a_row_in_a_padded_batch_is_the_row_alone(side, read):
    class Reader(Method):
        def weights(self, block: Block) -> Tensor:
            return block.weights

    model, pattern = llama(), SFAttention(8, leak=False)
    short, long = torch.randint(64, (1, 21)), torch.randint(64, (1, 32))
    rest = torch.zeros(1, 11, dtype=torch.long)
    row = [rest, short] if side == "left" else [short, rest]
    tokens = torch.cat([long, torch.cat(row, 1)])
    mask = torch.ones_like(tokens)
    mask[1] = torch.cat(
        [torch.zeros_like(part) if part is rest else part * 0 + 1 for part in row], 1
    )
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    with torch.no_grad(), regard.attach(model, pattern, *([Reader()] if read else [])):
        batch = model(tokens, attention_mask=mask, position_ids=positions).logits
        torch.testing.assert_close(batch[:1], model(long).logits, rtol=0, atol=1e-9)
        torch.testing.assert_close(
            batch[1:, mask[1].bool()], model(short).logits, rtol=0, atol=1e-9
        )


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_leak_shows_no_padding(side):
    model, pattern = llama(), SFAttention(8)
    tokens = torch.randint(64, (2, 32))
    mask = torch.ones_like(tokens)
    real = slice(11, 32) if side == "left" else slice(0, 21)
    mask[1] = 0
    mask[1, real] = 1
    other = torch.where(mask.bool(), tokens, (tokens + 7) % 64)  # other ids under the padding
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    with torch.no_grad(), regard.attach(model, pattern):
        first, second = (
            model(ids, attention_mask=mask, position_ids=positions).logits[mask.bool()]
            for ids in (tokens, other)
        )
    assert bool(first.isfinite().all())
    assert torch.equal(first, second)


def test_tokens_of_a_cache_see_what_the_whole_sequence_sees():
    model, pattern = llama(), SFAttention(8, leak=False)
    tokens = torch.randint(64, (1, 30))
    with torch.no_grad(), regard.attach(model, pattern):
        whole = model(tokens).logits
        held = model(tokens[:, :20], use_cache=True)
        more = model(tokens[:, 20:27], past_key_values=held.past_key_values, use_cache=True)
        one = model(tokens[:, 27:28], past_key_values=more.past_key_values, use_cache=True)
    parts = torch.cat([held.logits, more.logits, one.logits], 1)
    torch.testing.assert_close(parts, whole[:, :28], rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["S2", "SF", "SF without the leak"])
def test_gradients_reach_every_parameter_and_equal_those_of_the_dense_mask(name):
    model, pattern = llama(), PATTERNS[name]
    tokens = torch.randint(64, (2, 48))
    grads = []
    for method in (pattern, Dense(pairs(pattern, 6, 48, 12))):
        model.zero_grad()
        with regard.attach(model, method):
            model(tokens, labels=tokens).loss.backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(grads[0]) == len(list(model.parameters()))
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


def test_a_window_of_the_model_is_respected_and_the_leak_refused_there():
    torch.manual_seed(0)
    config = MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=7)
    model = MistralForCausalLM(config).eval().double()
    tokens = torch.randint(64, (1, 32))
    pattern = SFAttention(leak=False)
    positions = torch.arange(32)
    window = positions[:, None] - positions[None, :] < 7
    with torch.no_grad():
        with regard.attach(model, pattern):
            found = model(tokens).logits
        with regard.attach(model, Dense(pairs(pattern, 6, 32, 8) & window)):
            expected = model(tokens).logits
        with pytest.raises(InputError, match="use leak=False"), regard.attach(model, SFAttention()):
            model(tokens)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def test_encoders_are_refused_and_left_alone_beside_a_decoder():
    config = BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
    config.intermediate_size = 32
    tokens = torch.randint(64, (1, 32))
    model = BertModel(config).eval()
    with (
        pytest.raises(InputError, match="see later tokens; attach it to a decoder"),
        regard.attach(model, SFAttention()),
    ):
        model(tokens)
    config = T5Config(
        vocab_size=64,
        d_model=32,
        d_kv=8,
        d_ff=32,
        num_layers=1,
        num_heads=4,
        decoder_start_token_id=0,
    )
    model = T5ForConditionalGeneration(config).eval()
    with torch.no_grad():
        plain = model(tokens, decoder_input_ids=tokens)
        with regard.attach(model, SFAttention(leak=False)):
            found = model(tokens, decoder_input_ids=tokens)
    torch.testing.assert_close(plain.encoder_last_hidden_state, found.encoder_last_hidden_state)
    assert float((plain.logits - found.logits).abs().max()) > 1e-3


@pytest.mark.parametrize(
    ("heads", "restore", "shifted"), [(8, 0, 4), (8, 0.5, 2), (8, 1, 0), (9, 0.5, 3)]
)
def test_heads_put_back(heads, restore, shifted):
    assert SFAttention(restore=restore).shifted(heads) == shifted
    assert S2Attention().shifted(heads) == heads - heads // 2


def test_groups_are_an_even_share_of_the_sequence():
    assert [S2Attention().size(n) for n in (4096, 1022, 30, 3)] == [1024, 254, 6, 2]
    assert SFAttention(64).size(1000) == 64


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"group": 0.0}, "group must be a share in"),
        ({"group": 1.5}, "group must be a share in"),
        ({"group": True}, "group must be a share in"),
        ({"group": 1}, "group must be a share in"),
        ({"group": 9}, "size must be an even number"),
        ({"group": 4}, r"sinks must be 0\.\.2"),
        ({"restore": -0.1}, "restore must be a share"),
        ({"sinks": -1}, "sinks must be a number of tokens"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, said):
    with pytest.raises(InputError, match=said):
        SFAttention(**settings)


def test_groups_too_small_for_the_sinks_say_so():
    model = llama()
    with (
        pytest.raises(InputError, match="half a group of 4, got 4"),
        regard.attach(model, SFAttention()),
    ):
        model(torch.randint(64, (1, 16)))


@pytest.mark.parametrize("order", [1, -1])
def test_two_patterns_show_what_both_show(order):
    from regard.sparse import Power

    model, tokens = llama(), torch.randint(64, (1, 48))
    shifted, power = SFAttention(leak=False), Power(block=4)

    class Seen(Method):
        def __init__(self) -> None:
            self.maps: list[Tensor] = []

        def before(self, call: AttentionCall) -> None:
            self.maps.append(torch.zeros(1, call.heads, call.queries, call.keys).bool())

        def weights(self, block: Block) -> Tensor:
            self.maps[-1][:, :, block.rows, block.keys] = block.weights > 0
            return block.weights

    def run(*methods: Method) -> Tensor:
        with torch.no_grad(), regard.attach(model, *methods):
            return model(tokens).logits

    alone = Seen()
    run(power, alone)
    both = pairs(shifted, 6, 48, 12) & alone.maps[0]
    found = run(*(shifted, power)[::order])
    torch.testing.assert_close(found, run(Dense(both)), rtol=0, atol=1e-9)


def test_greedy_tokens_are_the_same_with_and_without_a_cache():
    model, tokens = llama(), torch.randint(2, 64, (2, 20))
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad(), regard.attach(model, SFAttention(8, leak=False)):
        cached = model.generate(tokens, use_cache=True, **settings)
        whole = model.generate(tokens, use_cache=False, **settings)
    assert torch.equal(cached, whole)


GROUPED = {**SIZES, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**GROUPED)),
    "gemma2": lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**GROUPED, sliding_window=6)),
    "gpt-neox": lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**SIZES)),
    "gpt2": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3)
    ),
    "gpt-oss": lambda: hf.GptOssForCausalLM(
        hf.GptOssConfig(**GROUPED, num_local_experts=2, num_experts_per_tok=1)
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_other_families_give_the_same_from_both_backends_in_a_padded_batch(family, dtype):
    class Reader(Method):
        def weights(self, block: Block) -> Tensor:
            return block.weights

    torch.manual_seed(0)
    model, pattern = FAMILIES[family]().eval().to(dtype), SFAttention(8, leak=False)
    tokens, mask = torch.randint(2, 64, (2, 26)), torch.ones(2, 26, dtype=torch.long)
    mask[1, :5] = 0
    with torch.no_grad():
        plain = model(tokens, attention_mask=mask).logits[mask.bool()]
        with regard.attach(model, pattern):
            grouped = model(tokens, attention_mask=mask).logits[mask.bool()]
        with regard.attach(model, pattern, Reader()):
            blockwise = model(tokens, attention_mask=mask).logits[mask.bool()]
    bound = 1e-4 if dtype == torch.float32 else 0.1 * float(plain.abs().max())
    torch.testing.assert_close(grouped, blockwise, rtol=0, atol=bound)
    assert float((grouped - plain).abs().max()) > 1e-3
