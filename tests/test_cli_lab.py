"""`regard lab`: lists, explains and runs laboratories."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from regard.cli import app
from regard.labs.catalogue import LABS


def call(*args: str) -> Result:
    return CliRunner().invoke(app, ["lab", *args], env={"COLUMNS": "200", "TERM": "dumb"})


def test_lists_them_with_a_line_each() -> None:
    result = call()
    assert result.exit_code == 0
    assert len(result.stdout.splitlines()) == len(LABS)
    assert all(name in result.stdout for name in LABS)


@pytest.mark.parametrize("name", list(LABS))
def test_names_every_setting(name: str) -> None:
    result = call(name, "--settings")
    assert result.exit_code == 0
    for row in LABS[name].config.settings():
        assert row.key in result.stdout and row.range in result.stdout


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("scan-and-snip",), "did you mean scan-and-snap"),
        (("linear-icl", "--set", "seeds"), "KEY=VALUE"),
        (("linear-icl", "--set", "exampels=3"), "did you mean examples"),
        (("linear-icl", "--set", "seeds=-3"), "got '-3'"),
    ],
)
def test_refuses(args: tuple[str, ...], said: str) -> None:
    result = call(*args)
    assert result.exit_code == 2
    assert said in result.stderr and result.stderr.count("\n") == 1


def test_refuses_a_file_as_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    result = call("linear-icl", "--out", str(tmp_path / "file"))
    assert result.exit_code == 2 and "--out must be a directory" in result.stderr
