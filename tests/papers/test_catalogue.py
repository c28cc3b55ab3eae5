"""The catalogue, the evidence format, and the run that an experiment is given."""

from __future__ import annotations

import ast
import datetime
import importlib
import inspect
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from regard._errors import EvidenceError, InputError, OutputError
from regard.papers import Claim, Paper, Run, catalogue, entry, load, reproduce, runnable, search
from regard.papers import _evidence as ev
from regard.papers._catalogue import evidence_dir
from regard.papers._partial import Partial
from regard.papers._show import number, tally

CLAIMS = [
    Claim("small", "A is small", "Llama-2-7B", "3.2 %", unit=" %", holds=lambda a: a < 5),
    Claim("free", "B follows A", "Llama-2-7B"),
    Claim("large", "C at 70B", "Llama-2-70B", beyond="needs a model of 70B parameters"),
]


def toy(experiment: Callable[[Run], None], claims: list[Claim] | None = None) -> ModuleType:
    module = ModuleType("toy_paper")
    module.PAPER = Paper("cake", claims=claims or CLAIMS)  # type: ignore[attr-defined]
    module.experiment = experiment  # type: ignore[attr-defined]
    return module


def measure_both(run: Run) -> None:
    run.seed(3)
    value = run.partial("a", lambda: {"a": (4.0, 5)})
    run.record("small", here=value["a"][0], interval=(3, 5))
    run.record("free", here={"x": 1, "y": 2.5}, holds=value["a"][1] > 4, setting="toy")


# the catalogue


def test_there_are_75_papers_each_with_its_own_identity() -> None:
    rows = catalogue()
    assert len(rows) == 75
    for field in ("slug", "arxiv", "title", "what"):
        assert len({getattr(row, field) for row in rows}) == 75, field
    for row in rows:
        assert re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", row.slug)
        assert re.fullmatch(r"\d{4}\.\d{4,5}", row.arxiv)
        assert row.what.endswith(".") and 40 < len(row.what) <= 180, row.slug
        assert isinstance(row.date, datetime.date)
        # arXiv numbers begin with the year and month of the first version
        number = datetime.date(2000 + int(row.arxiv[:2]), int(row.arxiv[2:4]), 1)
        assert abs((row.date - number).days) < 62, row.slug


def test_a_slug_is_found_whatever_its_spelling() -> None:
    assert entry(" Retrieval_Head ").arxiv == "2404.15574"


def test_a_wrong_slug_names_the_nearest() -> None:
    with pytest.raises(InputError, match=r"'retreival-head'; did you mean retrieval-head\?"):
        entry("retreival-head")
    with pytest.raises(InputError, match="regard papers"):
        entry("qqqqq")


def test_search_needs_every_word_and_puts_titles_first() -> None:
    found = [row.slug for row in search("attention sink")]
    assert found[0] in {"act", "attention-sink-emerges", "avsr-sinks", "var"}
    assert all(
        "sink" in f"{row.slug} {row.title} {row.what} {row.topic}".lower() for row in search("sink")
    )
    assert search("sink no-such-word") == []
    assert len(search("")) == 75
    assert [row.slug for row in search("2404.15574")] == ["retrieval-head"]


def test_a_planned_paper_cannot_be_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("regard.papers._catalogue.importlib.util.find_spec", lambda name: None)
    assert entry("cake").status == "planned"
    with pytest.raises(InputError, match="has no experiment yet"):
        load("cake")


# what a paper declares


def test_a_paper_must_be_in_the_catalogue_and_name_its_claims_once() -> None:
    with pytest.raises(InputError):
        Paper("no-such-paper", claims=CLAIMS)
    with pytest.raises(EvidenceError, match="unique, got small"):
        Paper("cake", claims=[CLAIMS[0], CLAIMS[0]])
    with pytest.raises(EvidenceError, match="at least one"):
        Paper("cake", claims=[])


def test_needs_are_looked_for_before_any_work() -> None:
    Paper("cake", claims=CLAIMS, needs=("json",)).check_needs()
    with pytest.raises(InputError, match=r"no_such_module.*pip install"):
        Paper("cake", claims=CLAIMS, needs=("no_such_module",)).check_needs()


# a run


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(Paper("cake", claims=CLAIMS), scale="full", work=tmp_path / "figures")


