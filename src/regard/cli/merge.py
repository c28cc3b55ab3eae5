"""`regard merge`: fine-tuned models of one base, and their optimisers' second moments, to one model on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from regard._errors import InputError
from regard.cli._app import Screen, app
from regard.cli._options import BUILD, split_list


@app.command(rich_help_panel=BUILD)
def merge(
    base: Annotated[
        Path, typer.Argument(metavar="BASE", help="The model that all experts started from.")
    ],
    experts: Annotated[
        list[Path], typer.Argument(metavar="EXPERT...", help="Directories or .safetensors files.")
    ],
    moments: Annotated[
        list[Path] | None,
        typer.Option(
            "--moments",
            metavar="FILE",
            help="Second moments (.safetensors), once for each expert, in their order.",
        ),
    ] = None,
    density: Annotated[
        str | None,
        typer.Option(
            "--density", metavar="X,Y", help="Share of edits kept: one for all or one an expert."
        ),
    ] = None,
    power: Annotated[
        float, typer.Option("--power", metavar="X", help="Of the moments; 0.5 as published.")
    ] = 0.5,
    scale_free: Annotated[
        bool, typer.Option("--scale-free", help="For experts of different batch sizes.")
    ] = False,
    out: Annotated[
        Path, typer.Option("--out", metavar="PLACE", help="A new directory, or a file.")
    ] = Path("merged"),
) -> None:
    """Merge fine-tuned models of one base, weighted by their optimisers' second moments.

    [cyan]regard merge base math code --moments math.safetensors --moments code.safetensors --density 0.4[/]

    Without moments, the plain mean of what the experts changed.
    """
    densities = None if density is None else _shares(density, len(experts))
    from regard.weights import merge_files

    place = merge_files(
        base,
        experts,
        out,
        moments=moments or None,
        densities=densities,
        power=power,
        scale_free=scale_free,
    )
    kept = "" if densities is None else f", keeping {', '.join(f'{d:g}' for d in densities)}"
    Screen().print(f"{len(experts)} experts merged to {place}{kept}", soft_wrap=True)


def _shares(given: str, experts: int) -> list[float]:
    """`0.4` or `0.4,0.3` -> a density for each expert."""
    try:
        found = [float(part) for part in split_list(given)]
    except ValueError:
        found = []
    if len(found) == 1:
        found *= experts
    if len(found) != experts or not all(0 <= share <= 1 for share in found):
        raise InputError.of(
            "--density", given=given, expected=f"one or {experts} shares in [0, 1], such as 0.4"
        )
    return found
