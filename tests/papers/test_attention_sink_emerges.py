"""The experiment at its quick scale, and its parts against independent computations."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from regard.papers import Run
from regard.papers import _sink_emergence_runs as runs
from regard.papers import attention_sink_emerges as paper
from regard.papers._partial import Partial


class Words:
    """A tokenizer that counts words."""

    vocab_size, all_special_ids = 64, [0, 1]

    def __call__(self, text, **rest):
        return {"input_ids": [len(word) for word in text.split()]}


def test_passages_begin_at_paragraphs_and_do_not_overlap():
    text = "\n\n".join(" ".join(["x" * (i + 1)] * 40) for i in range(8))
    rows = paper.passages(Words(), text, "\n\n", 3)
    assert rows.shape == (3, 64)
    assert rows[:, 0].tolist() == [1, 3, 5] and rows[:, -1].tolist() == [2, 4, 6]


def test_rates_are_those_of_eager_maps():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.4,
        attn_implementation="eager",
    )
    model = LlamaForCausalLM(config).eval()
    ids = torch.randint(64, (6, 64))
    found = paper.measure(model, ids)
    with torch.no_grad():
        maps = torch.stack(model(input_ids=ids, output_attentions=True).attentions)
    importance = maps.sum(-2) / torch.arange(64, 0, -1)
    rates = 100 * (importance[..., 0] > 0.3).float().mean((0, 2))
    torch.testing.assert_close(found["rates"], rates)
    positions = 100 * (importance[..., :16] > 0.3).float().mean((0, 1, 2))
    torch.testing.assert_close(found["by position"], positions)
    torch.testing.assert_close(found["importance"], importance[..., 0].mean(1), rtol=0, atol=1e-5)


def test_the_closed_forms_are_told_apart_from_ordinary_input(tmp_path):
    run = Run(paper.PAPER, scale="quick", work=tmp_path)
    paper.closed_forms(run)
    assert run.records["nope"]["holds"] and run.records["rope"]["holds"]
    assert run.records["nope"]["here"] < 1e-12
    assert 0.5 < run.records["rope"]["here"] <= 1
    model, rows = paper.random_llama(0, positions=False), paper.Rows()
    from regard.attach import Session

    with torch.inference_mode(), Session(model, rows):
        model(input_ids=torch.randint(128, (1, 64)))
    assert (rows.weights_of[0][0, :, -1] - 1 / 64).abs().max() > 0.05


@pytest.mark.model
@pytest.mark.papers
def test_the_quick_run_records_every_claim(tmp_path):
    run = Run(paper.PAPER, scale="quick", work=tmp_path)
    paper.experiment(run)
    assert {claim.id for claim in paper.PAPER.claims if not claim.beyond} == set(run.records)
    trained = {claim.id for claim in runs.claims()}
    assert all(row["holds"] for name, row in run.records.items() if name not in trained)
    assert run.records["trained start"]["holds"] is not False
    assert run.records["trained emerges"]["holds"] is not True
    assert len(run.figures) == 5 and all((tmp_path / name).stat().st_size for name in run.figures)


def test_training_in_pieces_is_training_at_once(tmp_path, monkeypatch):
    lab = replace(runs.QUICK, factors=("loss", "bias"), steps=2)
    names = ("default", "window of 16", "sink token", "K biases", "K biases, value of norm 20")
    courses = []
    for most in (3, 99):
        monkeypatch.setattr(runs, "AT_ONCE", most)
        kept = Partial(tmp_path / f"{most}.json")
        run = Run(paper.PAPER, scale="quick", work=tmp_path, partial=kept)
        courses.append(runs.follow(run, lab, [0, 1], names))
        # softmax, a token and learnt keys: two arms of two seeds are cut in two, one arm is not
        assert len(kept.values) == (5 if most == 3 else 3)
    pieces, whole = courses
    assert sorted(pieces.arms) == sorted(whole.arms) == sorted(names)
    assert pieces.seeds == whole.seeds == [0, 1]
    torch.testing.assert_close(pieces.loss, whole.loss)
    torch.testing.assert_close(pieces.rates, whole.rates)


def test_claims_without_a_sink_are_left_open(tmp_path):
    run = Run(paper.PAPER, scale="quick", work=tmp_path)
    runs.record_training(run)
    assert set(run.records) == {claim.id for claim in runs.claims()}
    compares = [name for name, one in runs.STATED.items() if one.compares]
    assert compares
    for name in compares:
        assert run.records[f"trained {name}"]["holds"] is None
        assert "no clear sink" in run.records[f"trained {name}"]["note"]


def test_every_arm_that_is_trained_has_a_claim():
    needed = {name for one in runs.STATED.values() for name in one.arms}
    assert needed == set(runs.TRAINED)
