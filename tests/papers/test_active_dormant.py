"""The experiment at its quick scale, and its statistics on constructed data."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from regard.coordinates import Head
from regard.instruments.domains import compare
from regard.papers import Run
from regard.papers import _bigram_backcopy_claims as claims
from regard.papers import _bigram_backcopy_runs as runs
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
    assert {"peak.svg", "domains.svg", "costs.svg", "flow.svg", "film-1-layer.png"} <= set(
        run.figures
    )


def arm(copies, seeds=2, times=6, layers=1):
    """A course in the plain form of a run: attention parks and drains when `copies`."""
    share = np.ones((times, seeds, layers))
    grown = np.log(np.arange(1, times + 1))[:, None, None] * share
    measures = {
        "ordinary to <s>": 0.95 * share,
        "trigger to <s>": 0.01 * share,
        "trigger to previous": 0.97 * share,
        "drain": 0.05 * share,
        "delta logit": 5 * grown,
        "spread": 0.1 * share,
        "peak": np.ones((times, seeds, layers + 1)) + np.arange(times)[:, None, None],
        "ordinary excess": np.zeros((times, seeds)),
        "trigger excess": np.full((times, seeds), 0.0 if copies else 3.0),
    }
    change = {"ordinary": [0.0] * seeds, "trigger": [4.0] * seeds}
    steps = list(range(1, times + 1))
    return {"steps": steps, "measures": measures, "interventions": {"zero": change, "park": change}}


def test_the_laboratory_decides_by_its_numbers(tmp_path):
    run = Run(paper.PAPER, scale="quick", work=tmp_path)
    scale = runs.Scale(steps=6, seeds=(0, 1))
    with_maps = lambda one: one | {"maps": np.zeros((6, 2, 2)).tolist()}  # noqa: E731
    claims.record_shallow(run, with_maps(arm(True)), scale)
    verdicts = {name: row["holds"] for name, row in run.records.items()}
    assert verdicts == dict.fromkeys(verdicts, True)
    claims.record_relu(run, with_maps(arm(True)), scale)
    assert run.records["toy relu"]["holds"] is False  # parked and drained
    claims.record_deep(run, with_maps(arm(True, layers=3)), with_maps(arm(False, layers=3)), scale)
    verdicts = {name: row["holds"] for name, row in run.records.items()}
    assert verdicts["toy grows"] is True
    assert verdicts["toy erased"] is False  # the peak is as high at the end as between blocks
    assert verdicts["toy peak"] is None and verdicts["toy sgd"] is None  # SGD has not learnt


def test_a_peak_that_adam_alone_has_and_erases_is_found(tmp_path):
    run = Run(paper.PAPER, scale="quick", work=tmp_path)
    adam, sgd = arm(True, layers=3), arm(True, layers=3)
    adam["measures"]["peak"][..., -1] = 1
    sgd["measures"]["peak"][:] = 1
    both = [one | {"maps": np.zeros((6, 2, 2)).tolist()} for one in (adam, sgd)]
    claims.record_deep(run, *both, runs.Scale(seeds=(0, 1)))
    assert {row["holds"] for row in run.records.values()} == {True}
    assert run.records["toy peak"]["here"] == 6


def test_the_flow_meets_its_closed_forms():
    found = runs.sink_slopes(2, euler=50.0)
    assert np.abs(found["slopes"] - 0.5).max() < 0.06 and found["euler"] < 1e-2
    # the local slope nears one half from above
    assert (np.diff(found["slopes"], axis=1).mean(1) < 0).all()
    (row,) = runs.drain_decay((3.0,))
    assert row["rate"] == pytest.approx(row["predicted"], rel=0.02) and row["left"] < 1e-4
