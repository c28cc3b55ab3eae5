"""The report page: `render` makes one self-contained HTML text, `write_page` saves it.

No request leaves the page: style, script and numbers are inside it, and its content security policy
allows no network and no script but its own (by hash). Everything but the head cards and the full text
is drawn here, so that the page reads without a script and prints.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
from importlib.resources import files
from pathlib import Path

from regard._errors import InputError, OutputError
from regard.report.colour import css_classes, css_variables
from regard.report.files import check_writable, write_atomic
from regard.report.head_panels import domains, dormant, retrieval
from regard.report.markup import escape
from regard.report.panels import budget, rhythm, skyline, text_strip
from regard.report.payload import TARGET, packed_script, payload
from regard.report.schema import ReportData
from regard.report.sections import NAVIGATION, PANELS, appendix, causal, findings, head_atlas, hero

HARD_CAP = 2_000_000
"""A page never grows beyond this many bytes; `render` refuses instead."""

_ORDER = (head_atlas, skyline, text_strip, rhythm, retrieval, dormant, domains, budget)


def render(data: ReportData, compress: bool = True) -> str:
    """The page as HTML text, about 0.4 MB for 270 heads and 8 000 tokens.

    `compress=False` stores the numbers undeflated, for debugging. `InputError` when there is nothing
    to show, `OutputError` when the page would pass the hard cap of 2 MB.
    """
    if not data.stacks:
        raise InputError("a report needs at least one stack of attention layers, got none")
    style = _style()
    script = _asset("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )
    panels = "".join(
        panel(stack, index) for index, stack in enumerate(data.stacks) for panel in _ORDER
    )
    panels += causal(data.interventions) + appendix(data)
    here = [key for key in PANELS if f'<section id="{key}"' in panels]
    body = hero(data) + findings(data, here) + panels
    values, block = payload(data, TARGET - len((body + style + script).encode()))
    title = data.header.model.rstrip("/").rpartition("/")[2]
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><meta name="generator" content="regard">'
        f"<title>{escape(title)}: attention report</title><style>{style}</style></head><body>"
        f'<a class="skip" href="#main">Skip to the report</a>{_top(body)}<main id="main">{body}</main>'
        f"{_FURNITURE}"
        + packed_script("regard-values", values.encode(), compress)
        + packed_script("regard-bytes", block, compress)
        + f"<script>{script}</script></body></html>"
    )
    size = len(page.encode())
    if size > HARD_CAP:
        raise OutputError(
            f"the page would be {size / 1e6:.1f} MB, above the cap of {HARD_CAP / 1e6:.0f} MB; "
            "leave out head cards or shorten the text"
        )
    return page


def write_page(data: ReportData, path: str | os.PathLike[str]) -> Path:
    """Render `data` and write it to `path` in one step; the path is checked first."""
    target = check_writable(path)
    return write_atomic(target, render(data))


def _top(body: str) -> str:
    links = "".join(
        f'<a href="#{key}">{escape(title)}</a>'
        for key, title in NAVIGATION.items()
        if f'id="{key}"' in body
    )
    return (
        '<header class="top"><a class="mark" href="#top">regard</a>'
        f'<nav aria-label="Sections">{links}</nav><div class="tools only-script">'
        '<button type="button" id="theme" aria-label="Switch between light and dark">'
        '<svg width="16" height="16" viewBox="0 0 16 16" aria-hidden="true">'
        '<circle cx="8" cy="8" r="6.5" class="ring"/><path d="M8 1.5a6.5 6.5 0 0 1 0 13z"/></svg>'
        '</button><button type="button" id="help-open" aria-label="Keyboard help">?</button>'
        "</div></header>"
    )


def _asset(name: str) -> str:
    text = (files("regard.report") / "assets" / name).read_text(encoding="utf-8")
    lines = (line.strip() for line in text.splitlines())
    return "\n".join(line for line in lines if line and not line.startswith("//"))


def _style() -> str:
    sheet = re.sub(r"/\*.*?\*/", "", _asset("page.css"), flags=re.S)
    light, dark = css_variables(dark=False), css_variables(dark=True)
    return sheet.replace("--light-scale:0", light).replace("--dark-scale:0", dark) + css_classes()


_KEYS = (
    ("j, k", "next and previous head"),
    ("arrow keys", "move in the head atlas"),
    ("Enter", "open the head’s card"),
    ("m, M", "next and previous measure"),
    ("p", "show or hide the patterns"),
    ("Escape", "close what is open"),
    ("d", "light or dark"),
    ("?", "this help"),
)

_FURNITURE = (
    '<div id="tip" role="tooltip" hidden></div>'
    '<aside id="card" role="dialog" aria-modal="false" aria-labelledby="card-title" tabindex="-1" '
    "hidden></aside>"
    '<dialog id="help" aria-labelledby="help-title"><h2 id="help-title">Keys</h2><dl>'
    + "".join(f"<dt><kbd>{keys}</kbd></dt><dd>{what}</dd>" for keys, what in _KEYS)
    + '</dl><p class="quiet">Links: <code>#L3H1</code> opens a head, <code>#measure=entropy</code> '
    "a measure.</p><button type=button>Close</button></dialog>"
    '<div id="said" class="only-heard" role="status" aria-live="polite"></div>'
)
