from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from regard.cli import app
from regard.texts import prose

runner = CliRunner(env={"COLUMNS": "200"})


@pytest.fixture(scope="module")
def directory(tmp_path_factory: Any, tiny_tokenizer: Any) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096, initializer_range=0.2,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("model") / "tiny"
    LlamaForCausalLM(config).save_pretrained(path)
    tiny_tokenizer.save_pretrained(path)
    (path / "text.txt").write_text(prose(6000))
    return path


def run(directory: Path, *options: str) -> Any:
    words = ["bench", str(directory), "--text", str(directory / "text.txt"), "--lengths", "700"]
    return runner.invoke(app, [*words, "--budgets", "0.2", "--documents", "2", *options])


def test_page_data_and_plan_are_written(directory: Path, tmp_path: Path):
    out, plan = tmp_path / "bench.html", tmp_path / "plan.json"
    result = run(
        directory, "--methods", "streaming,h2o+calibrated", "--out", str(out), "--plan", str(plan), "--max-kl", "50"
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "h2o+calibrated" in result.output and "plan:" in result.output
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {
        "bench.html",
        "bench.json",
        "bench.parquet",
        "plan.json",
    }  # no partial results left
    data = json.loads((tmp_path / "bench.json").read_text())
    assert data["complete"] and {row[3] for row in data["rows"]} == {
        "library",
        "full",
        "streaming",
        "h2o+calibrated",
    }
    import regard

    model = regard.load(directory)
    ids = model.tokenizer(prose(500), return_tensors="pt").input_ids
    with regard.apply(model, plan), torch.no_grad():
        cache = model(ids).past_key_values
    assert cache.memory() < 0.5 * 2 * 2 * 2 * 8 * 4 * ids.shape[1]


def test_ctrl_c_keeps_what_is_measured(directory: Path, tmp_path: Path, monkeypatch: Any):
    from regard.bench.store import Store

    put, count = Store.put, 0

    def stop_after_four(self: Store, name: str, value: Any) -> None:
        nonlocal count
        put(self, name, value)
        count += 1
        if count == 4:
            raise KeyboardInterrupt

    out = tmp_path / "bench.html"
    options = ["--methods", "streaming,h2o", "--out", str(out)]
    with monkeypatch.context() as patch:
        patch.setattr(Store, "put", stop_after_four)
        result = run(directory, *options)
    assert result.exit_code == 130
    assert "what is measured is in" in " ".join(result.output.split())
    half = json.loads((tmp_path / "bench.json").read_text())
    assert not half["complete"] and half["rows"]
    assert "Partial" in out.read_text()

    again = run(directory, *options)
    assert again.exit_code == 0, again.output
    whole = json.loads((tmp_path / "bench.json").read_text())
    assert whole["complete"] and len(whole["rows"]) > len(half["rows"])
    assert [row for row in half["rows"] if row in whole["rows"]] == half["rows"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--methods", "h3o"], "did you mean h2o"),
        (["--methods", ","], "at least one method"),
        (["--budgets", "0"], "budget must be"),
        (["--budgets", "1.5"], "budget must be"),
        (["--budgets", "9000"], "more than the context"),
        (["--lengths", "long"], "--lengths must be whole numbers"),
        (["--lengths", "9000"], "must have at least"),
        (["--max-kl", "0", "--plan", "p.json"], "--max-kl must be above 0"),
        (["--out", "."], "must be a file"),
        (["--text", "none.txt"], "does not exist"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    directory: Path, tmp_path: Path, monkeypatch: Any, options: list[str], message: str
):
    monkeypatch.chdir(tmp_path)
    result = run(directory, *options)
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
