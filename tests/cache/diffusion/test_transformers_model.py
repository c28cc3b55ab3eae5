from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import regard
from cache.diffusion import reference
from regard._errors import InputError, ModelError
from regard.cache.diffusion import (
    ElasticCache,
    FixedIntervalCache,
    NoCache,
    adapt,
    generate,
    load_denoiser,
)
from regard.cache.diffusion.checkpoints import LLADA_NAMES, LLADA_OUTER
from regard.instruments import Entropy

MASK, EOS = 62, 61
SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "max_position_embeddings": 64,
}


def bidirectional(model, tokens):
    """The model's own forward under a mask that hides nothing."""
    length = tokens.shape[1]
    return model(tokens, attention_mask=torch.zeros(1, 1, length, length), use_cache=False).logits


def tiny(kind, config):
    torch.manual_seed(0)
    return kind(config(**SHAPE)).eval()


@pytest.fixture
def tokens():
    found = torch.full((2, 20), MASK)
    found[0, :6], found[1, :4] = torch.arange(6), torch.arange(30, 34)
    return found


@torch.no_grad()
@pytest.mark.parametrize(
    "kind, config",
    [
        (LlamaForCausalLM, LlamaConfig),
        (Qwen2ForCausalLM, Qwen2Config),
        (Qwen3ForCausalLM, Qwen3Config),
    ],
)
def test_a_saved_model_decodes_as_its_plain_bidirectional_forward(tmp_path, tokens, kind, config):
    model = tiny(kind, config)
    model.config.mask_token_id = MASK
    model.config.eos_token_id = EOS
    model.save_pretrained(tmp_path)
    loaded = load_denoiser(tmp_path)
    assert (loaded.mask_token_id, loaded.eos_token_id, loaded.shift) == (MASK, EOS, 0)
    torch.testing.assert_close(loaded(tokens), bidirectional(model, tokens), atol=1e-4, rtol=1e-4)
    found = generate(loaded, tokens, NoCache(window=5), threshold=0.5)
    for row in range(2):
        steps = reference.decode(
            lambda x: bidirectional(model, x), tokens[row], MASK, EOS, 5, threshold=0.5
        )
        kept = found.decided_at[row] >= 0
        assert torch.equal(found.tokens[row][kept], steps[-1][2][kept])
        assert int(found.steps[row]) == len(steps)


@torch.no_grad()
def test_elastic_cache_runs_grouped_heads_as_the_plain_loop_does(tokens):
    model = tiny(Qwen2ForCausalLM, Qwen2Config)

    class Expanded:
        """One KV head for each query head, for the reference."""

        def __init__(self, block):
            self.block, self.finish = block, block.finish

        def project(self, hidden, positions):
            q, k, v = self.block.project(hidden, positions)
            return q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)

    denoiser = adapt(model, mask_token_id=MASK, eos_token_id=EOS)
    cache = ElasticCache(gamma=0.95, window=5)
    found = generate(denoiser, tokens, cache, threshold=0.4)
    denoiser.blocks = [Expanded(block) for block in denoiser.blocks]
    for row in range(2):
        expected, rs, _ = reference.elastic(denoiser, tokens[row], 5, 0.95, 0.4)
        kept = found.decided_at[row] >= 0
        assert torch.equal(found.tokens[row][kept], expected[kept])
        assert int(found.updates[row]) == sum(3 - max(r, 0) for r in rs)


@torch.no_grad()
def test_llada_weights_under_their_released_names(tmp_path, tokens):
    model = tiny(LlamaForCausalLM, LlamaConfig)
    inner = {new: old for old, new in LLADA_NAMES.items()}
    outer = {new: old for old, new in LLADA_OUTER.items()}
    weights = {}
    for name, tensor in model.state_dict().items():
        if name in outer:
            weights[outer[name]] = tensor.clone()
        else:
            _, _, layer, rest = name.split(".", 3)
            part, leaf = rest.rsplit(".", 1)
            weights[f"model.transformer.blocks.{layer}.{inner[part]}.{leaf}"] = tensor.clone()
    save_file(weights, tmp_path / "model.safetensors")
    config = {
        "model_type": "llada",
        "d_model": 32,
        "n_layers": 3,
        "n_heads": 4,
        "n_kv_heads": 2,
        "mlp_hidden_size": 48,
        "embedding_size": 64,
        "max_sequence_length": 64,
        "rms_norm_eps": model.config.rms_norm_eps,
        "rope_theta": 10000.0,
        "mask_token_id": MASK,
        "eos_token_id": EOS,
    }
    Path(tmp_path / "config.json").write_text(json.dumps(config))
    loaded = load_denoiser(tmp_path)
    torch.testing.assert_close(loaded(tokens), bidirectional(model, tokens), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_dream_reads_each_position_from_the_row_before_it(tmp_path, tokens):
    model = tiny(Qwen2ForCausalLM, Qwen2Config)
    with torch.no_grad():
        for layer in model.model.layers:  # released Dream weights have these biases
            layer.self_attn.q_proj.bias.normal_()
    save_file({n: t.clone() for n, t in model.state_dict().items()}, tmp_path / "model.safetensors")
    config = {**SHAPE, "model_type": "Dream", "rope_theta": 10000.0, "tie_word_embeddings": False}
    config |= {"mask_token_id": MASK, "eos_token_id": EOS}
    Path(tmp_path / "config.json").write_text(json.dumps(config))
    loaded = load_denoiser(tmp_path)
    assert loaded.shift == 1

    def shifted(x):
        logits = bidirectional(model, x)
        return torch.cat([logits[:, :1], logits[:, :-1]], 1)

    for cache in (NoCache(window=5), FixedIntervalCache(window=5, interval=1)):
        found = generate(loaded, tokens, cache, threshold=0.5)
        for row in range(2):
            steps = reference.decode(shifted, tokens[row], MASK, EOS, 5, threshold=0.5)
            kept = found.decided_at[row] >= 0
            assert torch.equal(found.tokens[row][kept], steps[-1][2][kept])
    reused = generate(loaded, tokens, ElasticCache(window=5, gamma=0.9), threshold=0.5)
    assert MASK not in reused.tokens and reused.rows_fraction < 1


def test_instruments_see_every_step(tokens):
    model = tiny(LlamaForCausalLM, LlamaConfig)
    denoiser = adapt(model, mask_token_id=MASK)
    instrument = Entropy()
    with regard.attach(model, instrument):
        generate(denoiser, tokens, ElasticCache(window=5))
    assert instrument.measures()["entropy"].matrix().shape == (3, 4)


def test_what_cannot_be_run_is_refused(tmp_path):
    llama = tiny(LlamaForCausalLM, LlamaConfig)
    with pytest.raises(InputError, match="mask_token_id"):
        adapt(llama)
    llama.config.block_size = 32
    with pytest.raises(InputError, match="block by block"):
        adapt(llama, mask_token_id=MASK)
    gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=64))
    with pytest.raises(ModelError, match="block layout"):
        adapt(gpt2, mask_token_id=MASK)
    gemma = Gemma2ForCausalLM(Gemma2Config(**{**SHAPE, "head_dim": 8})).eval()
    with pytest.raises(ModelError, match="differs from its own"):
        adapt(gemma, mask_token_id=MASK)
    with pytest.raises(ModelError, match=r"no config\.json"):
        load_denoiser(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llada"}')
    with pytest.raises(ModelError, match="has no 'vocab_size'"):
        load_denoiser(tmp_path)
