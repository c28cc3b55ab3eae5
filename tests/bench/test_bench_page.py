"""The bench page: self-contained, escaped, and every control works in a real browser."""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from made_up import METHODS, make_results

from regard._errors import InputError
from regard.bench.page import render
from regard.bench.results import Results

VOID = {"meta", "br", "link", "input", "line", "rect", "circle", "path", "img"}


class Balanced(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        self.ids += [value for name, value in attrs if name == "id" and value]

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag


def test_the_page_is_well_formed_and_complete():
    page = render(make_results())
    parser = Balanced()
    parser.feed(page)
    assert parser.open == []
    assert len(parser.ids) == len(set(parser.ids))
    assert {"fronts", "numbers", "depth", "speed", "texts", "appendix"} <= set(parser.ids)
    assert all(title in page for title in METHODS.values())
    assert len(page) < 400_000


def test_nothing_is_fetched():
    page = render(make_results())
    assert not re.search(r'(src|href)="(?!#)', page)
    assert "default-src 'none'" in page and "http://" not in page and "https://" not in page


def test_text_of_models_and_users_is_escaped():
    page = render(make_results())
    assert "<b>more" not in page and "&lt;b&gt;more" in page
    assert "alert('h2o')" not in page and "&lt;script&gt;alert(&#x27;h2o&#x27;)" in page
    assert page.count("<script>") == 1


def test_one_document_and_missing_parts_still_make_a_page():
    results = make_results(budgets=("512",), documents=1)
    results.rows = [row for row in results.rows if row.measure not in ("decode", "needle")]
    results.texts, results.complete = [], False
    page = render(results)
    assert "512 tokens" in page and "Partial" in page and 'id="texts"' not in page


def test_nothing_measured_is_an_error():
    with pytest.raises(InputError, match="at least one measurement"):
        render(Results())


@pytest.mark.browser
def test_controls_work_in_a_browser(browser: Any, tmp_path: Path):
    file = tmp_path / "bench.html"
    file.write_text(render(make_results()))
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    said: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(file.as_uri())
    page.wait_for_selector("html[data-ready]")
    shown = "figure.front:not([hidden])"
    assert page.locator(shown).count() == 1
    page.click("[data-show=needle]")
    assert page.get_attribute(shown, "data-measure") == "needle"
    page.keyboard.press("ArrowRight")
    assert page.get_attribute(shown, "data-measure") == "multikey"
    page.click(".key >> nth=2")
    assert page.locator(f"{shown} .method-2.chosen").count() > 0
    assert page.locator(f"{shown} .method-1.chosen").count() == 0
    page.hover(f"{shown} circle.point.method-2 >> nth=0")
    assert "H2O" in page.inner_text("#tip")
    before = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.click("#theme")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != before
    for width in (1280, 390):
        page.set_viewport_size({"width": width, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.close()
    assert said == [] and asked == [file.as_uri()]
