"""The experiment at its quick scale, and its statistics on constructed data."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from regard.coordinates import Head
from regard.instruments.domains import compare
from regard.papers import Run
from regard.papers import active_dormant as paper


def scores(gap, heads=6, windows=30):
    generator = torch.Generator().manual_seed(3)
    tables = [0.5 + 0.05 * torch.randn(windows, heads, generator=generator) for _ in range(2)]
    tables[0][:, :4] += gap
    return {
        name: {("", 0): table[:, :3], ("", 1): table[:, 3:]}
        for name, table in zip(("code", "prose"), tables, strict=True)
    }


def test_switching_heads_are_counted_and_tested():
    found = paper.count_switching(compare(scores(0.3), window=8, permutations=99), 400)
    assert found == (4, 1 / 401)
    none, chance = paper.count_switching(compare(scores(0.0), window=8, permutations=99), 400)
    assert (none, chance) == (0, 1.0)


def test_the_interval_of_a_difference_covers_it():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(400, generator=generator) + 1, torch.randn(400, generator=generator)
    low, high = paper.interval(a, b)
    assert low < 1 < high and 0.2 < high - low < 0.4
    assert paper.interval(torch.full((5,), 2.0)) == (2.0, 2.0)


def test_the_cost_of_a_head_is_that_of_its_zeroed_projection():
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
    model, ids = LlamaForCausalLM(config).eval(), torch.randint(64, (10, 12))
    plain, without = paper.loss(model, ids, None), paper.loss(model, ids, Head(1, 2))
    with torch.no_grad():
        expected = [float(model(input_ids=row[None], labels=row[None]).loss) for row in ids]
        torch.testing.assert_close(torch.tensor(plain), torch.tensor(expected), rtol=0, atol=1e-5)
        model.model.layers[1].self_attn.o_proj.weight[:, 16:24] = 0
        expected = [float(model(input_ids=row[None], labels=row[None]).loss) for row in ids]
    torch.testing.assert_close(torch.tensor(without), torch.tensor(expected), rtol=0, atol=1e-5)


@pytest.mark.model
@pytest.mark.papers
def test_the_quick_run_records_every_claim(tmp_path):
    run = Run(paper.PAPER, scale="quick", work=tmp_path)
    paper.experiment(run)
    assert {claim.id for claim in paper.PAPER.claims if not claim.beyond} == set(run.records)
    assert all(run.records[name]["holds"] for name in ("drain", "peak", "erased", "written"))
    assert run.figures == ["peak.svg", "domains.svg", "costs.svg"]
