"""Sparse-GIN on pretrained decoders: its equations on a Llama, training, generation, padding, and what does not fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import regard
from fixtures_models import tiny_llama
from regard._errors import AttachError, InputError
from regard.nn import LanguageModel, LanguageModelConfig
from regard.ops.graph_attention import self_loops, sparse_attention_graph
from regard.weights import SelfLoopGIN, SparseGIN, sparse_gin


def ids(*shape: int, seed: int = 2) -> torch.Tensor:
    return torch.randint(300, shape, generator=torch.Generator().manual_seed(seed))


def loud(gin: SparseGIN) -> SparseGIN:
    """With every number away from its start, so that nothing hides."""
    for parameter in gin.parameters():
        if parameter.ndim < 2:
            torch.nn.init.normal_(parameter, std=0.4)
    return gin.eval()


def by_hand(model: Any, gin: SparseGIN, tokens: torch.Tensor, loops: bool) -> torch.Tensor:
    """A Llama's forward with a graph network after each attention, written out."""
    model.set_attn_implementation("eager")
    body = model.model
    hidden = body.embed_tokens(tokens)
    places = torch.arange(tokens.shape[1])[None]
    mask = torch.full((tokens.shape[1],) * 2, -1e9).triu(1)[None, None]
    for block, net in zip(body.layers, gin.layers, strict=True):
        write, maps = block.self_attn(
            block.input_layernorm(hidden),
            attention_mask=mask,
            position_embeddings=body.rotary_emb(hidden, places),
        )
        x = hidden + write
        edges = sparse_attention_graph(maps.sum(1).clamp(max=1))
        edges = self_loops(edges) if loops else edges
        z = net.into(x)
        u = net.epsilon * z
        for b, i, j in edges.nonzero().tolist():
            u[b, i] += edges[b, i, j] * z[b, j]
        y = net.activation(net.second(net.activation(net.first(u))) + u)
        hidden = x + net.scale * net.norm(net.out(y))
        hidden = hidden + block.mlp(block.post_attention_layernorm(hidden))
    model.set_attn_implementation("sdpa")
    return model.lm_head(body.norm(hidden))


@pytest.mark.parametrize("kind", [SparseGIN, SelfLoopGIN])
@torch.no_grad()
def test_by_its_equations(kind: type[SparseGIN]) -> None:
    model = tiny_llama()
    gin = loud(sparse_gin(model, 5, kind=kind))
    tokens = ids(2, 12)
    with regard.attach(model, gin):
        found = model(tokens).logits
    expected = by_hand(model, gin, tokens, loops=kind is SelfLoopGIN)
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=2e-4)
    assert (found - model(tokens).logits).abs().max() > 0.1


def test_without_scale_and_once_detached_the_model_is_itself() -> None:
    model, tokens = tiny_llama(), ids(2, 12)
    plain = model(tokens).logits
    gin = sparse_gin(model, 5, scale=(0.0, 0.0)).eval()
    with regard.attach(model, gin):
        torch.testing.assert_close(model(tokens).logits, plain, atol=1e-5, rtol=1e-5)
    assert torch.equal(model(tokens).logits, plain)


def test_the_start_of_the_scales() -> None:
    gin = SparseGIN(5, 64)
    assert gin.scales.tolist() == [0.0, 0.125, 0.25, 0.375, 0.5]
    assert SparseGIN(1, 3072).layers[0].into.out_features == 155


def test_learns_while_the_model_stays() -> None:
    model, tokens = tiny_llama(), ids(4, 16)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    gin = sparse_gin(model, 8, dropout=0.0)
    optimiser = torch.optim.AdamW(gin.parameters(), lr=1e-2)
    losses = []
    with regard.attach(model, gin):
        for _ in range(30):
            loss = model(tokens, labels=tokens).loss
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.2
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in gin.parameters())


