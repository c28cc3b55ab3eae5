"""The command line: what it prints, how it ends, and that it starts fast."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from regard import __version__
from regard._errors import AttachError, InputError, ModelError
from regard.cli import app
from regard.papers import Claim, Paper, Run


def call(*args: str, stdin: str | bytes | None = None) -> Result:
    return CliRunner().invoke(app, list(args), input=stdin, env={"COLUMNS": "200", "TERM": "dumb"})


def error(result: Result) -> str:
    """The one line on stderr."""
    assert result.stderr.startswith("error: "), result.output
    assert result.stderr.count("\n") == 1, result.stderr
    return result.stderr[7:]


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """`regard.report` replaced by a list of its calls."""
    import regard

    calls: list[dict[str, Any]] = []
    monkeypatch.setitem(
        vars(regard),
        "report",
        lambda model, text=None, **o: calls.append({**o, "model": model, "text": text}),
    )
    return calls


def test_help_names_every_command_with_an_example() -> None:
    result = call("--help")
    assert result.exit_code == 0
    for command in ("report", "check", "papers", "reproduce"):
        assert f"regard {command}" in result.stdout
        own = call(command, "--help")
        assert own.exit_code == 0 and f"regard {command} " in own.stdout
    assert call().stdout.strip() == result.stdout.strip()
    assert call().exit_code == 0


def test_version() -> None:
    assert call("--version").stdout == f"regard {__version__}\n"


def test_the_package_runs_as_a_module() -> None:
    command = [sys.executable, "-m", "regard", "--version"]
    assert subprocess.check_output(command, text=True) == f"regard {__version__}\n"


def test_help_and_papers_do_not_import_torch() -> None:
    code = (
        "import sys; from regard.cli import app\n"
        "for args in (['--help'], ['papers', 'sink'], ['papers', 'cake', '--json']):\n"
        "    try: app(args)\n"
        "    except SystemExit as end: assert end.code == 0\n"
        "heavy = {'torch', 'transformers', 'numpy', 'matplotlib', 'polars'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# report: arguments are checked before any work


def test_report_passes_on_what_it_was_given(report: list[dict[str, Any]], tmp_path: Path) -> None:
    page = tmp_path / "new" / "page.html"
    result = call(
        "report", "m", "--prompt", "a <b>", "--out", str(page), "--rows", "1/16", "--seed", "3"
    )
    assert result.exit_code == 0, result.output
    assert report == [{"model": "m", "text": "a <b>", "out": page, "rows": 0.0625, "seed": 3}]


def test_report_reads_a_file_or_stdin(report: list[dict[str, Any]], tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes("\ufeffGrüße".encode())
    out = ["--out", str(tmp_path / "p.html")]
    call("report", "--text", str(file), *out)
    call("report", "--text", "-", *out, stdin="from stdin")
    call("report", *out)
    assert [seen["text"] for seen in report] == ["Grüße", "from stdin", None]
    assert {seen["rows"] for seen in report} == {None}


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"", "empty"), (b"  \n", "empty"), (b"a\0b", "binary"), (b"caf\xe9", "0xe9 at position 3")],
)
def test_a_file_that_is_no_text_is_refused(
    report: list[dict[str, Any]], tmp_path: Path, content: bytes, said: str
) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(content)
    result = call("report", "--text", str(file), "--out", str(tmp_path / "p.html"))
    assert result.exit_code == 2 and said in error(result)
    assert report == []


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--text", "a.txt", "--prompt", "b"], "got both"),
        (["--text", "no-such-file.txt"], "does not exist"),
        (["--text", "."], "directory"),
        (["--prompt", "  "], "empty"),
        (["--rows", "0"], "auto, exact or a share such as 1/16, got '0'"),
        (["--rows", "1/0"], "got '1/0'"),
        (["--rows", "most"], "got 'most'"),
        (["--tokens", "1"], "--tokens"),
        (["--out", "."], "must be a file"),
        (["--out", "/dev/null/page.html"], "cannot write"),
        (["--no-such-option"], "--no-such-option"),
    ],
)
def test_bad_arguments_end_in_one_line(
    report: list[dict[str, Any]], args: list[str], said: str
) -> None:
    result = call("report", *args)
    assert result.exit_code == 2, result.output
    assert said in error(result)
    assert report == []


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        (InputError("text must be longer"), 2, "text must be longer"),
        (ModelError("weights hold NaN\nin layer 3"), 1, "weights hold NaN in layer 3"),
        (AttachError("no attention"), 1, "no attention"),
        (MemoryError(), 1, "out of memory"),
        (ZeroDivisionError("a [bold]b"), 1, "unexpected ZeroDivisionError: a [bold]b"),
        (KeyboardInterrupt(), 130, "interrupted; nothing is half-written"),
    ],
)
def test_whatever_goes_wrong_ends_in_one_line_and_a_code(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, raised: BaseException, code: int, said: str
) -> None:
    import regard

    def fail(*args: object, **options: object) -> None:
        raise raised

    monkeypatch.setitem(vars(regard), "report", fail)
    result = call("report", "--out", str(tmp_path / "p.html"))
    assert result.exit_code == code
    assert said in error(result)


def test_traceback_is_shown_on_request(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import regard

    def fail(*args: object, **options: object) -> None:
        raise ZeroDivisionError("deep inside")

    monkeypatch.setitem(vars(regard), "report", fail)
    result = call("report", "--out", str(tmp_path / "p.html"), "--traceback")
    assert isinstance(result.exception, ZeroDivisionError)


# papers


def test_papers_lists_and_searches() -> None:
    every = call("papers")
    assert every.exit_code == 0
    assert "retrieval-head" in every.stdout and "75 papers" in every.stdout
    some = call("papers", "retrieval", "head")
    assert "retrieval-head" in some.stdout and "flowformer" not in some.stdout


def test_papers_shows_one() -> None:
    result = call("papers", "retrieval-head")
    assert "https://arxiv.org/abs/2404.15574" in result.stdout


def test_papers_as_json() -> None:
    rows = json.loads(call("papers", "--json").stdout)
    assert len(rows) == 75
    assert {"slug", "title", "arxiv", "date", "what", "status", "url"} <= set(rows[0])


def test_papers_without_a_match() -> None:
    result = call("papers", "no-such-thing")
    assert result.exit_code == 2 and "no paper matches" in error(result)


def test_a_reader_that_goes_away_is_no_error() -> None:
    command = f"{sys.executable} -m regard.cli papers | head -1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.stderr == ""
    assert done.stdout.splitlines()[-1] in {"141", "0"}


# reproduce


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    module = ModuleType("toy_paper")
    claims = [
        Claim(
            "a",
            "Few heads do it",
            "Llama",
            "3 %",
            unit=" %",
            expect="below 5 %",
            holds=lambda a: a < 5,
        ),
        Claim("b", "Big models too", "Llama", beyond="needs 70B parameters"),
    ]

    def experiment(run: Run) -> None:
        run.record("a", here=run.pick(quick=4.4444, full=7.0), note="toy")

    module.PAPER = Paper("cake", claims=claims)  # type: ignore[attr-defined]
    module.experiment = experiment  # type: ignore[attr-defined]
    monkeypatch.setattr("regard.papers.load", lambda slug: module)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return module


def test_reproduce_prints_claims_and_verdicts(toy: ModuleType, tmp_path: Path) -> None:
    result = call("reproduce", "cake", "--quick")
    assert result.exit_code == 0, result.output
    for part in ("Few heads do it", "3 %", "4.44 %", "yes", "needs 70B", "not shown", "below 5 %"):
        assert part in result.stdout
    assert "1 holds, 1 not shown (quick scale" in result.stdout
    assert (tmp_path / "cache" / "regard" / "quick" / "cake.json").is_file()


def test_a_claim_that_does_not_hold_is_a_result_not_an_error(
    toy: ModuleType, tmp_path: Path
) -> None:
    result = call("reproduce", "cake", "--out", str(tmp_path / "ev"))
    assert result.exit_code == 0 and "1 does not" in result.stdout
    written = json.loads((tmp_path / "ev" / "cake.json").read_text())
    assert [row["holds"] for row in written["claims"]] == [False, None]


def test_reproduce_of_an_unknown_paper_names_the_nearest() -> None:
    result = call("reproduce", "retreival-head")
    assert result.exit_code == 2 and "did you mean retrieval-head?" in error(result)


def test_ctrl_c_keeps_what_is_measured(tmp_path: Path) -> None:
    """A real SIGINT in a real process, in the middle of an experiment; then --resume."""
    script = tmp_path / "toy.py"
    script.write_text(
        textwrap.dedent(
            """
            import sys, time, types
            import regard.papers as papers
            from regard.cli import app

            PAPER = papers.Paper("cake", claims=[papers.Claim("a", "A", "", holds=lambda a: a > 0)])

            def experiment(run):
                value = run.partial("a", lambda: 1.0)
                print("measured", flush=True)
                if "--resume" not in sys.argv:
                    time.sleep(60)
                run.record("a", here=value)

            module = sys.modules["__main__"]
            papers.load = lambda slug: module
            app()
            """
        )
    )
    command = [sys.executable, str(script), "reproduce", "cake", "--out", str(tmp_path / "ev")]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"TERM": "dumb"},
    )
    assert process.stdout is not None
    while "measured" not in (line := process.stdout.readline()):
        assert line
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "interrupted" in stderr and "--resume" in stderr and "Traceback" not in stderr
    assert not (tmp_path / "ev" / "cake.json").exists()

    again = subprocess.run([*command, "--resume"], capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert "Going on from 1 kept value" in again.stdout + again.stderr
    assert (tmp_path / "ev" / "cake.json").is_file()


# check


def test_check_says_that_nothing_changes(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = {"[UNK]": 0, "look": 1, "back": 2}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(tmp_path)
    config = LlamaConfig(
        vocab_size=8, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    result = call("check", str(tmp_path))
    assert result.exit_code == 0, result.output
    assert "2 layers" in result.stdout and "equal" in result.stdout


def test_check_of_a_missing_model() -> None:
    result = call("check", "./no-such-model")
    assert result.exit_code == 1 and "no-such-model" in error(result)