def test_the_verdict_is_the_predicate_of_the_claim(run: Run) -> None:
    assert run.record("small", here=np.float32(4.5)) is True
    assert run.record("free", here=torch.tensor(1.5), holds=torch.tensor(1.5) > 2) is False
    assert run.records["free"]["here"] == 1.5


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"claim_id": "smal", "here": 1}, "one of small, free, large"),
        ({"claim_id": "small", "here": math.nan}, "finite, got nan"),
        ({"claim_id": "small", "here": {"a": math.inf}}, r"\['a'\] must be finite"),
        ({"claim_id": "small", "here": 1, "holds": True}, "leave holds= out"),
        ({"claim_id": "free", "here": 1}, "pass holds="),
        ({"claim_id": "free", "here": 1, "holds": None}, "say why"),
        ({"claim_id": "small", "here": 1, "interval": (2, 1)}, "low <= high"),
        ({"claim_id": "small", "here": object()}, "numbers, texts"),
    ],
)
def test_what_is_not_evidence_is_refused(run: Run, given: dict, said: str) -> None:
    with pytest.raises(EvidenceError, match=said):
        run.record(given.pop("claim_id"), **given)
    assert run.records == {}


def test_a_claim_is_recorded_once(run: Run) -> None:
    run.record("small", here=1)
    with pytest.raises(EvidenceError, match="twice"):
        run.record("small", here=1)


def test_a_full_run_must_record_every_claim_within_reach(run: Run) -> None:
    run.record("small", here=1)
    with pytest.raises(EvidenceError, match=r"cake\.free was not recorded"):
        run.rows()
    run.record("free", here=1, holds=False)
    small, free, large = run.rows()
    assert (small["holds"], free["holds"], large["holds"]) == (True, False, None)
    assert large["note"] == "needs a model of 70B parameters"


def test_seed_makes_everything_repeat(run: Run) -> None:
    def draw() -> list[float]:
        generator = run.seed(5)
        own = torch.rand(1, generator=generator).item()
        return [own, torch.rand(1).item(), float(np.random.rand())]

    assert draw() == draw()
    assert run.seeds == [5]


def test_a_figure_is_the_same_bytes_each_time(tmp_path: Path) -> None:
    from matplotlib import pyplot as plt

    files = []
    for name in ("one", "two"):
        run = Run(Paper("cake", claims=CLAIMS), scale="quick", work=tmp_path / name)
        figure, axes = plt.subplots()
        axes.plot([1, 2, 3], label="a")
        axes.legend()
        run.figure("line", figure)
        files.append((tmp_path / name / "line.svg").read_bytes())
    assert files[0] == files[1]
    assert not plt.get_fignums()


# reproduce


def test_reproduce_writes_what_it_returns(tmp_path: Path) -> None:
    evidence = reproduce(toy(measure_both), out=tmp_path)
    assert ev.read(tmp_path / "cake.json") == evidence
    assert evidence["seeds"] == [3]
    assert evidence["command"] == "regard reproduce cake"
    assert evidence["claims"][1]["setting"] == "Llama-2-7B; here: toy"
    assert {"python", "regard", "torch", "numpy"} <= set(evidence["versions"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cake.json"]


def test_a_failed_run_leaves_the_old_evidence_and_its_figures(tmp_path: Path) -> None:
    from matplotlib import pyplot as plt

    def draw(run: Run) -> None:
        figure, axes = plt.subplots()
        axes.plot([1, 2])
        run.figure("line", figure)

    def good(run: Run) -> None:
        draw(run)
        measure_both(run)

    def bad(run: Run) -> None:
        draw(run)
        raise RuntimeError("in the middle")

    reproduce(toy(good), out=tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(RuntimeError, match="in the middle"):
        reproduce(toy(bad), out=tmp_path)
    kept = {path: path.read_bytes() for path in before}
    assert kept == before
    assert tmp_path / "figures" / "cake" / "line.svg" in before

    evidence = reproduce(toy(measure_both), out=tmp_path)
    assert evidence["figures"] == [] and not (tmp_path / "figures" / "cake").exists()


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    computed: list[str] = []

    def experiment(run: Run) -> None:
        run.seed(1 if not computed else 2)
        first = run.partial("first", lambda: computed.append("first") or (1.0, 2.0))
        if len(computed) == 1:
            computed.append("interrupt")
            raise KeyboardInterrupt
        run.record("small", here=first[0])
        run.record("free", here=first[1], holds=isinstance(first, list))

    module = toy(experiment)
    with pytest.raises(KeyboardInterrupt):
        reproduce(module, out=tmp_path)
    assert not (tmp_path / "cake.json").exists()
    evidence = reproduce(module, out=tmp_path, resume=True)
    assert computed == ["first", "interrupt"]
    assert evidence["seeds"] == [1, 2]
    assert [row["here"] for row in evidence["claims"]] == [1.0, 2.0, None]
    assert not (tmp_path / ".partial").exists()


def test_values_measured_by_other_code_are_not_reused(tmp_path: Path) -> None:
    path = tmp_path / "values.json"
    Partial(path, fingerprint="old").get("a", lambda: 1, [])
    assert Partial(path, fingerprint="old", resume=True).values == {"a": 1}
    changed = Partial(path, fingerprint="new", resume=True)
    assert changed.stale and changed.values == {}


def test_quick_never_replaces_full_evidence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    reproduce(toy(measure_both), scale="quick")
    assert ev.read(tmp_path / "regard" / "quick" / "cake.json")["scale"] == "quick"


def test_an_unwritable_place_is_found_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="--out"):
        reproduce(toy(lambda run: pytest.fail("ran")), out=tmp_path / "file" / "evidence")


# the format


def evidence() -> dict:
    row = {"claim": "A", "setting": "", "paper": "3 %", "here": 1.5, "interval": [1, 2]}
    return {
        "slug": "cake",
        "title": "T",
        "arxiv": "2503.12491",
        "scale": "full",
        "command": "regard reproduce cake",
        "seconds": 1.5,
        "seeds": [0],
        "versions": {"torch": "2"},
        "claims": [row | {"holds": True, "note": ""}],
        "figures": ["figures/cake/a.svg"],
    }


def test_the_example_is_valid() -> None:
    ev.check(evidence())


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("scale", "huge", '"quick" or "full"'),
        ("seconds", -1, ">= 0"),
        ("seeds", [0.5], "whole numbers"),
        ("versions", {"torch": 2}, "version texts"),
        ("claims", [], "a list with claims"),
        ("figures", ["/tmp/a.svg"], "relative"),
        ("title", "", "not empty"),
        ("claims.0.here", math.nan, "finite"),
        ("claims.0.here", {"a": [1]}, "flat mapping"),
        ("claims.0.interval", [2, 1], "low <= high"),
        ("claims.0.holds", "yes", "true, false or null"),
        ("claims.0.holds", None, "say why"),
        ("claims.0.here", None, "nothing was measured"),
        ("claims.0.extra", 1, "unknown: extra"),
        ("extra", 1, "unknown: extra"),
    ],
)
def test_every_departure_from_the_layout_is_named(path: str, value: object, said: str) -> None:
    broken = evidence()
    target, keys = broken, path.split(".")
    for key in keys[:-1]:
        target = target[int(key) if key.isdigit() else key]
    target[keys[-1]] = value
    with pytest.raises(EvidenceError, match=re.escape(said)):
        ev.check(broken)


