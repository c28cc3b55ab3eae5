"""`regard papers` and `regard reproduce`: the catalogue and its experiments."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from regard._errors import InputError
from regard.cli._app import Screen, app, end
from regard.cli._options import PAPERS, progress_console

if TYPE_CHECKING:
    from regard.papers import Entry


@app.command(rich_help_panel=PAPERS)
def papers(
    query: Annotated[
        list[str] | None,
        typer.Argument(metavar="QUERY", help="Words to look for; a slug shows one paper."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", metavar="", help="Print JSON.")] = False,
) -> None:
    """List the papers and how far each one is.

    [cyan]regard papers sink[/]
    """
    from regard.papers import catalogue, search
    from regard.papers._show import details, papers_table

    wanted = " ".join(query or []).strip()
    exact = [row for row in catalogue() if row.slug == wanted.lower()]
    found = exact or search(wanted)
    if not found:
        raise InputError(f"no paper matches {wanted!r}; list all of them with: regard papers")
    if as_json:
        typer.echo(json.dumps([_row(row) for row in found], indent=1, ensure_ascii=False))
        return
    console = Screen()
    if not exact:
        console.print(papers_table(found))
        done = sum(row.status == "measured" for row in found)
        console.print(
            f"\n{len(found)} paper{'s' if len(found) > 1 else ''}, {done} measured. "
            "More about one: regard papers SLUG",
            style="dim",
        )
        return
    console.print(details(exact[0]))
    _print_evidence(console, exact[0])


@app.command(rich_help_panel=PAPERS)
def reproduce(
    slug: Annotated[
        str, typer.Argument(metavar="SLUG", help="A paper, as `regard papers` names it.")
    ],
    quick: Annotated[
        bool,
        typer.Option("--quick", metavar="", help="A small run: does it work? Not a measurement."),
    ] = False,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Evidence directory to write into.")
    ] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", metavar="", help="Go on from where an interrupted run stopped."),
    ] = False,
) -> None:
    """Check a paper's claims on a small model.

    [cyan]regard reproduce retrieval-head --quick[/]
    """
    from regard.papers import entry, load
    from regard.papers import reproduce as run_it
    from regard.papers._reproduce import default_out
    from regard.papers._show import tally, verdict_table

    row, module = entry(slug), load(slug)
    scale = "quick" if quick else "full"
    console = Screen()
    console.print(f"[bold]{row.title}[/] [dim]{row.url}[/]\n")
    try:
        evidence = run_it(module, scale=scale, out=out, resume=resume, console=progress_console())
    except KeyboardInterrupt:
        end(
            130,
            "interrupted; nothing is half-written, finished measurements are kept. "
            f"Go on with: {_again(row.slug, quick, out)} --resume",
        )
    console.print(verdict_table(evidence, module.PAPER.claims))
    place = (out if out is not None else default_out(scale)) / f"{row.slug}.json"
    minutes = evidence["seconds"] / 60
    took = f"{minutes:.0f} min" if minutes >= 2 else f"{evidence['seconds']:.0f} s"
    console.print(f"{tally(evidence)} ({scale} scale, {took})", style="bold")
    console.print(f"written to {place}", style="dim", soft_wrap=True)


def _print_evidence(console: Console, row: Entry) -> None:
    from regard.papers._catalogue import evidence_file
    from regard.papers._evidence import read
    from regard.papers._show import tally, verdict_table

    if row.status == "measured":
        evidence = read(evidence_file(row.slug))
        console.print("\n", verdict_table(evidence))
        console.print(tally(evidence), style="bold")


def _row(row: Entry) -> dict[str, str]:
    names = ("slug", "title", "arxiv", "url", "topic", "room", "what", "venue", "also", "status")
    return {name: getattr(row, name) for name in names} | {"date": row.date.isoformat()}


def _again(slug: str, quick: bool, out: Path | None) -> str:
    where = f" --out {out}" if out is not None else ""
    return f"regard reproduce {slug}{' --quick' if quick else ''}{where}"
