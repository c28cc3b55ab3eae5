"""`regard.report` on tiny random models: every section, every refusal, and nothing left behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import tiny_config

import regard
from fixtures_models import tiny_llama
from regard._errors import AttachError, InputError, ModelError, OutputError
from regard.cache import H2O
from regard.engine import Block, Method
from regard.instruments.sinks import Sinks
from regard.report.budget import budget
from regard.report.collect import report
from regard.report.reading import _pool

TEXT = "The library keeps books about gardens, ships and clocks. " * 4


@pytest.fixture()
def model(tiny_tokenizer: Any) -> Any:
    subject = tiny_llama()
    subject.tokenizer = tiny_tokenizer
    return subject


def test_quick_report_has_every_reading_and_writes_three_files(model: Any, tmp_path: Path) -> None:
    found = regard.report(model, TEXT, out=tmp_path / "page.html", quick=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["page.html", "page.json", "page.parquet"]
    stack = found.data.stacks[0]
    keys = {m.key for m in stack.measures}
    assert {
        "sink",
        "entropy",
        "distance",
        "waad",
        "fai",
        "local",
        "global",
        "drain",
        "output_norm",
    } <= keys
    assert all(m.values.shape == (2, 4) for m in stack.measures)
    assert stack.sequence is not None and len(stack.sequence.tokens) == found.data.header.tokens
    assert "".join(stack.sequence.tokens) == TEXT
    assert len(stack.cards) == 8 and stack.skyline is not None and stack.budget is not None
    assert found.data.header.equality is not None and found.data.header.equality < 1e-4
    json.loads((tmp_path / "page.json").read_text())


def test_full_report_measures_ablation_probes_and_domains(model: Any) -> None:
    model.config.max_position_embeddings = (
        4096  # rotary embeddings reach farther; needles need 300 tokens
    )
    found = report(model, TEXT, seed=3)
    stack = found.data.stacks[0]
    keys = {m.key for m in stack.measures}
    assert {"ablation", "previous_token", "duplicate_token", "induction"} <= keys
    assert len(stack.probes) == 3 and all(
        p.proof and len(p.proof.controls) == 8 for p in stack.probes
    )
    assert stack.domains is not None and len(stack.dormant) == 3
    assert stack.retrieval is not None and stack.retrieval.runs == 9
    assert found.data.findings and all(f.sentence.endswith(".") for f in found.data.findings)
    assert found.html().startswith("<!doctype html>") or found.html().startswith("<!DOCTYPE html>")


def test_sampled_report_says_so_and_carries_errors(model: Any) -> None:
    found = report(model, TEXT, rows=1 / 4, quick=True)
    assert found.data.header.sampled and found.data.header.rows == 1 / 4
    entropy = next(m for m in found.data.stacks[0].measures if m.key == "entropy")
    assert entropy.error is not None and (entropy.error > 0).all()
    exact = report(model, TEXT, rows=1.0, quick=True)
    full = next(m for m in exact.data.stacks[0].measures if m.key == "entropy")
    assert (abs(entropy.values - full.values) < 6 * entropy.error + 1e-6).all()


def test_an_encoder_gets_a_report_without_decoder_sections(tiny_tokenizer: Any) -> None:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=320,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
    )
    bert = BertModel(config).eval()
    found = report(bert, TEXT, tokenizer=tiny_tokenizer)
    stack = found.data.stacks[0]
    assert not stack.causal and stack.budget is None
    assert any("causal language model" in line for line in found.data.limits)
    assert {"entropy", "distance"} <= {m.key for m in stack.measures}


@pytest.mark.parametrize(
    ("family", "holds"),
    [("jamba", [False, True]), ("gemma3n_text", [True, True, True, False])],
)
def test_layers_without_keys_of_their_own(
    family: str, holds: list[bool], tiny_tokenizer: Any
) -> None:
    found = report(tiny(family), TEXT[:100], tokenizer=tiny_tokenizer, quick=True)
    stack = found.data.stacks[0]
    assert stack.budget is not None and len(stack.budget.levels) == 3
    assert all(np.isfinite(level.retained).tolist() == holds for level in stack.budget.levels)
    assert stack.sequence is not None and stack.sequence.kept is not None
    assert "hold " in found.html() and ">nan<" not in found.html().lower()


def test_a_section_that_a_model_refuses_is_named_and_the_rest_is_there(tiny_tokenizer: Any) -> None:
    found = report(tiny("minimax"), TEXT[:100], tokenizer=tiny_tokenizer, quick=True)
    assert found.data.stacks[0].budget is None
    assert any("Key-value budget: not measured (MiniMax" in line for line in found.data.limits)


def tiny(family: str) -> Any:
    from transformers import AutoModelForCausalLM

    config = tiny_config(family)
    config.vocab_size = 320
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def test_refusals_come_before_work(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(OutputError):
        report(model, TEXT, out=tmp_path / "missing" / "page.html")
    with pytest.raises(InputError, match="empty"):
        report(model, "  \n ")
    with pytest.raises(InputError, match="context is 256"):
        report(model, TEXT * 30)
    with pytest.raises(InputError, match="rows"):
        report(model, TEXT, rows=2.0)
    with pytest.raises(InputError, match="at least 2"):
        report(model, TEXT, tokens=1)
    with pytest.raises(InputError, match="training mode"):
        report(model.train(), TEXT)


def test_tokens_cut_a_long_text(model: Any) -> None:
    assert report(model, TEXT * 30, tokens=40, quick=True).data.header.tokens == 40


def test_nan_weights_are_named(model: Any, tmp_path: Path) -> None:
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises((ModelError, AttachError), match=r"NaN|up_proj"):
        report(model, TEXT, out=tmp_path / "page.html", quick=True)
    assert not list(tmp_path.iterdir())


def test_an_interrupt_restores_the_model_and_leaves_no_file(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(self: Any, block: Any) -> None:
        raise KeyboardInterrupt

    before = model.config._attn_implementation
    with monkeypatch.context() as patch:
        patch.setattr(Sinks, "weights", stop)
        with pytest.raises(KeyboardInterrupt):
            report(model, TEXT, out=tmp_path / "page.html", quick=True)
    assert model.config._attn_implementation == before
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    assert not list(tmp_path.iterdir())


def test_the_budget_is_what_a_cache_holds(model: Any) -> None:
    ids = torch.randint(0, 320, (1, 160), generator=torch.Generator().manual_seed(0))
    mass = np.random.default_rng(0).random((2, 4, 160))
    found = budget(model, ids, mass)
    assert [level.fraction for level in found.levels] == [0.1, 0.2, 0.5]
    assert found.bytes_per_token == 2 * 2 * 2 * 16 * 4
    for level in found.levels:
        assert level.low <= level.delta <= level.high
        with H2O(model, budget=level.fraction) as cache:
            cache.prefill(ids)
            held = np.zeros((2, 2, 160), dtype=bool)
            for layer in range(2):
                for head in range(2):
                    held[layer, head, cache.kept(layer, head)] = True
        assert held.sum(-1).tolist() == [[round(level.fraction * 160)] * 2] * 2
        np.testing.assert_array_equal(level.kept, held.mean(1))
        expected = (mass * held.repeat(2, axis=1)).sum((1, 2)) / mass.sum((1, 2))
        np.testing.assert_allclose(level.retained, expected)


def test_the_cost_is_that_of_hidden_keys(model: Any) -> None:
    """Against the untouched model with the forgotten keys masked, head by head, in every later row."""
    ids = torch.randint(0, 320, (1, 160), generator=torch.Generator().manual_seed(3))
    found = budget(model, ids, np.ones((2, 4, 160)))
    prefix = 120
    with H2O(model, budget=0.2) as cache:
        cache.prefill(ids[:, :prefix])
        kept = [[cache.kept(layer, head) for head in range(2)] for layer in range(2)]

    class Hide(Method):
        def scores(self, block: Block) -> torch.Tensor | None:
            scores = block.scores.clone()
            for head in range(4):
                gone = torch.ones(160, dtype=torch.bool)
                gone[kept[block.site.layer][head // 2]] = False
                gone[prefix:] = False
                rows = (block.positions >= prefix)[:, None]
                scores[:, head].masked_fill_(rows & gone[block.keys], float("-inf"))
            return scores

    def losses() -> torch.Tensor:
        logits = model(ids[:, :-1]).logits[0, prefix:].float()
        return torch.nn.functional.cross_entropy(logits, ids[0, prefix + 1 :], reduction="none")

    with torch.no_grad():
        plain = losses()
        with regard.attach(model, Hide()):
            change = (losses() - plain).mean()
    assert found.levels[1].delta == pytest.approx(float(change), abs=1e-5)


def test_pooling() -> None:
    assert _pool(np.arange(8.0), 4).tolist() == [0.5, 2.5, 4.5, 6.5]
    assert _pool(np.array([1.0, np.nan]), 4).tolist() == [1.0, 0.0, 0.0, 0.0]