def test_writing_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "cake.json"
    ev.write(evidence(), path)
    before = path.read_bytes()

    def fail(*args: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("regard.papers._evidence.os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        ev.write(evidence() | {"seconds": 9}, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@given(st.floats(-1e300, 1e300))
def test_a_shown_number_is_the_number_to_three_digits(value: float) -> None:
    assert float(number(value)) == pytest.approx(value, rel=6e-3, abs=1e-300)


def test_tally_counts_verdicts() -> None:
    rows = [{"holds": holds} for holds in (True, True, False, None)]
    assert tally({"claims": rows}) == "2 hold, 1 does not, 1 not shown"


# the evidence and the papers there are

FILES = sorted(evidence_dir().glob("*.json"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_evidence_in_the_repository_is_full_and_complete(path: Path) -> None:
    found = ev.read(path)
    row = entry(path.stem)
    assert (found["slug"], found["title"], found["arxiv"]) == (row.slug, row.title, row.arxiv)
    assert found["scale"] == "full"
    for figure in found["figures"]:
        assert (path.parent / figure).stat().st_size < 1_000_000
    assert [c["claim"] for c in found["claims"]] == [c.claim for c in load(row.slug).PAPER.claims]


def test_every_picture_belongs_to_some_evidence() -> None:
    named = {figure for path in FILES for figure in json.loads(path.read_text())["figures"]}
    drawn = {
        str(path.relative_to(evidence_dir()))
        for path in (evidence_dir() / "figures").rglob("*")
        if path.is_file()
    }
    assert drawn == named


@pytest.mark.parametrize("slug", runnable())
def test_a_paper_file_declares_its_paper_and_computes_its_verdicts(slug: str) -> None:
    module = importlib.import_module(entry(slug).module)
    assert module.PAPER.slug == slug
    assert list(inspect.signature(module.experiment).parameters) == ["run"]
    assert module.__doc__
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        if isinstance(node, ast.keyword) and node.arg == "holds":
            fixed = isinstance(node.value, ast.Constant) and node.value.value is not None
            assert not fixed, f"{module.__file__}:{node.value.lineno} writes down a verdict"


@pytest.mark.papers
@pytest.mark.model
@pytest.mark.slow
@pytest.mark.parametrize("slug", runnable())
def test_the_experiment_runs_at_its_quick_scale(slug: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    result = reproduce(slug, scale="quick", out=tmp_path)
    assert result["seconds"] > 0
    assert any(row["here"] is not None for row in result["claims"])
