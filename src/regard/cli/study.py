"""`regard lab`: run a laboratory and see theory and experiment meet."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from regard._errors import InputError
from regard.cli._app import Screen, app
from regard.cli._options import STUDY


@app.command(rich_help_panel=STUDY)
def lab(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="A laboratory; none lists them.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A setting; may be given several times."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Where numbers and picture go.")
    ] = None,
    show: Annotated[
        bool, typer.Option("--settings", metavar="", help="List the settings and their ranges.")
    ] = False,
) -> None:
    """Run a laboratory: predictions beside measurements.

    [cyan]regard lab scan-and-snap --set seeds=4 --out snap[/]
    """
    given = [_pair(one) for one in settings or []]
    if out is not None and out.exists() and not out.is_dir():
        raise InputError.of("--out", given=str(out), expected="a directory or a new name")
    from regard.labs import catalogue

    screen = Screen()
    if name is None:
        width = max(map(len, catalogue.LABS))
        for key, listed in catalogue.LABS.items():
            screen.print(f"[bold]{key:{width}}[/]  {listed.line}", soft_wrap=True)
        return
    subject = catalogue.open(name, dict(given))
    if show:
        for row in subject.settings():
            screen.print(
                f"[bold]{row.key}[/] = {row.default}  [dim]{row.range}[/]  {row.help}",
                soft_wrap=True,
            )
        return
    result = subject.run()
    screen.print(str(result), soft_wrap=True, markup=False)
    if out is not None:
        result.write(out)
        screen.print(f"written to {out}", style="dim", soft_wrap=True)


def _pair(given: str) -> tuple[str, str]:
    key, equals, value = given.partition("=")
    if not equals or not key.strip():
        raise InputError.of("--set", given=given, expected="KEY=VALUE, such as seeds=8")
    return key.strip(), value.strip()
