from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import regard
from regard.coordinates import Head
from regard.instruments.dormant import DormantHeads, dormant_heads
from regard.instruments.importance import head_importance
from regard.instruments.norms import HeadOutputNorms
from regard.instruments.results import HeadMeasure
from regard.instruments.sinks import SinkMass


def llama() -> LlamaForCausalLM:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=64, hidden_size=48, intermediate_size=48, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=6, head_dim=8, initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config).double().eval()


def measured() -> DormantHeads:
    def measure(name: str, values: list[float]) -> HeadMeasure:
        return HeadMeasure(name, "", {("", 0): torch.tensor(values)})

    return DormantHeads(
        {
            "sink": measure("sink", [0.9, 0.95, 0.85, 0.1, float("nan")]),
            "output": measure("output", [0.1, 0.2, 1.0, 0.3, 2.0]),
            "ablation": measure("ablation", [0.001, -0.2, 0.3, -0.001, 0.5]),
        },
        {"sink": 0.8, "output": 0.5, "ablation": 0.005},
    )


def test_sets_and_their_disagreement():
    result = measured()
    assert result.heads("sink") == {Head(0, 0), Head(0, 1), Head(0, 2)}
    assert result.heads("output") == {Head(0, 0), Head(0, 1), Head(0, 3)}
    assert result.heads("ablation") == {Head(0, 0), Head(0, 3)}
    assert result.agreed() == {Head(0, 0)}
    assert result.disagreement() == {
        ("sink", "output"): (1, 2, 1, 0.5),
        ("sink", "ablation"): (2, 1, 1, 0.25),
        ("output", "ablation"): (1, 2, 0, pytest.approx(2 / 3)),
    }
    assert result.sentence() == (
        "Of 5 heads, dormant are 3 by sink, 3 by output, 2 by ablation; 1 by every definition."
    )
    frame = result.to_frame()
    assert frame["dormant_sink"].to_list() == [True, True, True, False, False]
    assert result.plot() is not None


def test_measures_are_those_of_the_single_instruments():
    model, ids = llama(), torch.randint(2, 64, (2, 30))
    result = dormant_heads(model, ids)
    mass, norms = SinkMass(), HeadOutputNorms()
    with torch.no_grad(), regard.attach(model, mass, norms):
        model(ids)
    assert torch.equal(result.measures["sink"].matrix(), mass.compute()["sink mass"].matrix())
    written = norms.compute()["relative write norm"].matrix()
    assert torch.equal(result.measures["output"].matrix(), written)
    known = head_importance(model, ids)
    assert torch.equal(result.measures["ablation"].matrix(), known.change.matrix())
    again = dormant_heads(model, ids, importance=known)
    assert torch.equal(again.measures["ablation"].matrix(), known.change.matrix())


def test_a_planted_dormant_head_is_dormant_by_every_definition():
    """L1H3 gets a first value of zero, scores that only the first key answers, and a small output."""
    model, ids = llama(), torch.randint(2, 64, (2, 30))
    ids[:, 0] = 1
    attention = model.model.layers[1].self_attn
    attention.o_proj.weight.data[:, 24:32] *= 1e-3
    with regard.ablate(model, "L1H3", "sink"):
        result = dormant_heads(model, ids)
    assert Head(1, 3) in result.agreed()
    assert Head(0, 0) not in result.agreed()
