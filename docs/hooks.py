"""What the site takes from the project while it is built.

`{{ regard --help }}` on a line becomes what that command prints, and the pages that commands write (papers, benchmarks)
enter the navigation when they are there.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

COMMAND = re.compile(r"^\{\{ regard (?P<arguments>.+) \}\}$", re.M)


def on_config(config: Any) -> Any:
    home = Path(config.docs_dir)
    measured = {
        "Observing": "benchmarks.md",
        "Shrinking": "benchmarks-shrink.md",
        "The quality gap": "quality-gap.md",
    }
    there = [{title: page} for title, page in measured.items() if (home / page).exists()]
    written = [{"Benchmarks": there}] if there else []
    papers = sorted((home / "papers").glob("*.md"), key=lambda page: (page.stem != "index", page))
    if papers:
        written.append({"Papers": [f"papers/{page.name}" for page in papers]})
    before_api = next(i for i, entry in enumerate(config.nav) if "API" in entry)
    config.nav[before_api:before_api] = written
    return config


def on_page_markdown(markdown: str, **rest: Any) -> str:
    return COMMAND.sub(_run, markdown)


def _run(match: re.Match[str]) -> str:
    environment = os.environ | {"COLUMNS": "88", "NO_COLOR": "1", "TERM": "dumb"}
    start = "import sys; sys.argv[0] = 'regard'; from regard.cli import main; main()"
    command = [sys.executable, "-c", start, *match["arguments"].split()]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    lines = [line.rstrip() for line in done.stdout.strip("\n").splitlines()]
    return "\n".join(["```console", f"$ regard {match['arguments']}", *lines, "```"])
