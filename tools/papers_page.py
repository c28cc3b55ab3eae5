"""Writes docs/papers/: an index of the catalogue and one page for each paper with evidence; `python tools/papers_page.py`.

Everything is read from the catalogue and from evidence/*.json; nothing is measured here.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

from regard.papers import catalogue

ROOT = Path(__file__).parent.parent
OUT = ROOT / "docs" / "papers"
WORDS = {True: "yes", False: "**no**", None: "not shown"}


def number(value: Any) -> str:
    """A measured value for a table cell."""
    if isinstance(value, dict):
        return "<br>".join(f"{name}: {number(inner)}" for name, inner in value.items())
    if isinstance(value, list):
        return ", ".join(number(inner) for inner in value)
    if isinstance(value, float):
        return f"{value:.3g}"
    return "" if value is None else str(value)


def cell(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", "\\|").replace("$", "\\$")


def page(found: dict[str, Any]) -> str:
    """One paper's page."""
    minutes = found["seconds"] / 60
    lines = [
        f"# {found['title']}",
        "",
        f"[arXiv {found['arxiv']}](https://arxiv.org/abs/{found['arxiv']}) · `{found['command']}` · {minutes:.0f} min on a shared"
        f" 2-core machine · seeds {', '.join(map(str, found['seeds'])) or 'none'}",
        "",
        "| claim | paper | here | interval | holds |",
        "|---|---|---|---|---|",
    ]
    for claim in found["claims"]:
        interval = number(claim["interval"]) if claim["interval"] else ""
        lines.append(
            f"| {cell(claim['claim'])} | {cell(claim['paper'])} | {cell(number(claim['here']))} | {interval} |"
            f" {WORDS[claim['holds']]} |"
        )
    lines += ["", "## Notes", ""]
    for claim in found["claims"]:
        lines += [f"- **{cell(claim['claim'])}** {cell(claim['setting'])}. {cell(claim['note'])}"]
    if found["figures"]:
        lines += ["", "## Figures", ""]
        lines += [
            f"![{Path(figure).stem}](figures/{found['slug']}/{Path(figure).name})"
            for figure in found["figures"]
        ]
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    return "\n".join([*lines, "", f"Versions: {versions}.", ""])


def main() -> None:
    OUT.mkdir(parents=True, exist_ok=True)
    evidence = {
        file.stem: json.loads(file.read_text())
        for file in sorted((ROOT / "evidence").glob("*.json"))
    }
    for slug, found in evidence.items():
        (OUT / f"{slug}.md").write_text(page(found))
        figures = ROOT / "evidence" / "figures" / slug
        if figures.is_dir():
            shutil.copytree(figures, OUT / "figures" / slug, dirs_exist_ok=True)
    lines = [
        "# Papers",
        "",
        "`regard reproduce SLUG` measures a paper's claims at the scale of a small model and writes down what it finds.",
        "",
        "| paper | arXiv | claims that hold |",
        "|---|---|---|",
    ]
    for row in catalogue():
        found = evidence.get(row.slug)
        verdicts = [claim["holds"] for claim in found["claims"]] if found else []
        held = (
            f"{verdicts.count(True)} of {len(verdicts) - verdicts.count(None)} checked"
            if found
            else "planned"
        )
        name = f"[{cell(row.title)}]({row.slug}.md)" if found else cell(row.title)
        lines.append(f"| {name} | {row.arxiv} | {held} |")
    (OUT / "index.md").write_text("\n".join([*lines, ""]))


if __name__ == "__main__":
    main()
