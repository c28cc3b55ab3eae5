from __future__ import annotations

import base64
import hashlib
import os
import re
import zlib
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from synthetic import make_report

from regard._errors import InputError, OutputError
from regard.report import Report, ReportData, render, write_page
from regard.report import page as page_module
from regard.report.payload import LADDER, settle
from regard.report.schema import Definition, Stack

HOSTILE = "</script><script>alert(1)</script><!--'\"&\u2028"


class Outline(HTMLParser):
    """Tags, ids and links of a page, and whether the tags close in order."""

    VOID = frozenset({"meta", "br", "input", "link", "hr", "img"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.faults: list[str] = []
        self.ids: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.faults.append(f"</{tag}> at {self.getpos()}")


def hostile_report() -> ReportData:
    """A report in which everything that comes from outside tries to leave its place."""
    report = make_report(40, layers=3, heads=2, text=[HOSTILE] * 40, stacks=(HOSTILE,))
    header, stack = report.header, report.stacks[0]
    header.model = header.command = header.text_source = header.weights_sha = HOSTILE
    header.architecture = header.quantisation = header.hardware = header.dtype = HOSTILE
    header.versions, header.notes, report.limits = {HOSTILE: HOSTILE}, [HOSTILE], [HOSTILE]
    stack.label = HOSTILE
    for finding in report.findings:
        finding.title = finding.sentence = finding.method = finding.command = HOSTILE
        finding.heads, finding.measure = [HOSTILE], HOSTILE
        if finding.proof:
            finding.proof.label = finding.proof.unit = finding.proof.control_label = HOSTILE
    for item in [*stack.measures, *stack.probes, *stack.dormant]:
        item.definition = Definition(*[HOSTILE] * 7)
    for row in report.interventions:
        row.unit = row.name = row.metric = row.command = row.control_label = HOSTILE
    assert stack.skyline and stack.domains and stack.budget and stack.retrieval
    stack.skyline.writers[0].site = stack.budget.scorer = HOSTILE
    stack.domains.domains = [HOSTILE] * 3
    stack.domains.rows[0].head = stack.retrieval.heads[0].head = HOSTILE
    stack.retrieval.control_label = HOSTILE
    for group in stack.dormant:
        group.threshold = HOSTILE
    stack.cards[0].tags = [HOSTILE]
    return report


def scripts(page: str) -> list[str]:
    return re.findall(r"<script[^>]*>", page)


def test_size_at_eight_thousand_tokens_and_270_heads() -> None:
    assert len(render(make_report(8192)).encode()) <= 500_000


def test_the_cap_refuses_instead_of_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page_module, "HARD_CAP", 10_000)
    with pytest.raises(OutputError, match="above the cap"):
        write_page(make_report(40, layers=2, heads=2), tmp_path / "report.html")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("layers, heads", [(2, 1), (12, 12), (32, 32)])
def test_other_shapes_are_well_formed(layers: int, heads: int) -> None:
    outline = Outline(render(make_report(64, layers=layers, heads=heads)))
    assert not outline.faults and not outline.open
    assert len(outline.ids) == len(set(outline.ids))


def test_links_lead_somewhere() -> None:
    outline = Outline(render(make_report(120, stacks=("vision",))))
    targets = {v[1:] for tag, name, v in outline.attributes if (tag, name) == ("a", "href")}
    heads = re.compile(r"(vision\.)?L\d+H\d+$")
    assert {t for t in targets if not heads.match(t)} <= set(outline.ids)
    assert any(heads.match(t) for t in targets)


def test_nothing_is_fetched_and_only_our_script_runs() -> None:
    page = render(make_report(64, layers=3, heads=2))
    outline = Outline(page)
    sources = [v for tag, name, v in outline.attributes if name in ("src", "srcset", "action")]
    assert not sources
    links = [v for tag, name, v in outline.attributes if name in ("href", "xlink:href")]
    assert all(link.startswith("#") for link in links)
    assert not [name for _, name, _ in outline.attributes if name.startswith("on")]
    assert (
        "http://" not in page.replace("http://www.w3.org/2000/svg", "") and "https://" not in page
    )
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)
    own = re.search(r"<script>(.*?)</script>", page, re.S)
    assert policy and own
    digest = base64.b64encode(hashlib.sha256(own[1].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy[1]
    assert "default-src 'none'" in policy[1]


@pytest.mark.parametrize("compress", [True, False])
def test_hostile_text_stays_text(compress: bool) -> None:
    plain = render(make_report(40, layers=3, heads=2, stacks=("x",)), compress=compress)
    page = render(hostile_report(), compress=compress)
    assert scripts(page) == scripts(plain)
    assert "alert(1)<" not in page and "<!--" not in page
    outline = Outline(page)
    assert not outline.faults and not outline.open
    assert not [name for _, name, _ in outline.attributes if name.startswith("on")]


def test_parts_that_were_not_measured_are_left_out() -> None:
    report = make_report(40, layers=3, heads=2)
    stack = report.stacks[0]
    bare = Stack(3, 2, stack.measures[:1])
    page = render(ReportData(report.header, [], [bare]))
    outline = Outline(page)
    assert not outline.faults and not outline.open
    assert "atlas" in outline.ids and "appendix" in outline.ids
    assert not {"text", "rhythm", "skyline", "budget", "dormant", "causal"} & set(outline.ids)
    found = Outline(render(ReportData(report.header, report.findings, [bare])))
    links = {v for tag, name, v in found.attributes if (tag, name) == ("a", "href")}
    assert "#atlas" in links and "#skyline" not in links
    with pytest.raises(InputError, match="at least one stack"):
        render(ReportData(report.header, [], []))


@pytest.mark.parametrize("tokens", [1, 2, 3])
def test_very_short_texts(tokens: int) -> None:
    outline = Outline(render(make_report(tokens, layers=2, heads=2)))
    assert not outline.faults and not outline.open


def test_missing_values_have_their_own_cell() -> None:
    report = make_report(40, layers=3, heads=2)
    values = report.stacks[0].measures[0].values
    values[1, 1] = np.nan
    assert page_cells(render(report)).count("none") == 1
    values[:] = np.nan
    assert page_cells(render(report)).count("none") == 6


def page_cells(page: str) -> list[str]:
    return re.findall(r'class="c (\w+)"', page)


def test_sampled_reports_say_so() -> None:
    page = render(make_report(200, layers=2, heads=2, sampled=True))
    assert "1 in 16 query rows" in page and "sampled, ± standard error" in page
    assert "Exact" in render(make_report(200, layers=2, heads=2))


def test_a_changed_model_is_called_changed() -> None:
    report = make_report(40, layers=2, heads=2)
    assert "Model unchanged" in render(report)
    report.header.equality = 0.3
    assert "Model changed" in render(report)


def test_path_is_checked_before_drawing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_module, "render", lambda data: pytest.fail("drew the page first"))
    with pytest.raises(OutputError, match="no directory"):
        write_page(make_report(40, layers=2, heads=2), tmp_path / "missing" / "report.html")


def test_settled_levels_stay_within_their_bound() -> None:
    noise = np.random.default_rng(0).normal(0, 0.4, (64, 50))
    levels = np.linspace(0, 20, 50) + noise
    for detail in LADDER:
        error = np.abs(settle(levels, detail.steady) - levels)
        assert error.max() <= max(0.5, detail.steady)
    rounded, settled = np.rint(levels), settle(levels, 1.0)
    assert len(zlib.compress(settled.tobytes())) < len(zlib.compress(rounded.tobytes()))


def test_report_saves_page_and_data_and_shows_itself(tmp_path: Path) -> None:
    report = Report(make_report(40, layers=3, heads=2))
    written = report.save(tmp_path / "r.html")
    assert sorted(p.name for p in written) == sorted(os.listdir(tmp_path))
    assert {p.suffix for p in written} == {".html", ".json", ".parquet"}
    frame = report._repr_html_()
    assert frame.startswith("<iframe srcdoc=") and frame.count("<") == 2
    assert "40 tokens" in repr(report)


def test_console_summary_shows_findings_and_measures() -> None:
    from rich.console import Console

    report = hostile_report()
    report.findings[0].sentence = "[red]not markup[/red] \x1b[2J done"
    console = Console(record=True, width=120, file=open(os.devnull, "w"))  # noqa: SIM115
    Report(report).show(console)
    text = console.export_text()
    assert "[red]not markup[/red]" in text and "\x1b[2J" not in text
    assert "lowest" in text and "L0H0" in text


def test_before_and_after_are_drawn_as_a_change() -> None:
    report = make_report(40, layers=2, heads=2)
    row = report.interventions[0]
    row.before, row.after, row.low, row.high = 3.0, 3.5, 3.25, 3.75
    row.controls, row.unit = [3.0, 3.125], "nats"
    page = render(report)
    assert "+0.500 nats</b> [0.250, 0.750]" in page
    assert "Controls: +0.062, from 0 to +0.12 nats" in page
