"""While the site is built, `{{ regard --help }}` on a line becomes what that command prints."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from typing import Any

COMMAND = re.compile(r"^\{\{ regard (?P<arguments>.+) \}\}$", re.M)


def on_page_markdown(markdown: str, **rest: Any) -> str:
    return COMMAND.sub(_run, markdown)


def _run(match: re.Match[str]) -> str:
    environment = os.environ | {"COLUMNS": "88", "NO_COLOR": "1", "TERM": "dumb"}
    start = "import sys; sys.argv[0] = 'regard'; from regard.cli import main; main()"
    command = [sys.executable, "-c", start, *match["arguments"].split()]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    lines = [line.rstrip() for line in done.stdout.strip("\n").splitlines()]
    return "\n".join(["```console", f"$ regard {match['arguments']}", *lines, "```"])
