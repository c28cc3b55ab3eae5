from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest

import regard
from fixtures_models import tiny_llama
from regard._errors import InputError
from regard.bench import Bench, read, save, summary
from regard.bench.planning import best_setting, make_plan, parse_size
from regard.bench.results import FULL, LIBRARY, QUALITY, Results, Setting
from regard.texts import prose

OPTIONS: dict[str, Any] = {
    "methods": ["streaming", "h2o", "h2o+global", "cake", "expected+calibrated", "kvzip"],
    "budgets": [0.2, 40],
    "lengths": [700],
    "documents": 2,
}


@pytest.fixture(scope="module")
def model(tiny_tokenizer: Any) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096, initializer_range=0.2,
    )  # fmt: skip
    found = LlamaForCausalLM(config).eval()
    found.tokenizer = tiny_tokenizer
    return found


@pytest.fixture(scope="module")
def results(model: Any) -> Results:
    return regard.bench(model, prose(8000), **OPTIONS)


def test_every_setting_has_every_measure(results: Results):
    assert results.complete
    settings = results.settings()
    assert len(settings) == 2 + 6 * 2
    for setting in settings:
        assert results.estimate(setting, "decode").mean > 0
        assert results.estimate(setting, "floor").mean > 0
        if setting.method != LIBRARY:
            assert all(results.estimate(setting, measure) is not None for measure in QUALITY)
            assert len(results.by_document(setting, "kl")) == 2
    timed = [s for s in settings if results.estimate(s, "prefill")]
    assert {s.method for s in timed} == {s.method for s in settings}
    assert len(results.texts) == len(settings)


def test_the_full_cache_is_the_reference(results: Results):
    full = Setting(700, FULL, "1")
    assert results.estimate(full, "kl").mean == 0
    assert results.estimate(full, "top1").mean == 1
    assert results.lost(full, "needle").mean == 0


def test_memory_is_what_was_asked_for(results: Results):
    for method in ("streaming", "h2o", "h2o+global", "expected+calibrated", "kvzip"):
        kept = results.estimate(Setting(700, method, "40"), "kept").mean
        assert 40 / 700 <= kept < 0.5  # beside the keys, positions and the scorer's own numbers
    small = results.estimate(Setting(700, "streaming", "40"), "bytes").mean
    large = results.estimate(Setting(700, "streaming", "0.2"), "bytes").mean
    assert small < large < results.estimate(Setting(700, LIBRARY, "1"), "bytes").mean


def test_compressing_hurts(results: Results):
    assert results.estimate(Setting(700, "streaming", "40"), "kl").mean > 1e-4


def test_an_interrupted_bench_goes_on_where_it_stopped(
    model: Any, tmp_path: Path, results: Results
):
    keep = tmp_path / "cells.jsonl"
    first = Bench(model, prose(8000), keep=keep, **OPTIONS)
    put, count = first.store.put, 0

    def stop_after_ten(name: str, value: Any) -> None:
        nonlocal count
        put(name, value)
        count += 1
        if count == 10:
            raise KeyboardInterrupt

    first.store.put = stop_after_ten  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        first.run()
    half = first.results()
    assert not half.complete and half.rows
    save(half, tmp_path / "half.html")  # what is measured can be looked at

    second = Bench(model, prose(8000), keep=keep, **OPTIONS)
    assert second.store.resumed
    kept = dict(second.store.cells)
    whole = second.run()
    assert whole.complete
    assert all(second.store.cells[name] == value for name, value in kept.items())
    for setting in whole.settings():
        ours, theirs = whole.estimate(setting, "needle"), results.estimate(setting, "needle")
        assert (ours is None) == (theirs is None)
        assert ours is None or ours.mean == pytest.approx(theirs.mean, abs=1e-5)


def test_cells_of_another_text_are_not_reused(model: Any, tmp_path: Path):
    keep = tmp_path / "cells.jsonl"
    options = {**OPTIONS, "methods": ["streaming"], "documents": 1, "timed": False}
    Bench(model, prose(8000), keep=keep, **options).run()
    again = Bench(model, prose(8000, seed=1), keep=keep, **options)
    assert not again.store.resumed and not again.results().rows


def test_results_are_saved_and_read_back(results: Results, tmp_path: Path):
    import polars as pl

    page, data, table = save(results, tmp_path / "bench.html")
    assert read(data).rows == results.rows
    assert "<h1>" in page.read_text()
    frame = pl.read_parquet(table)
    assert len(frame) == len(results.rows)
    assert set(frame["measure"].unique()) >= {"kl", "needle", "bytes", "decode"}
    with pytest.raises(InputError, match="not the results of a bench"):
        read(page)


def test_the_summary_prints(results: Results):
    from rich.console import Console

    console = Console(width=200, record=True, file=io.StringIO())
    console.print(summary(results))
    text = console.export_text()
    assert "expected+calibrated" in text and "40 tokens" in text


def test_a_plan_comes_out(results: Results, model: Any, tmp_path: Path):
    from regard.plan import Plan

    setting = best_setting(results, max_kl=100.0)
    kept = [
        results.estimate(s, "kept").mean
        for s in results.settings()
        if s.method not in (FULL, LIBRARY)
    ]
    assert results.estimate(setting, "kept").mean <= 1.05 * min(kept)
    plan = make_plan(results, model, 100.0)
    assert plan.expected["kept"] < 0.5
    assert Plan.load(plan.save(tmp_path / "plan.json")) == plan
    with regard.apply(model, plan):
        pass


def test_a_plan_that_cannot_be_kept(results: Results, model: Any):
    with pytest.raises(
        InputError, match=r"no setting stays within a KL of 1e-12 nats; the closest is"
    ):
        make_plan(results, model, 1e-12)
    with pytest.raises(InputError, match="max-kl must be above 0"):
        make_plan(results, model, 0.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"methods": ["h3o"]}, "did you mean h2o"),
        ({"methods": []}, "at least one method"),
        ({"budgets": [0.0]}, "budget must be"),
        ({"budgets": [1.5]}, "budget must be"),
        ({"budgets": [800]}, "more than the context of 700 holds"),
        ({"budgets": ["many"]}, "budget must be"),
        ({"lengths": [100]}, "at least 256"),
        ({"lengths": [30_000]}, "the text must have at least"),
        ({"documents": 0}, "documents must be at least 1"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_before_any_work(model: Any, change: dict[str, Any], message: str):
    with pytest.raises(InputError, match=message):
        Bench(model, prose(8000), **{**OPTIONS, **change})


def test_a_model_without_a_cache_is_refused(tiny_tokenizer: Any):
    from transformers import BertConfig, BertModel

    bert = BertModel(
        BertConfig(
            vocab_size=320,
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
        )
    )
    bert.tokenizer = tiny_tokenizer
    with pytest.raises(InputError, match="KV cache"):
        Bench(bert, prose(8000), **OPTIONS)


def test_budgets_as_the_command_line_takes_them():
    assert [parse_size(text) for text in ("0.2", "512", "64MB")] == [0.2, 512, "64MB"]


def test_the_model_is_left_as_it_was(model: Any, results: Results):
    import gc

    gc.collect()
    assert model.config._attn_implementation == tiny_llama().config._attn_implementation
    assert not model._forward_pre_hooks
