"""The phase gate in a model, and the experiment at its quick scale."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from regard.attach import Session
from regard.engine import Block, Method
from regard.labs.brain_basis import Walk
from regard.papers import Run
from regard.papers import _brain_basis_runs as runs
from regard.papers import brain_basis as paper


class Rows(Method):
    """Keeps all rows of the first layer."""

    reads_only = True
    kept: torch.Tensor

    def weights(self, block: Block) -> None:
        if block.site.layer == 0:
            self.kept = block.weights.clone()


def small() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


def test_the_gate_multiplies_weights_by_the_exponential_of_its_cosine():
    model, ids = small(), torch.randint(64, (2, 20))
    plain, gated = Rows(), Rows()
    with torch.inference_mode():
        with Session(model, plain):
            model(input_ids=ids)
        with Session(model, runs.PhaseGate(0.8, 12), gated):
            model(input_ids=ids)
    apart = torch.arange(20)[:, None] - torch.arange(20)
    expected = plain.kept * torch.exp(0.8 * torch.cos(2 * math.pi * apart / 12))
    expected = expected / expected.sum(-1, keepdim=True)
    torch.testing.assert_close(gated.kept, expected)
    assert (gated.kept - plain.kept).abs().max() > 0.01


def test_a_gate_of_zero_changes_nothing():
    model, ids = small(), torch.randint(64, (2, 20))
    with torch.inference_mode():
        with Session(model, Rows()):
            plain = model(input_ids=ids).logits
        with Session(model, runs.PhaseGate(0.0), Rows()):
            gated = model(input_ids=ids).logits
    assert torch.equal(plain, gated)


def test_roughness_is_nothing_for_a_parabola_and_large_for_a_step():
    assert runs.roughness([0, 1, 2, 3, 4], [0, 1, 4, 9, 16]) < 1e-9
    assert runs.roughness([0, 1, 2, 3, 4], [0, 0, 0, 1, 1]) > 0.1


def test_walks_are_told_with_the_seeds_inside_their_ranges():
    on = np.array([[0] * 10 + [1] * 10, [0] * 20])
    said = runs.told(Walk(on, np.ones((2, 20))), ((2, 3), (9, 11), (0.9, 1.0)))
    assert said == (
        "1 to 2 keys, 10 to 20 steps each, one on for 100% to 100% of the time; 1 of 2 seeds inside"
    )


@pytest.mark.model
@pytest.mark.papers
def test_the_quick_run_records_every_claim(tmp_path):
    run = Run(paper.PAPER, scale="quick", work=tmp_path)
    paper.experiment(run)
    assert {claim.id for claim in paper.PAPER.claims if not claim.beyond} == set(run.records)
    for name in ("retrieval", "warm", "leak", "closed form", "silent", "phases", "identity"):
        assert run.records[name]["holds"] is True, run.records[name]
    assert len(run.figures) == 7 and all((tmp_path / name).stat().st_size for name in run.figures)
