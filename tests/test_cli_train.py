"""`regard train`: trains, draws, goes on after an interruption, and refuses what cannot be."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from regard.cli import app
from regard.nn import LanguageModel

SMALL = ("--layers", "1", "--width", "16", "--heads", "2", "--batch", "4", "--length", "32")


def call(*args: str) -> Result:
    return CliRunner().invoke(app, ["train", *args], env={"COLUMNS": "200", "TERM": "dumb"})


def test_trains_a_hybrid_and_draws_its_loss(tmp_path: Path) -> None:
    out = tmp_path / "made"
    result = call(
        "--mixer", "sliding,softmax", "--task", "induction", "--steps", "20", "--out", str(out),
        "--layers", "2", *SMALL[2:],
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "held out:" in result.stdout and "loss " in result.stdout
    assert {"model.safetensors", "config.json", "loss.png"} <= {p.name for p in out.iterdir()}
    model = LanguageModel.from_pretrained(out)
    assert [type(m).__name__ for m in model.mixers] == [
        "SlidingWindowAttention",
        "SoftmaxAttention",
    ]


def test_a_second_call_goes_on(tmp_path: Path) -> None:
    args = ("--task", "recall", "--steps", "10", "--out", str(tmp_path / "made"), *SMALL)
    first, second = call(*args), call(*args)
    assert first.exit_code == second.exit_code == 0, second.output
    assert first.stdout.splitlines()[1:] == second.stdout.splitlines()[1:]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--mixer", "sofmax"), "did you mean softmax"),
        (("--task", "recal"), "did you mean recall"),
        (("--width", "30", "--heads", "4"), "30"),
        (("--rate", "-1"), "rate must be above 0"),
        (("--steps", "0"), "--steps"),
    ],
)
def test_refuses(args: tuple[str, ...], said: str, tmp_path: Path) -> None:
    result = call("--steps", "1", "--out", str(tmp_path / "made"), *args)
    assert result.exit_code == 2
    assert said in result.stderr and result.stderr.count("\n") == 1


def test_refuses_a_file_as_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    result = call("--out", str(tmp_path / "file"))
    assert result.exit_code == 2 and "--out must be a directory" in result.stderr
    assert (tmp_path / "file").read_text() == "mine"
