"""The bench page: one self-contained HTML file in the report's style.

As the report: no request leaves it, its content security policy allows no network and no script but its own,
every text of the user or the model is escaped, and it reads without a script and in print.
"""

from __future__ import annotations

import base64
import hashlib
import re
from importlib.resources import files

from regard._errors import InputError
from regard.bench import sections
from regard.bench.results import Results
from regard.report.colour import css_classes, css_variables, oklab_hex
from regard.report.markup import escape

HUES = 16


def render(results: Results) -> str:
    """The page as HTML text. InputError when nothing has been measured."""
    if not results.rows:
        raise InputError("a bench page needs at least one measurement, got none")
    titles = {key: entry["title"] for key, entry in results.about.get("methods", {}).items()}
    body = (
        sections.hero(results)
        + sections.findings(results, titles)
        + sections.fronts(results, titles)
        + sections.numbers(results, titles)
        + sections.depth(results, titles)
        + sections.times(results, titles)
        + sections.texts(results, titles)
        + sections.appendix(results)
    )
    script = _asset("bench", "bench.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )
    name = str(results.about.get("model", "model")).rstrip("/").rpartition("/")[2]
    links = "".join(
        f'<a href="#{key}">{escape(title)}</a>'
        for key, title in sections.SECTIONS.items()
        if f'<section id="{key}"' in body
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><meta name="generator" content="regard">'
        f"<title>{escape(name)}: cache bench</title><style>{_style()}</style></head><body>"
        '<a class="skip" href="#main">Skip to the results</a>'
        f'<header class="top"><a class="mark" href="#top">regard</a><nav aria-label="Sections">{links}</nav>'
        '<div class="tools only-script"><button type="button" id="theme" aria-label="Switch between light and dark">'
        '<svg width="16" height="16" viewBox="0 0 16 16" aria-hidden="true"><circle cx="8" cy="8" r="6.5" class="ring"/>'
        '<path d="M8 1.5a6.5 6.5 0 0 1 0 13z"/></svg></button></div></header>'
        f'<main id="main">{body}</main><div id="tip" role="tooltip" hidden></div>'
        f"<script>{script}</script></body></html>"
    )


def _asset(room: str, name: str) -> str:
    text = (files(f"regard.{room}") / "assets" / name).read_text(encoding="utf-8")
    lines = (line.strip() for line in text.splitlines())
    return "\n".join(line for line in lines if line and not line.startswith("//"))


def _style() -> str:
    """The report's sheet, the bench's own, and one colour for each method."""
    sheet = re.sub(r"/\*.*?\*/", "", _asset("report", "page.css"), flags=re.S)
    light = css_variables(dark=False) + ";" + _hues(0.55, 0.14)
    dark = css_variables(dark=True) + ";" + _hues(0.76, 0.13)
    sheet = sheet.replace("--light-scale:0", light).replace("--dark-scale:0", dark)
    rules = "".join(f".method-{i}{{--tone:var(--m{i})}}" for i in range(HUES))
    return sheet + css_classes() + _asset("bench", "bench.css") + rules


def _hues(lightness: float, chroma: float) -> str:
    """`--m0 … --m15`: hues far apart for neighbours in the list."""
    import math

    colours = []
    for number in range(HUES):
        angle = math.radians(250 + 137.5 * number)
        shade = lightness + (0.06 if number % 2 else -0.03)
        colours.append(
            f"--m{number}:{oklab_hex(shade, chroma * math.cos(angle), chroma * math.sin(angle))}"
        )
    return ";".join(colours)
