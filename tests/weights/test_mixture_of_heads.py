"""Pretrained models as mixtures of heads: exact on active heads, gone afterwards."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import regard
from regard._errors import InputError
from regard.engine import AttentionCall, Method
from regard.weights import QueryNormHeads, lora, mixture_of_heads
from regard.weights.mixture_of_heads import spread_heads


def tiny(heads: int = 6, kv_heads: int = 3) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=60,
        hidden_size=8 * heads,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def test_a_token_keeps_the_heads_with_the_longest_queries_exactly() -> None:
    class Outputs(Method):
        def heads(self, call: AttentionCall, output: Tensor) -> None:
            found.append(output.clone())

    found: list[Tensor] = []
    model, ids = tiny(), torch.randint(60, (2, 11))
    mixture = QueryNormHeads(shared=2, active=3)
    with torch.no_grad(), regard.attach(model, Outputs(), mixture, Outputs()):
        model(ids)
    plain, gated = found[0], found[1]  # of the first layer, before and after
    layer = model.model.layers[0]
    hidden = layer.input_layernorm(model.model.embed_tokens(ids))
    query = layer.self_attn.q_proj(hidden).unflatten(-1, (6, 8))  # before rotary positions
    longest = query.norm(dim=-1)[..., 2:].topk(3, -1).indices + 2
    on = torch.zeros(2, 11, 6, dtype=torch.bool)
    on[..., :2] = True
    on.scatter_(-1, longest, True)
    on = on.transpose(1, 2)
    assert torch.equal(gated[on], plain[on])
    assert not gated[~on].any()
    assert torch.equal(mixture.chosen["", 0], on.transpose(1, 2)[..., 2:])


def test_nothing_is_left_behind() -> None:
    model, ids = tiny(), torch.randint(60, (1, 11))
    before, weights = model(ids).logits, copy.deepcopy(model.state_dict())
    with mixture_of_heads(model, 0.67):
        assert (model(ids).logits - before).abs().max() > 1e-4
    assert torch.equal(model(ids).logits, before)
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())


def test_all_heads_on_change_nothing() -> None:
    model, ids = tiny(), torch.randint(60, (1, 11))
    before = model(ids).logits
    with regard.attach(model, QueryNormHeads(shared=[0, 3], active=4)):
        torch.testing.assert_close(model(ids).logits, before)


def test_generates_as_it_reads() -> None:
    model, ids = tiny(), torch.randint(60, (2, 7))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with mixture_of_heads(model, 0.67):
        found = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
        alone = model.generate(ids[:1, 3:], max_new_tokens=6, do_sample=False)
        plain = ids[1:]
        for _ in range(6):
            plain = torch.cat([plain, model(plain).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(found[1:], plain)
    assert torch.equal(found[0, 7:], alone[0, 4:])


def test_trains_with_adapters_and_balance() -> None:
    pytest.importorskip("peft")
    model = lora(tiny(), r=2, extra=())
    mixture, ids = QueryNormHeads(shared=2, active=2), torch.randint(60, (2, 11))
    with regard.attach(model, mixture):
        with pytest.raises(InputError, match="no forward pass"):
            mixture.loss()
        loss = model(input_ids=ids, labels=ids).loss
        assert 0.015 < float(mixture.loss()) < 0.041  # 0.01 x (2 when even, 4 at most)
        (loss + mixture.loss()).backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(grad is not None for grad in grads.values())
    assert any("q_proj.lora_B" in name and grad.any() for name, grad in grads.items())  # type: ignore[union-attr]


def test_heads_spread_over_the_groups() -> None:
    assert spread_heads(9, 3, 5) == [0, 1, 3, 4, 6]
    assert spread_heads(8, 2, 4) == [0, 1, 4, 5]
    assert spread_heads(4, 4, 2) == [0, 1]
    for count in range(10):
        sizes = [sum(h // 3 == g for h in spread_heads(9, 3, count)) for g in range(3)]
        assert max(sizes) - min(sizes) <= 1 and sum(sizes) == count


def test_bad_input() -> None:
    model, ids = tiny(), torch.randint(60, (1, 5))
    with pytest.raises(InputError, match="share"):
        mixture_of_heads(model, 0.5)
    with pytest.raises(InputError, match="heads"):
        mixture_of_heads(torch.nn.Linear(2, 2))
    with pytest.raises(InputError, match="active"):
        QueryNormHeads(shared=2, active=0)
    with (
        pytest.raises(InputError, match="fit into 6 heads"),
        regard.attach(model, QueryNormHeads(4, 3)),
    ):
        model(ids)
    with pytest.raises(InputError, match="kv_heads"):
        spread_heads(9, 4, 2)
