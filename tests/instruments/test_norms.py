from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import regard
from regard.instruments.norms import HeadOutputNorms, head_factors
from regard.instruments.outputs import MeanOutput
from regard.instruments.sinks import SinkMass


def llama() -> LlamaForCausalLM:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=64, hidden_size=48, intermediate_size=48, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=2, head_dim=8, initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config).double().eval()


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(1)
    config = GPT2Config(vocab_size=64, n_embd=48, n_layer=2, n_head=6, initializer_range=0.2)
    return GPT2LMHeadModel(config).double().eval()


def inputs_of(projections: list[nn.Module], model: nn.Module, **inputs: Tensor) -> list[Tensor]:
    """What enters each output projection, `[batch, tokens, heads, dim]`."""
    seen: list[Tensor] = []
    handles = [p.register_forward_pre_hook(lambda m, a: seen.append(a[0])) for p in projections]
    with torch.no_grad():
        model(**inputs)
    for handle in handles:
        handle.remove()
    return [x.unflatten(-1, (6, 8)) for x in seen]


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_norms_against_the_projection_itself(family, padding):
    if family == "llama":
        model = llama()
        projections = [layer.self_attn.o_proj for layer in model.model.layers]
        weights = [p.weight for p in projections]
    else:
        model = gpt2()
        projections = [block.attn.c_proj for block in model.transformer.h]
        weights = [p.weight.T for p in projections]
    ids = torch.randint(2, 64, (3, 15))
    mask = torch.ones_like(ids)
    if padding != "none":
        mask[1, slice(0, 4) if padding == "left" else slice(9, None)] = 0
    norms, mean = HeadOutputNorms(), MeanOutput()
    with torch.no_grad(), regard.attach(model, norms, mean):
        model(ids, attention_mask=mask)
        model(ids[:1], attention_mask=mask[:1])
    rows = [
        torch.cat([x[mask.bool()], x[0][mask[0].bool()]])
        for x in inputs_of(projections, model, input_ids=ids, attention_mask=mask)
    ]
    result = norms.compute()
    for layer, (row, weight) in enumerate(zip(rows, weights, strict=True)):
        before = row.norm(dim=-1).mean(0)
        written = (
            torch.einsum("nhd,mhd->nhm", row, weight.unflatten(1, (6, 8))).norm(dim=-1).mean(0)
        )
        for name, expected in (
            ("output norm", before),
            ("write norm", written),
            ("relative write norm", written / written.quantile(0.5)),
        ):
            found = result[name].values["", layer].double()
            torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(mean.compute()["", layer], row.mean(0), atol=1e-10, rtol=0)


def test_factors_keep_norms_also_when_heads_are_wider_than_the_stream():
    for hidden in (5, 24):
        weight, output = (
            torch.randn(hidden, 32, dtype=torch.float64),
            torch.randn(7, 4, 8, dtype=torch.float64),
        )
        factors = head_factors(weight, 4)
        found = torch.einsum("nhd,hrd->nhr", output, factors).norm(dim=-1)
        expected = torch.einsum("nhd,mhd->nhm", output, weight.unflatten(1, (4, 8))).norm(dim=-1)
        torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)


def test_merging_is_observing_both():
    model, ids = llama(), torch.randint(2, 64, (2, 9))
    both, one, other = HeadOutputNorms(), HeadOutputNorms(), HeadOutputNorms()
    for instrument, rows in ((both, ids[:1]), (both, ids[1:]), (one, ids[:1]), (other, ids[1:])):
        with torch.no_grad(), regard.attach(model, instrument):
            model(rows)
    merged = one.merge(other).compute()
    for name, measure in both.compute().items():
        assert torch.equal(measure.matrix(), merged[name].matrix())


def test_nothing_is_known_of_a_projection_that_is_not_linear():
    model, ids = llama(), torch.randint(2, 64, (1, 9))
    inner = model.model.layers[1].self_attn.o_proj
    model.model.layers[1].self_attn.o_proj = nn.Sequential(inner)
    norms = HeadOutputNorms()
    with torch.no_grad(), regard.attach(model, norms):
        model(ids)
    result = norms.compute()
    assert torch.isnan(result["write norm"].values["", 1]).all()
    assert torch.isfinite(result["write norm"].values["", 0]).all()
    assert torch.isfinite(result["output norm"].values["", 1]).all()


def test_the_table_has_all_three():
    model = llama()
    norms = HeadOutputNorms()
    with torch.no_grad(), regard.attach(model, norms):
        model(torch.randint(2, 64, (1, 9)))
    assert set(norms.to_frame()["measure"]) == {"output norm", "write norm", "relative write norm"}


def test_sampled_rows_give_the_norms_of_those_rows_with_their_error():
    model, ids = llama(), torch.randint(2, 64, (2, 40))
    exact, sampled, mass = HeadOutputNorms(), HeadOutputNorms(), SinkMass()
    with torch.no_grad(), regard.attach(model, exact):
        model(ids)
    with torch.no_grad(), regard.attach(model, sampled, mass, rows=1 / 4, seed=3):
        model(ids)
    whole, part = exact.compute(), sampled.compute()
    for name in ("output norm", "write norm"):
        expected, found = whole[name].matrix(), part[name].matrix()
        error = part[name].matrix(error=True)
        assert not torch.equal(found, expected)
        assert (error > 0).all()
        assert ((found - expected).abs() < 5 * error).all()
        assert not whole[name].error
