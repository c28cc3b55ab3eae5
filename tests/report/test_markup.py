from __future__ import annotations

import json

import pytest

from regard.report.markup import change, escape, interval, number, quantity, script_json
from regard.report.sections import figures_bold


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.0, "0"),
        (1.0, "1"),
        (-2.5, "−2.50"),
        (0.0216, "0.0216"),
        (8.7e-5, "8.7\u202f×\u202f10⁻⁵"),
        (22700.0, "22\u202f700"),
        (134515008.0, "134\u202f515\u202f008"),
        (float("nan"), "–"),
        (None, "–"),
    ],
)
def test_number(value: float | None, shown: str) -> None:
    assert number(value) == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.812, "81.2"), (0.49, "49.0"), (1.0, "100"), (0.0, "0"), (0.021, "2.1"), (1e-7, "<0.01")],
)
def test_shares_print_as_per_cent(value: float, shown: str) -> None:
    assert quantity(value, "share") == f"{shown}\u202f%"


def test_differences_of_shares_are_points() -> None:
    assert change(-0.64, "share") == "−64 points"
    assert change(0.021, "nats") == "+0.0210 nats"
    assert interval(-0.72, -0.55, "share") == "[−72, −55.0]"
    assert interval(None, 1.0, "") == ""


def test_text_cannot_leave_its_place() -> None:
    hostile = "</script><script>alert(1)</script><!-- \"'&\u2028\u2029"
    assert not set("<>\"'") & set(escape(hostile))
    held = script_json({hostile: hostile})
    assert not set("<>&\u2028\u2029") & set(held)
    assert json.loads(held) == {hostile: hostile}


def test_figures_are_bold_and_the_rest_is_escaped() -> None:
    assert figures_bold("31 % of L5H3's <b> heads, 0.02.") == (
        "<b>31 %</b> of L5H3&#x27;s &lt;b&gt; heads, <b>0.02</b>."
    )
