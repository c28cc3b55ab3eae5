"""Shows the doctests of docstrings as code, wherever in the docstring they stand."""

from __future__ import annotations

import re
from typing import Any

import griffe

PROMPT = re.compile(r"^(?P<indent> *)>>> .*?(?=\n\s*\n|\Z)", re.M | re.S)


class Doctests(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **rest: Any) -> None:
        if obj.docstring and not obj.is_alias:
            obj.docstring.value = PROMPT.sub(_fence, obj.docstring.value)


def _fence(match: re.Match[str]) -> str:
    indent, code = match["indent"], match[0]
    code = re.sub(r" *# doctest: \S+", "", code)
    return f"{indent}```pycon\n{code}\n{indent}```"