def test_gradients_go_through_the_graph() -> None:
    model, tokens = tiny_llama(), ids(1, 12)
    gin = loud(sparse_gin(model, 4))
    with regard.attach(model, gin):
        for _ in range(2):
            gin.zero_grad()
            model(tokens, labels=tokens).loss.backward()
        through = gin.layers[0].out.weight.grad.clone()
        plain = gin.graph
        gin.graph = lambda shared: plain(shared.detach())  # type: ignore[method-assign]
        gin.zero_grad()
        model(tokens, labels=tokens).loss.backward()
    assert not torch.allclose(gin.layers[0].out.weight.grad, through)


@torch.no_grad()
@pytest.mark.parametrize("make", ["llama", "own"])
def test_generates_what_it_would_without_a_cache(make: str) -> None:
    model: Any = tiny_llama()
    if make == "own":
        model = LanguageModel(
            LanguageModelConfig(vocab_size=300, hidden_size=32, num_hidden_layers=2)
        ).eval()
    gin, prompt = loud(sparse_gin(model, 5)), ids(2, 9)
    with regard.attach(model, gin):
        found = model.generate(prompt, max_new_tokens=10, do_sample=False, eos_token_id=None)
        plain = prompt
        for _ in range(10):
            logits = model(plain, use_cache=False).logits
            plain = torch.cat([plain, logits[:, -1:].argmax(-1)], 1)
        assert torch.equal(found, plain)


@torch.no_grad()
def test_searches_with_beams() -> None:
    model, prompt = tiny_llama(), ids(1, 9)
    gin = loud(sparse_gin(model, 5))
    settings: dict[str, Any] = {"max_new_tokens": 8, "num_beams": 4, "do_sample": False}
    settings |= {"return_dict_in_generate": True, "output_scores": True}
    with regard.attach(model, gin):
        found = model.generate(prompt, **settings)
        without = model.generate(prompt, use_cache=False, **settings)
    assert torch.equal(found.sequences, without.sequences)
    torch.testing.assert_close(
        found.sequences_scores, without.sequences_scores, atol=1e-4, rtol=1e-4
    )


@torch.no_grad()
def test_padding_on_the_left_changes_nothing() -> None:
    model, text = tiny_llama(), ids(1, 9)
    gin = loud(sparse_gin(model, 5))
    padded, mask = torch.cat([ids(1, 4, seed=5), text], 1), torch.ones(1, 13, dtype=torch.long)
    mask[:, :4] = 0
    with regard.attach(model, gin):
        alone = model(text).logits
        places = (mask.cumsum(1) - 1).clamp_min(0)
        found = model(padded, attention_mask=mask, position_ids=places).logits
    torch.testing.assert_close(found[:, 4:], alone, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_another_architecture() -> None:
    config = GPT2Config(vocab_size=300, n_embd=32, n_layer=3, n_head=4, n_positions=64)
    model = GPT2LMHeadModel(config).eval()
    gin = loud(sparse_gin(model))
    with regard.attach(model, gin):
        assert (model(ids(1, 8)).logits - model(ids(1, 8, seed=3)).logits).abs().max() > 0
    assert len(gin.layers) == 3 and gin.layers[0].into.in_features == 32


def test_mistakes_are_named() -> None:
    model = tiny_llama()
    with pytest.raises(InputError, match="would be edges"):
        sparse_gin(model, 4, keep=0.2)
    with pytest.raises(InputError, match="hidden"):
        sparse_gin(model, 0)
    with (
        pytest.raises(InputError, match="3 layers, LlamaForCausalLM has 2"),
        regard.attach(model, SparseGIN(3, 64)),
    ):
        pass
    with pytest.raises(InputError, match="no stack"):
        sparse_gin(torch.nn.Linear(2, 2))
    gin = sparse_gin(model, 4).eval()
    cache = model(ids(1, 6), use_cache=True).past_key_values
    with (
        regard.attach(model, gin),
        pytest.raises(AttachError, match="begin the text anew"),
        torch.no_grad(),
    ):
        model(ids(1, 1), past_key_values=cache)
