"""Every Python example in the README, the docs and CONTRIBUTING runs as printed.

A block fenced ```python is executed; blocks of one page share their names, in order. A block titled
with a path under src/ becomes that module, one under tests/ has its test functions called. Blocks
with prompts (>>>) are doctests, and what they print must match.
"""

from __future__ import annotations

import doctest
import re
import shutil
import sys
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r'^```python(?: title="(?P<title>[^"]+)")?\n(?P<code>.*?)^```$', re.M | re.S)


def blocks(page: Path) -> list[tuple[str, str]]:
    text = page.read_text(encoding="utf-8")
    return [(match["title"] or "", match["code"]) for match in BLOCK.finditer(text)]


def pages() -> list:
    found = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
    marks = {True: [pytest.mark.model], False: []}
    return [
        pytest.param(
            page, id=str(page.relative_to(ROOT)), marks=marks["smollm2" in page.read_text()]
        )
        for page in found
        if blocks(page)
    ]


def run_module(title: str, code: str, page: Path) -> types.ModuleType:
    name = title.removeprefix("src/").removesuffix(".py").replace("/", ".")
    module = types.ModuleType(name)
    exec(compile(code, f"{page.name}:{title}", "exec"), module.__dict__)
    return module


@pytest.mark.parametrize("page", pages())
def test_examples_run(page, tmp_path, monkeypatch):
    shutil.copy(ROOT / "LICENSE", tmp_path)  # the text that the quickstart reads
    monkeypatch.chdir(tmp_path)
    names: dict = {"__name__": "example"}
    for title, code in blocks(page):
        if title.startswith("src/"):
            module = run_module(title, code, page)
            monkeypatch.setitem(sys.modules, module.__name__, module)
            assert doctest.testmod(module, optionflags=doctest.ELLIPSIS).failed == 0
        elif title.startswith("tests/"):
            tests = [
                f for n, f in vars(run_module(title, code, page)).items() if n.startswith("test_")
            ]
            assert tests
            for test in tests:
                test()
        elif ">>>" in code:
            flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
            example = doctest.DocTestParser().get_doctest(code, names, page.name, str(page), 0)
            runner = doctest.DocTestRunner(optionflags=flags)
            runner.run(example, clear_globs=False)
            names.update(example.globs)
            assert runner.failures == 0
        else:
            exec(compile(code, page.name, "exec"), names)


def test_every_local_link_of_the_readme_leads_somewhere():
    for name in ("README.md", "CONTRIBUTING.md"):
        text = (ROOT / name).read_text(encoding="utf-8")
        targets = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", text)
        targets += re.findall(r'src="(?!https?:)([^"]+)"', text)
        for target in targets:
            assert (ROOT / target).exists(), f"{name} links to {target}"
